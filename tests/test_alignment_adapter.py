"""The alignment adapter on packed rows: eager's results and gradients, and no cost for padding."""

import copy
from types import SimpleNamespace

import pytest
import torch

from soundwave import eager
from soundwave.attention import choose_attention
from soundwave.fused.adapters import AlignmentAdapter
from tests.accuracy import assert_as_accurate
from tests.implementations import WHERE, skip_unless_runnable

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
WIDTH, FRAME = 32, 12
LENGTHS = {
    "mixture": ([7, 3, 10, 1], 10),
    "odd-and-even": ([8, 7], 8),
    "equal": ([8, 8], 8),
    "equal-odd": ([7, 7], 7),
    "one-clip": ([7], 7),
    "one-frame": ([1], 1),
    "more-padding-than-needed": ([3, 2], 12),
    "one-empty": ([9, 0, 4], 9),
    "all-empty": ([0, 0], 4),
}


def make(attend="frames", stack=2, dropout=0.0, dtype=FP32, device="cpu", width=WIDTH, impl="auto", attention="auto"):
    """Both adapters with the same parameters, none of them 0 or 1."""
    config = SimpleNamespace(
        frame_stack=stack,
        audio_hidden_size=FRAME,
        hidden_size=width,
        num_attention_heads=4,
        attend=attend,
        adapter_dropout=dropout,
        layer_norm_eps=1e-5,
    )
    torch.manual_seed(0)
    theirs, ours = eager.AlignmentAdapter(config), AlignmentAdapter(config, impl=impl, attention=attention)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(device, dtype), theirs.to(device, dtype)


def draw(lengths, size, device="cpu", dtype=FP32):
    frames = torch.randn(len(lengths), size, FRAME, generator=torch.Generator().manual_seed(1))
    return frames.to(device, dtype).requires_grad_(), torch.tensor(lengths, dtype=torch.int64)


def everything(adapter, frames, lengths, upstream):
    """The result, with eager's padding set to 0, and the gradients of frames and parameters."""
    hidden, counts = adapter(frames, lengths)
    valid = eager.length_mask(counts.to(hidden.device), hidden.shape[1])[..., None]
    hidden = hidden.masked_fill(~valid, 0.0)
    wanted = dict(adapter.named_parameters()) | {"frames": frames}
    gradients = torch.autograd.grad(hidden, list(wanted.values()), upstream.to(hidden))
    return {"hidden": hidden.detach()} | dict(zip(wanted, gradients, strict=True))


