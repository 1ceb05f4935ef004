"""CTC: both implementations against the recursion in fp64 and torch's loss, and wishes of that loss's users."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from soundwave import eager, fused
from soundwave.fused.functional import ctc_loss
from soundwave.kernels import checks, ctc_lattice, dispatch
from soundwave.kernels.ctc import ctc_nll
from soundwave.kernels.ctc_lattice import ctc_lattice as lattice
from soundwave.kernels.ctc_targets import check_targets, feasible
from soundwave.kernels.dispatch import interpreted
from tests.accuracy import assert_as_accurate, assert_rms, relative
from tests.implementations import everywhere

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in (FP16, BF16, FP32, FP64)]
EVERY_DRAW = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def make(
    frames, batch, classes, width, *, blank=0, kinds=None, scale=1.0, dtype=FP32, device="cpu", seed=0, full=False
):
    """Logits [T, B, C], targets [B, U] padded with -100, and both lengths. Few `kinds` of labels give repeats."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(frames, batch, classes, generator=generator, dtype=FP64)
    kinds = min(kinds or classes - 1, classes - 1)
    labels = torch.randint(kinds, (batch, width), generator=generator)
    labels = labels + (labels >= blank)
    target_lengths = torch.randint(width + 1, (batch,), generator=generator)
    input_lengths = torch.randint(min(1, frames), frames + 1, (batch,), generator=generator)
    if full:
        target_lengths[:], input_lengths[:] = width, frames
    labels = labels.masked_fill(torch.arange(width) >= target_lengths[:, None], -100)
    return logits.to(device, dtype), labels.to(device), input_lengths.to(device), target_lengths.to(device)


def concatenated(targets, target_lengths):
    return targets[torch.arange(targets.shape[1], device=targets.device) < target_lengths[:, None]]


def gradient(loss, tensor):
    return torch.autograd.grad(loss.masked_fill(loss.isinf(), 0.0).sum(), tensor)[0]


def torchs(log_probs, targets, input_lengths, target_lengths, blank):
    """torch's losses, and its gradient without the exp(log_probs) in it, and 0 where no alignment exists."""
    log_probs.requires_grad_()
    loss = F.ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, "none")
    frames = torch.arange(len(log_probs), device=log_probs.device)[:, None] < input_lengths
    counts = (frames & loss.isfinite())[..., None]
    return loss.detach(), (gradient(loss, log_probs) - log_probs.detach().exp()).masked_fill(~counts, 0.0)


def check(log_probs, targets, input_lengths, target_lengths, blank, impl, form=None) -> list[tuple[float, float]]:
    """Asserts the accuracy of losses and gradient; returns (our error, torch's) over the norm of the truth for both.

    `form`: the targets as ours gets them, if not padded int64.
    """
    dtype, lengths = log_probs.dtype, (input_lengths, target_lengths)
    inside = torch.promote_types(dtype, FP32)
    ours = log_probs.detach().requires_grad_()
    loss = ctc_loss(ours, targets if form is None else form, *lengths, blank, "none", impl=impl)
    assert torch.equal(loss.isinf(), ~feasible(targets, *lengths))
    found = loss, gradient(loss, ours)
    theirs = torchs(log_probs.detach().to(inside), targets, *lengths, blank)
    truth = torchs(log_probs.detach().double(), targets, *lengths, blank)
    assert torch.equal(loss.isinf(), truth[0].isinf())
    errors = []
    for name, a, b, c, kind in zip(("loss", "gradient"), found, theirs, truth, (inside, dtype), strict=True):
        assert a.dtype == kind
        errors.append(relative(assert_as_accurate(a, b.to(kind), c, kind, name), c))
    return errors


# ---- accuracy


def draws(frames, classes, width):
    return {
        "frames": st.integers(1, frames),
        "batch": st.integers(1, 5),
        "classes": st.sampled_from([2, 3, 5, 33, 100, 1000, 5000]).filter(lambda n: n <= classes),
        "width": st.integers(0, width),
        "kinds": st.sampled_from([1, 2, None]),
        "place": st.sampled_from(["first", "middle", "last"]),
        "scale": st.sampled_from([0.1, 1.0, 10.0]),
        "form": st.sampled_from(["padded", "concatenated", "int32"]),
        "seed": st.integers(0, 10**6),
    }


