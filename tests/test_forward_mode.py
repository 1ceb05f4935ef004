"""No operation here has forward-mode derivatives: they are refused, and not taken for 0."""

import pytest
import torch
from torch.autograd import forward_ad

from soundwave import eager, fused
from soundwave.fused import functional as F
from soundwave.model.configuration import SoundwaveConfig

LABELS, LENGTHS = torch.tensor([[1, 2], [1, 3]]), ([5, 4], [2, 1])
BOUNDS = torch.tensor([0, 2, 4], dtype=torch.int32)
IDS = torch.tensor([[1, 9, 2]])
PEAKS = eager.Peaks(torch.tensor([1, 6]), torch.tensor([0, 1, 2], dtype=torch.int32), 1)


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def shrinking(hidden, weight, bias, keys="all"):
    adapter = fused.ShrinkingAdapter(SoundwaveConfig(hidden_size=8, num_attention_heads=2, keys=keys))
    given = {"in_proj_weight": weight, "in_proj_bias": bias}
    return torch.func.functional_call(adapter, given, (hidden, torch.tensor([5, 4]), PEAKS))


# What is called, and the tensors that it is differentiable in.
OPERATIONS = {
    "ctc_loss": (lambda x: F.ctc_loss(x, LABELS, *LENGTHS), drawn(5, 2, 4)),
    "linear_ctc_loss": (
        lambda h, w, row, bias: (
            F.linear_ctc_loss(h, w, LABELS, *LENGTHS, blank=6, blank_weight=row, blank_bias=bias).loss
        ),
        drawn(2, 5, 8), drawn(6, 8), drawn(8), drawn(),
    ),
    "linear_cross_entropy": (
        lambda h, w: F.linear_cross_entropy(h, w, torch.tensor([0, 5])), drawn(2, 8), drawn(6, 8)
    ),
    "shrink_attention": (
        lambda q, k, v: F.shrink_attention(q, k, v, BOUNDS, BOUNDS, 2, 2),
        drawn(4, 2, 8), drawn(4, 2, 8), drawn(4, 2, 8),
    ),
    "add_layer_norm": (F.add_layer_norm, drawn(4, 8), drawn(4, 8), drawn(8), drawn(8)),
    "splice": (
        lambda e, s: F.splice(e, IDS, torch.ones_like(IDS), s, BOUNDS[:2], audio_placeholder_id=9).embeddings,
        drawn(1, 3, 8), drawn(2, 8),
    ),
    "ShrinkingAdapter": (shrinking, drawn(2, 5, 8), drawn(24, 8), drawn(24)),
}  # fmt: skip
EVERY = [
    pytest.param(name, place, id=f"{name}-{place}")
    for name, (_, *tensors) in OPERATIONS.items()
    for place in range(len(tensors))
]


@pytest.mark.parametrize(("name", "place"), EVERY)
def test_a_tangent_is_refused(name, place):
    function, *tensors = OPERATIONS[name]

    def of_one(x):
        return function(*tensors[:place], x, *tensors[place + 1 :])

    message = f"{name}: forward-mode derivatives are not there; use reverse mode"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(of_one, (tensors[place],), (torch.ones_like(tensors[place]),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        of_one(forward_ad.make_dual(tensors[place], torch.ones_like(tensors[place])))


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_has_no_tangent_is_computed_beside_one(name):
    function, *tensors = OPERATIONS[name]
    torch.manual_seed(0)
    expected = function(*tensors)
    with forward_ad.dual_level():
        torch.manual_seed(0)
        assert torch.equal(function(*tensors), expected)