def check(ours, theirs, frames, lengths, autocast=False):
    """Each result is as accurate as eager's. Under autocast products are bf16, so all results are judged as bf16."""
    size = -(-frames.shape[1] // ours.frame_stack)
    upstream = torch.randn(len(lengths), size, WIDTH, generator=torch.Generator().manual_seed(2))
    with torch.autocast(frames.device.type, BF16, enabled=autocast):
        found, expected = (everything(adapter, frames, lengths, upstream) for adapter in (ours, theirs))
    exact = frames.detach().double().requires_grad_()
    truth = everything(copy.deepcopy(theirs).double(), exact, lengths, upstream)
    for name in truth:
        assert found[name].dtype == expected[name].dtype, name
        dtype = BF16 if autocast else found[name].dtype
        assert_as_accurate(found[name], expected[name], truth[name], dtype, name)


# ---------------------------------------------------------------- as eager


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("attend", ["frames", "self"])
@pytest.mark.parametrize(("lengths", "size"), LENGTHS.values(), ids=LENGTHS)
def test_results_and_gradients_are_as_exact_as_eagers(lengths, size, attend, device, impl):
    skip_unless_runnable(device, impl)
    check(*make(attend, device=device, impl=impl), *draw(lengths, size, device))


@pytest.mark.parametrize("attend", ["frames", "self"])
@pytest.mark.parametrize("dtype", [FP64, BF16], ids=["fp64", "bf16"])
def test_parameters_of_another_dtype(dtype, attend):
    check(*make(attend, dtype=dtype), *draw([7, 3, 10, 1], 10, dtype=dtype))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("attend", ["frames", "self"])
def test_autocast(attend, device):
    check(*make(attend, device=device), *draw([63, 7, 100], 100, device), autocast=True)


@pytest.mark.parametrize("stack", [1, 3])
def test_other_numbers_of_frames_side_by_side(stack):
    check(*make(stack=stack), *draw([7, 3, 10, 1], 10))


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["flash_attn", "varlen", "sdpa"])
def test_on_a_gpu_every_attention(attention):
    try:
        choose_attention(attention, device=torch.device("cuda"), dtype=BF16, head_size=WIDTH // 4)
    except ValueError as error:
        pytest.skip(str(error))
    check(*make(device="cuda", attention=attention), *draw([63, 7, 100], 100, "cuda"), autocast=True)


@pytest.mark.gpu
def test_on_a_gpu_lengths_may_lie_on_either_side():
    (ours, _), (frames, lengths) = make(device="cuda"), draw([7, 3, 10], 10, "cuda")
    hidden, counts = ours(frames, lengths)
    there, counts_there = ours(frames, lengths.cuda())
    assert torch.equal(hidden, there)
    assert (counts.device.type, counts_there.device.type) == ("cpu", "cuda")


def test_keys_and_parameters_are_eagers():
    ours, theirs = make()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert isinstance(ours, eager.AlignmentAdapter)


def test_counts_are_eagers():
    ours, theirs = make()
    frames, lengths = draw([7, 3, 10, 0], 10)
    for adapter in (ours, theirs):
        assert adapter(frames, lengths)[1].tolist() == [4, 2, 5, 0]
    assert ours(frames, lengths.to(torch.int32))[1].dtype == torch.int32


def test_an_empty_batch_and_no_frames():
    ours, _ = make()
    hidden, counts = ours(torch.zeros(0, 5, FRAME), torch.zeros(0, dtype=torch.int64))
    assert hidden.shape == (0, 3, WIDTH) and counts.shape == (0,)
    assert ours(torch.zeros(2, 0, FRAME), torch.zeros(2, dtype=torch.int64))[0].shape == (2, 0, WIDTH)


# ---------------------------------------------------------------- packed


def test_rows_past_a_length_are_zero():
    ours, _ = make()
    frames, lengths = draw([7, 3, 10, 0], 12)
    hidden, counts = ours(frames, lengths)
    valid = eager.length_mask(counts, hidden.shape[1])
    assert hidden.shape == (4, 6, WIDTH)
    assert not hidden[~valid].any() and hidden[valid].any(1).all()


def test_padding_costs_no_rows():
    ours, _ = make()
    seen = {}
    for name, module in ours.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, given, __, name=name: seen.update({name: given[0].shape[0]}))
    ours(*draw([7, 3, 1], 100))
    assert set(seen.values()) == {4 + 2 + 1} and len(seen) == 4


@pytest.mark.parametrize("attend", ["frames", "self"])
def test_padding_may_hold_anything(attend):
    ours, _ = make(attend)
    frames, lengths = draw([7, 3, 10], 12)
    expected = ours(frames, lengths)[0]
    spoilt = frames.detach().clone()
    spoilt[~eager.length_mask(lengths, 12)] = torch.nan
    spoilt.requires_grad_()
    hidden = ours(spoilt, lengths)[0]
    assert torch.equal(hidden, expected)
    wanted = [spoilt, *ours.parameters()]
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(hidden.square().sum(), wanted))


@pytest.mark.parametrize("attend", ["frames", "self"])
def test_neighbours_do_not_matter(attend):
    ours, _ = make(attend)
    frames, lengths = draw([7, 3, 10], 10)
    hidden, counts = ours(frames, lengths)
    with torch.no_grad():
        frames[1] = torch.nan
    spoilt, _ = ours(frames, lengths)
    assert spoilt[1, : counts[1]].isnan().all()
    assert torch.equal(spoilt[[0, 2]], hidden[[0, 2]])