def check_draw(impl, frames, batch, classes, width, kinds, place, scale, form, seed):
    blank = {"first": 0, "middle": classes // 2, "last": classes - 1}[place]
    logits, targets, *lengths = make(frames, batch, classes, width, blank=blank, kinds=kinds, scale=scale, seed=seed)
    form = {"concatenated": concatenated(targets, lengths[1]), "int32": targets.int()}.get(form)
    check(logits.log_softmax(-1), targets, *lengths, blank, impl, form)


@EVERY_DRAW
@given(**draws(300, 5000, 120))
def test_torch_is_as_accurate_as_torchs_own_loss(**draw):
    check_draw("torch", **draw)


@settings(EVERY_DRAW, max_examples=15)
@given(**draws(12, 33, 7))
@example(frames=1, batch=1, classes=2, width=1, kinds=None, place="last", scale=1.0, form="padded", seed=0)
def test_interpreter_is_as_accurate_as_torchs_own_loss(**draw):
    check_draw("triton", **draw)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(device, impl, dtype):
    """Half types are read without a copy, and give a float32 loss and a gradient of their own dtype."""
    logits, targets, *lengths = make(15, 3, 7, 5, device=device, dtype=FP64)
    log_probs = logits.log_softmax(-1).to(dtype)
    if dtype == FP64:  # there is no truth to judge torch's error by
        loss = ctc_loss(log_probs.requires_grad_(), targets, *lengths, reduction="none", impl=impl)
        found = loss.detach(), gradient(loss, log_probs)
        torch.testing.assert_close(found, torchs(log_probs.detach(), targets, *lengths, 0))
    elif impl == "torch" or dtype != BF16 or not interpreted():  # the interpreter truncates to bfloat16
        check(log_probs, targets, *lengths, 0, impl)


@everywhere
def test_rms_error_is_at_most_torchs(device, impl):
    count, frames, width = (60, 100, 40) if (device, impl) != ("cpu", "triton") else (6, 14, 5)
    pairs = []
    for seed in range(count):
        logits, targets, *lengths = make(frames, 3, 50, width, device=device, seed=seed, full=seed % 2 == 0)
        pairs.append(check(logits.log_softmax(-1), targets, *lengths, 0, impl))
    for name, of in zip(("loss", "gradient"), zip(*pairs, strict=True), strict=True):
        assert_rms(list(of), torch.finfo(FP32).eps, name)


@everywhere
def test_long_and_wide(device, impl):
    """750 frames of uniform logits over 128 257 classes, 80 labels: posteriors within 1e-4 of fp64."""
    frames = 120 if (device, impl) == ("cpu", "triton") else 750  # the interpreter takes half a minute for 750
    log_probs = torch.full((frames, 1, 81), -torch.tensor(128257.0, dtype=FP64).log().item(), dtype=FP64, device=device)
    targets = torch.arange(1, 81, device=device)[None]
    lengths = torch.tensor([frames], device=device), torch.tensor([80], device=device)
    truth = lattice(log_probs, targets, *lengths, blank=0, impl="torch", need_gamma=True)
    found = lattice(log_probs.float(), targets, *lengths, blank=0, impl=impl, need_gamma=True)
    assert (found[1] - truth[1]).abs().max() <= 1e-4
    assert torch.allclose(found[0].double(), truth[0], rtol=1e-6)


@everywhere
def test_a_short_target_in_a_wide_batch(device, impl):
    """States past the end of an utterance do not affect the renormalisation of its states."""
    logits, targets, input_lengths, target_lengths = make(80, 2, 50, 40, device=device, full=True)
    target_lengths[1] = 2
    check(logits.log_softmax(-1), targets, input_lengths, target_lengths, 0, impl)


BLOCKS = [(31, 35), (32, 36), (70, 75)]


@pytest.mark.parametrize(("width", "frames"), BLOCKS)
def test_blocks_of_states(width, frames, monkeypatch):
    """Targets of more states than a block holds; here blocks of 32, to keep the interpreter's time short."""
    monkeypatch.setattr(ctc_lattice, "LARGEST_BLOCK", 32)
    logits, targets, *lengths = make(frames, 2, 4, width, seed=width, full=True)
    targets[:, 2::2] += targets[:, 2::2] == targets[:, 1:-1:2]  # fewer repeats, so that it can be aligned
    targets = targets.clamp(1, 3)
    lengths[0][1], lengths[1][1] = frames - 3, max(width - 12, 0)
    check(logits.log_softmax(-1), targets, *lengths, 0, "triton")


@pytest.mark.parametrize("width", [126, 127, 128, 300, 1100])
def test_short_targets_with_much_padding(width):
    """Every block size of states that is launched; most states are past the end of the utterance."""
    logits, targets, *lengths = make(6, 1, 2000, 4, seed=width, full=True)
    targets = F.pad(targets, (0, width - 4), value=-100)
    check(logits.log_softmax(-1), targets, *lengths, 0, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1, 63, 100, 200, 400, 1000, 1023, 1024, 3000])
