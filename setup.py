"""Build of the distribution `soundwave-fused`, which is imported as `soundwave`.

The folder `kernels/` is installed as `soundwave.kernels`, never as a top-level package: transformers and
bitsandbytes import another package of that name. Plain `find_packages` would ship `kernels/` and `bench/`
beside `soundwave`. What the source distribution holds beside the packages is in MANIFEST.in.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
# Read, not imported: an isolated build has none of the requirements. The line in soundwave/__init__.py is the only
# place that holds the version.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "soundwave/__init__.py").read_text("utf-8"), re.MULTILINE)[1]

# Lower bounds only where one is known; constraints.txt pins what was tested. transformers 5.24.0 is left out: it adds
# LoRA with peft 0.22 or newer only, and the newest release of peft is 0.21.2.
REQUIRES = [
    "torch>=2.11",
    "triton>=3.6; sys_platform == 'linux'",
    "transformers>=5.17,!=5.24.0,<6",
    "peft",
    "bitsandbytes",
    "accelerate",
    "numpy",
    "soundfile",
    "av>=14",
    "soxr",
    "jinja2",
    "jiwer",
    "whisper-normalizer",
    "regex",
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
    "psutil",
]
EXTRAS = {
    "serve": ["fastapi", "uvicorn", "python-multipart", "prometheus-client"],
    "scores": ["sacrebleu"],  # BLEU and chrF of translations
    "parquet": ["pyarrow"],  # data sets as Parquet, or as Hugging Face's datasets save them
    "ray": ["ray[data]"],  # curation on a cluster; 150 MB to download, so its test is skipped where it is not installed
    "dev": [
        "sacrebleu",
        "fastapi",  # with the next three the server
        "uvicorn",
        "python-multipart",
        "prometheus-client",
        "openai",  # its client talks to the server
        "pyarrow",  # data sets as Parquet and Arrow
        "pytest",
        "pytest-benchmark",
        "pytest-xdist",
        "hypothesis",
        "playwright",  # opens the report's pages
        "ruff",
        "basedpyright",  # checks the types
        "griffelib",  # reads the docstrings for the page of the API
        "nbclient",  # runs the notebooks, with ipykernel
        "ipykernel",
        "markdown-it-py",  # finds the examples in the documents, which are run
        "packaging",
        "build",
        "setuptools>=77",
    ],
    "flash": ["flash-attn"],
    # What the benches compare with. flag-gems pins numpy 1.26: take it by itself, pip install --no-deps flag-gems (its
    # CTC is younger than its release 5.0.2). flash-attn is a source build, which needs torch and nvcc there first.
    "peers": ["liger-kernel", "cut-cross-entropy", "flash-attn"],
    # Never beside a CPU build of torch: torchaudio then cannot load, and `import transformers` fails with it.
    "gpu": ["torchaudio"],
}

setup(
    name="soundwave-fused",
    version=VERSION,
    description="Teach a text LLM to hear, on one 24 GB card or a laptop: CTC alignment, shrinking, instructions",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["speech recognition", "speech LLM", "CTC", "Whisper", "Llama", "LoRA", "Triton", "fused kernels"],
    # No classifier names the licence: beside a licence expression, setuptools and package indexes refuse one.
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[*find_packages(include=["soundwave*"]), "soundwave.kernels"],
    package_dir={"soundwave.kernels": "kernels"},
    package_data={
        "soundwave": ["py.typed"],
        "soundwave.report": ["*.html", "*.css", "*.js"],
        "soundwave.serve": ["*.html"],
    },
    # The wheel's files are named here alone: what MANIFEST.in puts into the source distribution is not added.
    include_package_data=False,
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["soundwave = soundwave.cli:main"]},
)