@pytest.mark.parametrize("attend", ["frames", "self"])
def test_a_clip_alone_gives_what_it_gives_in_a_batch(attend):
    ours, _ = make(attend, dtype=FP64)
    frames, lengths = draw([7, 3, 10], 10, dtype=FP64)
    hidden, counts = ours(frames, lengths)
    for row, (length, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        alone, _ = ours(frames[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(alone[0], hidden[row, :count])


def test_frames_see_each_other_in_attention_and_not_in_the_released_semantics():
    frames, lengths = draw([10], 10)
    other = frames.detach().clone()
    other[0, 4] += 1  # in the third row
    changed = {}
    for attend in ("frames", "self"):
        ours, _ = make(attend)
        changed[attend] = (ours(frames, lengths)[0] != ours(other, lengths)[0]).any(-1)[0].tolist()
    assert changed == {"frames": [True] * 5, "self": [False, False, True, False, False]}


# ---------------------------------------------------------------- dropout, repetition, compilation


def test_dropout_draws_as_eager_does_where_there_is_no_padding():
    ours, theirs = make(dropout=0.5)
    frames, lengths = draw([8, 8], 8)
    results = []
    for adapter in (ours, theirs):
        torch.manual_seed(3)
        results.append(adapter.train()(frames, lengths)[0])
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0], ours.eval()(frames, lengths)[0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("attend", ["frames", "self"])
def test_results_are_bitwise_the_same_every_time(attend, device):
    ours, _ = make(attend, device=device)
    frames, lengths = draw([63, 7, 100], 100, device)
    upstream = torch.randn(3, 50, WIDTH)
    first, *others = (everything(ours, frames, lengths, upstream) for _ in range(20))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_a_compiler_leaves_the_results_as_they_are():
    ours, _ = make()
    frames, lengths = draw([7, 3, 10], 10)
    compiled = torch.compile(ours, backend="aot_eager")
    torch.testing.assert_close(compiled(frames, lengths)[0], ours(frames, lengths)[0])


def test_what_runs_can_be_read():
    ours, _ = make(impl="torch", attention="sdpa")
    assert "impl='torch', attention='sdpa'" in repr(ours)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("frames", "lengths", "message"),
    [
        (torch.zeros(1, 2, 5, FRAME), torch.tensor([1]), rf"frames has shape \[1, .*\].* \[B, T_enc, {FRAME}\]"),
        (torch.zeros(2, 5, 7), torch.tensor([1, 1]), r"frames has shape \[2, 5, 7\]"),
        (torch.zeros(2, 5, FRAME).long(), torch.tensor([1, 1]), "frames is torch.int64, but it must be floating point"),
        (torch.zeros(2, 5, FRAME), torch.tensor([1]), r"lengths is torch.int64 of shape \[1\], .* int \[2\]"),
        (torch.zeros(2, 5, FRAME), torch.tensor([1.0, 2.0]), r"lengths is torch.float32 of shape \[2\]"),
        (torch.zeros(2, 5, FRAME), torch.tensor([5, 6]), "lengths go from 0 to 6, but each must be 0 to 5"),
        (torch.zeros(2, 5, FRAME), torch.tensor([-1, 5]), "lengths go from -1 to 5"),
    ],
    ids=["rank", "width", "dtype", "lengths", "float-lengths", "too-long", "negative"],
)
def test_bad_input_is_named(frames, lengths, message):
    with pytest.raises(ValueError, match=message):
        make()[0](frames, lengths)


def test_an_attention_that_cannot_run_is_an_error():
    ours, _ = make(attention="flash_attn")
    with pytest.raises(ValueError, match="impl = 'flash_attn', but FlashAttention needs CUDA"):
        ours(*draw([7, 3], 10))


def test_an_unknown_impl_is_an_error():
    with pytest.raises(ValueError, match="impl = 'cuda', but it must be one of auto, triton, torch"):
        make(impl="cuda")