def test_every_tier(width):
    logits, targets, *lengths = make(width + width // 8 + 9, 3, 500, width, device="cuda", full=True)
    lengths[1][1] = width // 2
    check(logits.log_softmax(-1), targets, *lengths, 0, "triton")


# ---- what users of torch.nn.CTCLoss asked for


@everywhere
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("zero_infinity", [False, True])
def test_gradient_is_that_of_the_stated_input(device, impl, reduction, zero_infinity):
    logits, targets, input_lengths, target_lengths = make(6, 3, 5, 3, kinds=2, dtype=FP64, device=device, full=True)
    target_lengths[1] = 0
    input_lengths[2] = 2 if zero_infinity else 6  # too short for three labels

    def loss(log_probs):
        return ctc_loss(log_probs, targets, input_lengths, target_lengths, 0, reduction, zero_infinity, impl=impl)

    fast = (device, impl) == ("cpu", "triton")  # gradcheck along one direction, because a call takes long
    for inputs, function in ((logits.log_softmax(-1), loss), (logits, lambda logits: loss(logits.log_softmax(-1)))):
        assert torch.autograd.gradcheck(function, inputs.detach().requires_grad_(), fast_mode=fast)


@everywhere
def test_gradient_of_the_logits_is_torchs(device, impl):
    logits, targets, *lengths = make(30, 4, 9, 8, device=device, dtype=FP64)
    logits.requires_grad_()
    ours = torch.autograd.grad(
        fused.CTCLoss(zero_infinity=True, impl=impl)(logits.log_softmax(-1), targets, *lengths), logits
    )
    theirs = torch.autograd.grad(
        torch.nn.CTCLoss(zero_infinity=True)(logits.log_softmax(-1), targets, *lengths), logits
    )
    torch.testing.assert_close(ours, theirs)


@everywhere
def test_bitwise_equal_over_20_runs(device, impl):
    if (device, impl) == ("cuda", "torch"):
        pytest.skip("torch's own loss adds with atomics there")
    logits, targets, *lengths = make(4, 2, 6, 3, kinds=2, device=device)

    def once():
        log_probs = logits.log_softmax(-1).requires_grad_()
        loss = ctc_loss(log_probs, targets, *lengths, reduction="none", impl=impl)
        return loss, gradient(loss, log_probs)

    first = once()
    for _ in range(19):
        for a, b in zip(once(), first, strict=True):
            assert torch.equal(a, b)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["too short", "no frames", "all -inf", "a label -inf", "the lowest number"])
def test_zero_infinity_leaves_no_nan(device, impl, dtype, case):
    """Without it the loss is inf and its gradient 0, not NaN."""
    logits, targets, input_lengths, target_lengths = make(5, 2, 5, 3, device=device, full=True)
    log_probs = logits.log_softmax(-1).to(dtype)
    label = int(targets[0, 1])
    if case in ("too short", "no frames"):
        input_lengths[0] = 2 if case == "too short" else 0
    elif case == "all -inf":
        log_probs[2, 0] = -torch.inf
    elif case == "a label -inf":
        log_probs[:, 0, label] = -torch.inf
    else:
        log_probs[:, 0, label] = torch.finfo(dtype).min
    log_probs.requires_grad_()
    for zero_infinity in (True, False):
        loss = ctc_loss(log_probs, targets, input_lengths, target_lengths, 0, "mean", zero_infinity, impl=impl)
        found = torch.autograd.grad(loss, log_probs)[0]
        assert not loss.isnan().any()
        assert found.isfinite().all()
        assert (found[:, 1] != 0).any()
        if case != "the lowest number":  # its sum is finite in some dtypes
            assert loss.isfinite() == zero_infinity
            assert (found[:, 0] == 0).all()


@everywhere
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("zero_infinity", [False, True])
def test_corner_cases_are_torchs(device, impl, reduction, zero_infinity):
    """No labels, no frames, neither, too few frames, as many as needed, a repeat that needs one more."""
    logits = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)).to(device)
    targets = torch.tensor([[1, 2], [1, 2], [1, 2], [3, 1], [2, 2], [2, 2]], device=device)
    input_lengths = torch.tensor([3, 0, 0, 1, 3, 2], device=device)
    target_lengths = torch.tensor([0, 0, 1, 2, 2, 2], device=device)
    for rows in ([0, 1, 4], [0, 1, 2, 3, 4, 5]):
        log_probs = logits[:, rows].log_softmax(-1)
        args = targets[rows], input_lengths[rows], target_lengths[rows], 0, reduction, zero_infinity
        torch.testing.assert_close(ctc_loss(log_probs, *args, impl=impl), F.ctc_loss(log_probs, *args))


@everywhere
@pytest.mark.parametrize("frames", [0, 1, 5])
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("width", [0, 3])
def test_empty_batches_frames_and_targets(device, impl, frames, batch, width):
    """torch refuses these. No frames and no labels give 0, no frames and some labels inf, no utterances 0."""
    log_probs = torch.zeros(frames, batch, 4, device=device).log_softmax(-1).requires_grad_()
    targets = torch.ones(batch, width, dtype=torch.int64, device=device)
    input_lengths = torch.full((batch,), frames, device=device)
    for labels in {0, min(width, 1)}:
        target_lengths = torch.full((batch,), labels, device=device)
        for form in (targets, concatenated(targets, target_lengths)):
            loss = ctc_loss(log_probs, form, input_lengths, target_lengths, reduction="none", impl=impl)
            assert loss.shape == (batch,)
            if not frames:
                assert (loss == (torch.inf if labels else 0.0)).all()
            else:
                assert loss.isfinite().all()
            mean = ctc_loss(log_probs, form, input_lengths, target_lengths, zero_infinity=True, impl=impl)
            assert mean.isfinite()
            assert torch.autograd.grad(mean, log_probs)[0].shape == log_probs.shape


