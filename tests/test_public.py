"""What a user sees: the public names of each module, and nothing else in `dir`."""

import pytest

from soundwave import eager, fused


@pytest.mark.parametrize("module", [fused, fused.functional, eager], ids=lambda module: module.__name__)
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
