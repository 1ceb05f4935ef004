"""What a user sees: the public names of each module, and nothing else in `dir`."""

import subprocess
import sys

import pytest

import soundwave
from soundwave import eager, fused

MODULES = [soundwave, fused, fused.functional, eager]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_dir_shows_what_is_public_and_all_of_it_exists(module):
    assert dir(module) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_functional_holds_the_operations_and_what_they_return():
    operations = {
        "add_layer_norm", "ctc_loss", "ctc_peaks", "linear_cross_entropy", "linear_ctc_loss", "linear_ctc_path",
        "shrink_attention", "splice",
    }  # fmt: skip
    assert set(dir(fused.functional)) == operations | {"LinearCTCOutput", "Peaks", "Spliced"}


def test_every_operation_has_its_definition_in_eager():
    operations = {name for name in fused.functional.__all__ if name[0].islower()}
    assert operations <= set(eager.__all__)


def test_the_front_door_opens_before_torch_is_there(tmp_path):
    """`soundwave --help` need not wait for torch, and `soundwave.fused` is there without an import of its own."""
    program = (
        "import sys, soundwave\n"
        "assert 'torch' not in sys.modules and 'transcribe' in dir(soundwave)\n"
        "print(soundwave.fused.CTCLoss(), soundwave.eager.ctc_loss.__name__, soundwave.load.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["ctc_loss", "load_model"], done.stderr


def test_a_name_that_is_not_public_is_refused():
    with pytest.raises(AttributeError, match="module 'soundwave' has no attribute 'transcripe'"):
        soundwave.transcripe  # noqa: B018