@everywhere
def test_one_utterance_without_a_batch(device, impl):
    log_probs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1).to(device)
    for targets in (torch.tensor([1, 2], device=device), torch.tensor([[1, 2]], device=device)):
        for lengths in ((torch.tensor(5), torch.tensor(2)), (torch.tensor([5]), torch.tensor([2])), ((5,), (2,))):
            for reduction in ("mean", "sum", "none"):
                found = ctc_loss(log_probs, targets, *lengths, 0, reduction, impl=impl)
                torch.testing.assert_close(found, F.ctc_loss(log_probs, targets, *lengths, 0, reduction))


@everywhere
def test_every_form_of_targets_and_lengths_gives_the_same(device, impl):
    logits, targets, *lengths = make(5, 2, 6, 5, device=device)
    log_probs = logits.log_softmax(-1)
    wanted = ctc_loss(log_probs, targets, *lengths, impl=impl)
    labels = concatenated(targets, lengths[1])
    wide = torch.full((2, 11), -1, device=device)
    wide[:, ::2][:, :5] = targets
    for other in (targets.int(), targets.cpu(), labels, labels.int(), labels.cpu(), wide[:, ::2], wide[:, ::2].int()):
        for sizes in (lengths, [x.int() for x in lengths], [x.cpu() for x in lengths], [x.tolist() for x in lengths]):
            assert torch.equal(ctc_loss(log_probs, other, *sizes, impl=impl), wanted)
    assert torch.equal(fused.CTCLoss(impl=impl)(log_probs, targets, *lengths), wanted)


@everywhere
def test_lengths_in_columns_of_a_table_give_the_same(device, impl):
    logits, targets, *lengths = make(9, 3, 7, 3, device=device, full=True)
    lengths[0] -= torch.arange(3, device=device)
    lengths[1] -= torch.arange(2, -1, -1, device=device)
    log_probs = logits.log_softmax(-1)
    columns = torch.stack(lengths, 1).unbind(1)
    assert not columns[0].is_contiguous()
    wanted = ctc_loss(log_probs, targets, *lengths, reduction="none", impl=impl)
    assert torch.equal(ctc_loss(log_probs, targets, *columns, reduction="none", impl=impl), wanted)
    bare = ctc_nll(log_probs, targets.t().contiguous().t(), *columns, blank=0, impl=impl)
    assert torch.equal(bare, wanted)


@everywhere
def test_views_give_the_same(device, impl):
    logits, targets, *lengths = make(9, 3, 7, 3, device=device)
    log_probs = logits.log_softmax(-1)
    wanted = ctc_loss(log_probs, targets, *lengths, reduction="none", impl=impl)
    batch_first = log_probs.transpose(0, 1).contiguous().transpose(0, 1)
    part = torch.full((18, 3, 15), torch.nan, device=device)
    part[::2, :, 1::2] = log_probs
    for view in (batch_first, part[::2, :, 1::2]):
        view = view.detach().requires_grad_()
        loss = ctc_loss(view, targets, *lengths, reduction="none", impl=impl)
        assert torch.equal(loss, wanted)
        assert gradient(loss, view).shape == log_probs.shape
    same = log_probs[:, :1].expand(-1, 3, -1)
    torch.testing.assert_close(
        ctc_loss(same, targets, *lengths, impl=impl), ctc_loss(same.contiguous(), targets, *lengths, impl=impl)
    )


@everywhere
def test_offsets_beyond_int32(device, impl):
    """Log-probabilities whose last element lies past 2^31, as 23 clips of 30 s over 128 257 classes have."""
    torch.use_deterministic_algorithms(False)  # it would write all of this memory, where only a few pages are needed
    logits, targets, *lengths = make(4, 2, 5, 2, device=device, full=True)
    log_probs = logits.log_softmax(-1).to(FP16)
    strides = 2**29, 2**30 - 7, 143
    far = torch.empty(2**31 + 2**30, dtype=FP16, device=device).as_strided(log_probs.shape, strides)
    far.copy_(log_probs)
    assert 3 * far.stride(0) + far.stride(1) > 2**31
    assert torch.equal(ctc_loss(far, targets, *lengths, impl=impl), ctc_loss(log_probs, targets, *lengths, impl=impl))


@everywhere
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_used_may_hold_anything(device, impl, junk):
    """Frames past the length, and classes that are neither the blank nor a label of the utterance."""
    logits, targets, *lengths = make(9, 3, 12, 3, device=device)
    log_probs = logits.log_softmax(-1).requires_grad_()
    loss = ctc_loss(log_probs, targets, *lengths, reduction="none", impl=impl)
    labels = torch.cat([targets, torch.zeros_like(targets[:, :1])], 1)
    classes = (labels[..., None] == torch.arange(12, device=device)).any(1)
    frames = torch.arange(9, device=device)[:, None] < lengths[0]
    filled = log_probs.detach().masked_fill(~(frames[..., None] & classes), junk).requires_grad_()
    again = ctc_loss(filled, targets, *lengths, reduction="none", impl=impl)
    assert torch.equal(again, loss)
    assert torch.equal(gradient(again, filled), gradient(loss, log_probs))


