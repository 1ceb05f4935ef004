"""Build of the package `soundwave`.

The folder `kernels/` is installed as `soundwave.kernels`, never as a top-level package: transformers and
bitsandbytes import another package of that name. Plain `find_packages` would ship `kernels/` and `bench/`
beside `soundwave`.
"""

from setuptools import find_packages, setup

# Lower bounds only where one is known; constraints.txt pins what was tested.
REQUIRES = [
    "torch>=2.11",
    "triton>=3.6; sys_platform == 'linux'",
    "transformers>=5.17,<6",
    "peft",
    "bitsandbytes",
    "accelerate",
    "numpy",
    "soundfile",
    "soxr",
    "jiwer",
    "whisper-normalizer",
    "typer",
    "pydantic>=2",
    "pyyaml",
    "rich",
    "gguf",
    "espeakng-loader>=0.2.4",
    "tensorboard",
    "matplotlib",
    "nvtx",
    "filelock",
]
EXTRAS = {
    "dev": ["pytest", "pytest-benchmark", "hypothesis", "playwright", "ruff", "setuptools>=77"],
    "flash": ["flash-attn"],
    # What the benches compare with. flag-gems pins numpy 1.26: take it by itself, pip install --no-deps flag-gems (its
    # CTC is younger than its release 5.0.2). flash-attn is a source build, which needs torch and nvcc there first.
    "peers": ["liger-kernel", "cut-cross-entropy", "flash-attn"],
    # Never beside a CPU build of torch: torchaudio then cannot load, and `import transformers` fails with it.
    "gpu": ["torchaudio"],
}

setup(
    name="soundwave",
    version="0.1.0",
    description="Teach a text LLM to hear on one 24 GB card: CTC alignment, shrinking and instruction tuning",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["soundwave*"]), "soundwave.kernels"],
    package_dir={"soundwave.kernels": "kernels"},
    package_data={"soundwave.report": ["*.html", "*.css", "*.js"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["soundwave = soundwave.cli:main"]},
)