@everywhere
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["blank", "label"])
def test_nan_and_inf_among_what_is_used_give_nan_to_that_utterance(device, impl, value, place):
    logits, targets, *lengths = make(9, 3, 12, 3, device=device, full=True)
    log_probs = logits.log_softmax(-1)
    log_probs[4, 1, 0 if place == "blank" else int(targets[1, 1])] = value
    log_probs.requires_grad_()
    for zero_infinity in (True, False):
        loss = ctc_loss(log_probs, targets, *lengths, 0, "none", zero_infinity, impl=impl)
        assert loss.isnan().tolist() == [False, True, False]
        found = torch.autograd.grad(loss.sum(), log_probs)[0]
        assert found[:, [0, 2]].isfinite().all()
        assert found[:, 1].isnan().any()


@everywhere
def test_autocast_changes_nothing(device, impl):
    logits, targets, *lengths = make(9, 3, 7, 3, device=device)
    log_probs = logits.log_softmax(-1).requires_grad_()
    plain = ctc_loss(log_probs, targets, *lengths, reduction="none", impl=impl)
    with torch.autocast(device, torch.bfloat16):
        cast = ctc_loss(log_probs, targets, *lengths, reduction="none", impl=impl)
        assert torch.equal(gradient(cast, log_probs), gradient(plain, log_probs))
    assert torch.equal(cast, plain)


# ---- errors

SHAPES = {
    "rank": (lambda a: a | {"log_probs": a["log_probs"][None]}, r"log_probs has shape \[1, 6, 2, 5\]"),
    "integer": (lambda a: a | {"log_probs": a["log_probs"].int()}, "log_probs is torch.int32"),
    "targets rank": (lambda a: a | {"targets": a["targets"][None]}, r"targets has shape \[1, 2, 3\]"),
    "targets rows": (lambda a: a | {"targets": a["targets"][:1]}, r"targets has shape \[1, 3\], .* \[2, U\]"),
    "targets dtype": (lambda a: a | {"targets": a["targets"].float()}, "targets is torch.float32"),
    "lengths dtype": (lambda a: a | {"input_lengths": a["input_lengths"].float()}, "input_lengths is torch.float32"),
    "lengths shape": (lambda a: a | {"target_lengths": [1]}, r"target_lengths has shape \[1\], .* \[2\]"),
    "lengths scalar": (lambda a: a | {"input_lengths": torch.tensor(3)}, r"input_lengths has shape \[\], .* \[2\]"),
    "blank": (lambda a: a | {"blank": 5}, "blank = 5, .* 5 classes"),
    "blank below 0": (lambda a: a | {"blank": -1}, "blank = -1"),
    "reduction": (lambda a: a | {"reduction": "max"}, "reduction = 'max'"),
    "impl": (lambda a: a | {"impl": "cuda"}, "impl = 'cuda'"),
    "too many labels": (lambda a: a | {"targets": torch.ones(7, dtype=torch.int64)}, "targets has 7 labels, .* 5"),
    "too few labels": (lambda a: a | {"targets": torch.ones(4, dtype=torch.int64)}, "targets has 4 labels, .* 5"),
}
WRONG_TYPES = {
    "targets": (lambda a: a | {"targets": a["targets"].tolist()}, TypeError, "targets is a list, .* a tensor"),
    "log_probs": (lambda a: a | {"log_probs": a["log_probs"].tolist()}, TypeError, "log_probs is a list, .* a tensor"),
    "floating blank": (lambda a: a | {"blank": 0.0}, ValueError, "blank = 0.0, but it must be an integer"),
    "no blank": (lambda a: a | {"blank": None}, ValueError, "blank = None, but it must be an integer"),
}
VALUES = {
    "blank": (("targets", (1, 0), 0), r"targets\[1, 0\] = 0, but that is the blank"),
    "past the classes": (("targets", (0, 2), 5), r"targets\[0, 2\] = 5, but it must be 0 to 4"),
    "negative": (("targets", (1, 1), -1), r"targets\[1, 1\] = -1"),
    "frames": (("input_lengths", 1, 7), r"input_lengths\[1\] = 7, but it must be 0 to 6"),
    "negative frames": (("input_lengths", 0, -1), r"input_lengths\[0\] = -1"),
    "labels": (("target_lengths", 0, 4), r"target_lengths\[0\] = 4, but it must be 0 to 3"),
    "negative labels": (("target_lengths", 1, -2), r"target_lengths\[1\] = -2"),
}


def valid(device="cpu"):
    logits, *_ = make(6, 2, 5, 3)
    return {
        "log_probs": logits.log_softmax(-1).to(device),
        "targets": torch.tensor([[1, 2, 3], [4, 4, 0]], device=device),
        "input_lengths": torch.tensor([6, 5], device=device),
        "target_lengths": torch.tensor([3, 2], device=device),
    }


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in SHAPES.items()])
def test_what_does_not_fit_is_named(change):
    change, message = change
    with pytest.raises(ValueError, match=message):
        ctc_loss(**change(valid()))


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in WRONG_TYPES.items()])
def test_a_wrong_type_is_named(change):
    change, error, message = change
    with pytest.raises(error, match=message):
        ctc_loss(**change(valid()))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in VALUES.items()])
def test_a_value_out_of_range_is_named(impl, change):
    (name, place, value), message = change
    arguments = valid()
    arguments[name][place] = value
    with pytest.raises(ValueError, match=message):
        ctc_loss(**arguments, impl=impl)
    if name == "targets":  # the first utterance uses all of its three labels
        arguments["targets"] = concatenated(arguments["targets"], arguments["target_lengths"])
        flat = f"targets\\[{3 * place[0] + place[1]}\\] = {value}, but"
        with pytest.raises(ValueError, match=flat):
            ctc_loss(**arguments, impl=impl)
        hidden, head = torch.randn(2, 6, 3), torch.randn(5, 3)
        rest = arguments["targets"], arguments["input_lengths"], arguments["target_lengths"]
        with pytest.raises(ValueError, match=flat):
            fused.functional.linear_ctc_loss(hidden, head, *rest, blank=0, impl=impl)


@pytest.mark.gpu
@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in VALUES.items()])
def test_a_value_out_of_range_on_cuda_is_named_later(change):
    (name, place, value), message = change
    arguments = valid("cuda")
    arguments["log_probs"].requires_grad_()
    arguments[name][place] = value
    row = place[0] if name == "targets" else place
    loss = ctc_loss(**arguments, reduction="none")
    assert loss.isnan().tolist() == [row == 0, row == 1]
    with pytest.raises(ValueError, match=message):
        loss.sum().backward()
    with pytest.raises(ValueError, match=message):
        ctc_loss(**arguments, validate=True)
    ctc_loss(**arguments)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=message):
        ctc_loss(**valid("cuda"))
    assert not checks._pending


class Calls(TorchDispatchMode):
    """What torch runs inside, with the arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((str(function), kwargs or {}))
        return function(*args, **kwargs or {})

    def named(self, name):
        return [kwargs for function, kwargs in self.calls if function.startswith(f"aten.{name}.")]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("wrong", "found"), [([], [6, 4]), ([3], [3, 7]), ([5, 1, 4], [1, 9])])
def test_the_check_on_cuda_finds_the_first_wrong_value_without_reading_one(wrong, found, dtype):
    values = torch.tensor([[8, 9, 6], [7, 5, 4]], dtype=dtype)
    places = torch.zeros(6, dtype=torch.bool)
    places[wrong] = True
    with Calls() as log:
        first = checks.first_wrong(values, places.view(2, 3))
    assert first.tolist() == found and first.dtype == torch.int64
    assert not log.named("_local_scalar_dense")
    with Calls() as log:  # the rule sees what it is about
        values.flatten()[torch.tensor(1)]
    assert log.named("_local_scalar_dense")


def test_lengths_and_labels_leave_the_cpu_without_a_wait():
    """The meta device is another one that tensors can be sent to."""
    arguments = valid()
    given = [arguments[name] for name in ("targets", "input_lengths", "target_lengths")]
    with Calls() as log:
        sent = check_targets(
            *given, frames=6, classes=5, blank=0, device=torch.device("meta"), validate=False
        )  # fmt: skip
    assert [x.device.type for x in sent[:3]] == ["meta"] * 3
    assert [call.get("non_blocking") for call in log.named("_to_copy")] == [True] * 3
    assert not log.named("_local_scalar_dense")[1:]  # one: whether something is wrong, on the CPU


def test_what_a_cuda_graph_sends_from_the_cpu_is_pinned_and_stays(monkeypatch):
    """While a graph is captured torch refuses to copy other memory, and each replay reads it again."""
    graphs, pinned, sent = [], [], []
    monkeypatch.setattr(dispatch, "_of_graphs", graphs)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.clone()) or pinned[-1])
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking: sent.append((x, non_blocking)) or x)
    dispatch.to_device(torch.arange(3), torch.device("cuda"))
    assert sent[0][0] is pinned[0] is graphs[0] and sent[0][1]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    dispatch.to_device(torch.arange(3), torch.device("cuda"))
    assert len(sent) == 2 and len(pinned) == len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", ["cpu", "cuda"])
def test_padded_targets_never_wait_for_the_gpu(lengths):
    arguments = valid("cuda")
    for name in ("targets", "input_lengths", "target_lengths"):
        arguments[name] = arguments[name].to(lengths)
    arguments["log_probs"].requires_grad_()
    ctc_loss(**arguments).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ctc_loss(**arguments).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_triton_needs_cuda_or_the_interpreter(monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="impl = 'triton', but the tensors are on cpu"):
        ctc_loss(**valid(), impl="triton")


@everywhere
@pytest.mark.parametrize("upstream_too", [False, True], ids=["", "through the upstream gradient"])
def test_a_second_derivative_raises(device, impl, upstream_too):
    arguments = valid(device)
    log_probs = arguments["log_probs"].requires_grad_()
    upstream = torch.ones(2, device=device, requires_grad=upstream_too)
    loss = ctc_loss(**arguments, reduction="none", impl=impl)
    found = torch.autograd.grad(loss, log_probs, upstream, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="ctc_loss has no second derivative"):
        found.sum().backward()


# ---- registration, compilation, use


@everywhere
def test_registration(device, impl):
    arguments = valid(device)
    log_probs = arguments.pop("log_probs").requires_grad_()
    lengths = arguments["input_lengths"], arguments["target_lengths"]
    labels = concatenated(arguments["targets"], lengths[1])
    torch.library.opcheck(torch.ops.soundwave.ctc_pad_targets.default, (labels, lengths[1]))
    rest = 0, True, impl, False
    torch.library.opcheck(torch.ops.soundwave.ctc_fwd.default, (log_probs, arguments["targets"], *lengths, *rest))
    rest = 0, False, impl, False
    inputs = log_probs.detach(), arguments["targets"], *lengths, *rest
    torch.library.opcheck(torch.ops.soundwave.ctc_fwd.default, inputs)
    nll, posteriors, columns = torch.ops.soundwave.ctc_fwd(log_probs.detach(), *inputs[1:5], True, impl, False)
    torch.library.opcheck(torch.ops.soundwave.ctc_bwd.default, (nll, nll, posteriors, columns, 5, FP32))


@everywhere
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("form", ["padded", "concatenated"])
def test_compiles_as_one_graph_with_tensor_lengths(device, impl, backend, form):
    def step(logits, targets, input_lengths, target_lengths):
        return ctc_loss(logits.log_softmax(-1), targets, input_lengths, target_lengths, zero_infinity=True, impl=impl)

    torch.compiler.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for seed, frames in enumerate((9, 9, 12)):
        logits, targets, *lengths = make(frames, 3, 7, 3, device=device, seed=seed)
        targets = targets if form == "padded" else concatenated(targets, lengths[1])
        logits.requires_grad_()
        found, wanted = (function(logits, targets, *lengths) for function in (compiled, step))
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(loss, logits) for loss in (found, wanted)))


@everywhere
def test_nothing_is_computed_for_a_gradient_that_nobody_wants(device, impl):
    arguments = valid(device)
    inputs = [arguments[name] for name in ("log_probs", "targets", "input_lengths", "target_lengths")]
    posteriors = torch.ops.soundwave.ctc_fwd(*inputs, 0, False, impl, False)[1]
    assert not posteriors.numel()
    arguments["log_probs"].requires_grad_()
    with torch.no_grad():
        assert not ctc_loss(**arguments, impl=impl).requires_grad


@everywhere
def test_the_lattice_alone(device, impl):
    """Posteriors of a frame add up to 1 within the length, and are 0 past it and without an alignment."""
    logits, targets, input_lengths, target_lengths = make(12, 4, 6, 4, kinds=2, device=device, full=True)
    input_lengths[1], input_lengths[2] = 7, 1
    args = logits.log_softmax(-1), targets, input_lengths, target_lengths
    nll, gamma = lattice(*args, blank=0, impl=impl, need_gamma=True)
    wanted = (torch.arange(12, device=device)[:, None] < input_lengths) & nll.isfinite()
    assert nll.isinf().tolist() == [False, False, True, False]
    torch.testing.assert_close(gamma.sum(2), wanted.float())
    bare, empty = lattice(*args, blank=0, impl=impl, need_gamma=False)
    assert torch.equal(bare, nll)
    assert not empty.numel()


@pytest.mark.parametrize("width", [0, 1, 6])
@pytest.mark.parametrize("kinds", [1, 7])
def test_the_definition_is_torchs(width, kinds):
    """The truth of these tests is torch's loss in fp64. The recursion with autograd gives the same."""
    logits, targets, *lengths = make(30, 5, 8, width, kinds=kinds, dtype=FP64)
    log_probs = logits.log_softmax(-1).requires_grad_()
    loss = eager.ctc_loss(log_probs, targets, *lengths, reduction="none")
    found = loss.detach(), gradient(loss, log_probs)
    torch.testing.assert_close(found, torchs(log_probs.detach(), targets, *lengths, 0))


def test_module_tells_its_settings():
    module = fused.CTCLoss(blank=3, zero_infinity=True)
    assert repr(module) == "CTCLoss(blank=3, reduction='mean', zero_infinity=True, impl='auto')"
    assert not module.state_dict()


@pytest.mark.parametrize(
    "module", [fused.CTCLoss, lambda **words: fused.LinearCTCLoss(0, **words), fused.LinearCrossEntropyLoss],
    ids=["CTCLoss", "LinearCTCLoss", "LinearCrossEntropyLoss"],
)  # fmt: skip
def test_modules_refuse_words_that_name_nothing(module):
    with pytest.raises(ValueError, match="reduction = 'avg', but it must be one of mean, sum, none"):
        module(reduction="avg")
    with pytest.raises(ValueError, match="impl = 'cuda', but it must be one of auto, triton, torch"):
        module(impl="cuda")
    module(reduction="sum", impl="triton")  # wherever it is made


@pytest.mark.parametrize("change", ["floating targets", "lengths in a column"])
def test_what_torchs_module_takes_beyond_ours_is_named(change):
    given = valid()
    if change == "floating targets":
        given["targets"] = given["targets"].to(FP32)
    for name in ("input_lengths", "target_lengths"):
        if change == "lengths in a column":
            given[name] = given[name][:, None]
    assert torch.nn.CTCLoss()(*given.values()).isfinite()
    with pytest.raises(ValueError, match="targets is torch|input_lengths is torch|input_lengths has shape"):
        fused.CTCLoss()(*given.values())


def test_wav2vec2_trains_with_it():
    """In a Hugging Face CTC model loss and gradients are those of its own loss, and it learns its labels."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=12,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16, 16, 16),
        conv_kernel=(10, 3, 3),
        conv_stride=(5, 4, 4),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        mask_time_prob=0.0,
        layerdrop=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
    )
    model = Wav2Vec2ForCTC(config).train()
    samples = torch.randn(3, 4000)
    attention_mask = (torch.arange(4000) < torch.tensor([4000, 3000, 2000])[:, None]).long()
    labels = torch.tensor([[1, 2, 2, 5], [3, 4, -100, -100], [7, 8, 9, -100]])

    ctc_of = fused.CTCLoss(blank=config.pad_token_id, zero_infinity=True)
    target_lengths = (labels >= 0).sum(-1)

    def step():
        logits = model(samples, attention_mask=attention_mask).logits
        input_lengths = model._get_feat_extract_output_lengths(attention_mask.sum(-1))
        log_probs = logits.log_softmax(-1, dtype=torch.float32).transpose(0, 1)
        return ctc_of(log_probs, labels, input_lengths, target_lengths)

    parameters = [p for p in model.parameters() if p.requires_grad]
    own = model(samples, attention_mask=attention_mask, labels=labels).loss
    torch.testing.assert_close(step(), own)
    ours, theirs = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None])
        for loss in (step(), own)
    )
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()

    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = step()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 * own


# ---- scores that are no log-probabilities


@everywhere
@pytest.mark.parametrize("shift", [0.0, 40.0, 800.0, -800.0])
def test_scores_of_any_size_and_sign_have_the_gradient_of_the_loss_as_given(device, impl, shift):
    """A constant added to every frame moves the loss, and changes no posterior."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 3, 5, generator=generator, dtype=FP64).mul(3)
    targets, lengths, sizes = torch.tensor([[1, 2], [3, 3], [4, 0]]), torch.tensor([6, 5, 2]), torch.tensor([2, 2, 1])

    def run(x):
        leaf = x.to(device, copy=True).requires_grad_()
        loss = ctc_loss(leaf, targets.to(device), lengths, sizes, reduction="none", impl=impl)
        loss.sum().backward()
        return loss.detach(), leaf.grad

    (loss, gradient), (moved, found) = run(scores), run(scores + shift)
    torch.testing.assert_close(moved, loss - shift * lengths.to(loss), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-9)
    leaf = scores.clone().requires_grad_()
    eager.ctc_loss(leaf, targets, lengths, sizes, reduction="none").sum().backward()
    torch.testing.assert_close(gradient.cpu(), leaf.grad, rtol=1e-9, atol=1e-9)


@everywhere
def test_what_cannot_be_aligned_has_no_gradient_whatever_its_loss_is_multiplied_with(device, impl):
    """If the loss is squared or weighted by its probability, the upstream gradient of a loss of inf is inf or NaN."""
    scores = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for weigh in (lambda loss: loss**2, lambda loss: (1 - (-loss).exp()) ** 2 * loss):
        leaf = scores.to(device, copy=True).requires_grad_()
        targets = torch.tensor([[1, 2], [3, 3]], device=device)
        loss = ctc_loss(leaf, targets, torch.tensor([5, 2]), torch.tensor([2, 2]), reduction="none", impl=impl)
        assert loss[1] == torch.inf
        weigh(loss).sum().backward()
        assert not leaf.grad[:, 1].any() and leaf.grad[:, 0].isfinite().all() and leaf.grad[:, 0].any()


@pytest.mark.parametrize("lengths", [None, "77", ["a", "b"], [[7], [7, 1]], [2**70, 1]], ids=str)
def test_lengths_that_are_no_integers_are_named(lengths):
    log_probs, targets = torch.zeros(7, 2, 5), torch.ones(2, 1, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"target_lengths = .*, but it must be a tensor or a sequence of integers"):
        ctc_loss(log_probs, targets, [7, 7], lengths)
