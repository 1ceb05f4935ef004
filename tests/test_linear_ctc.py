"""CTC over a vocabulary without its logits: accuracy against plain operations in fp64, limits on work and memory."""

import json
import sys

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from soundwave import eager, fused
from soundwave.fused.functional import linear_ctc_loss, linear_ctc_path
from soundwave.kernels import active_columns, label_rows, linear_ctc, vocab_rows
from soundwave.kernels import linear_ctc_path as linear_ctc_path_module
from soundwave.kernels.linear_ctc_path import Head
from tests import processes
from tests.accuracy import assert_as_accurate, assert_rms, relative
from tests.implementations import everywhere, not_interpreted, skip_unless_runnable

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
EVERY_DRAW = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
GRADIENTS = ("hidden", "weight", "blank_weight", "blank_bias")


def make(batch, frames, rows, width, labels, *, blank=0, kinds=None, sharpness=1.0, seed=0, full=False):
    """The arguments of `linear_ctc_loss` in fp64; `blank` = `rows` is the extra row. Few `kinds` of labels repeat."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=FP64)

    kinds = min(kinds or rows, rows)
    targets = torch.randint(kinds, (batch, labels), generator=generator)
    if blank < rows:
        targets = (targets % max(rows - 1, 1)) + (targets % max(rows - 1, 1) >= blank)
    input_lengths = torch.randint(1, frames + 1, (batch,), generator=generator)
    target_lengths = torch.randint(labels + 1, (batch,), generator=generator)
    if full:
        input_lengths[:], target_lengths[:] = frames, labels
    targets = targets.masked_fill(torch.arange(labels) >= target_lengths[:, None], -100)
    case = {
        "hidden": randn(batch, frames, width),
        "weight": randn(rows, width) * sharpness * width**-0.5,
        "targets": targets,
        "input_lengths": input_lengths,
        "target_lengths": target_lengths,
        "blank": blank,
    }
    if blank == rows:
        case |= {"blank_weight": randn(width) * width**-0.5, "blank_bias": torch.tensor(float(rows), dtype=FP64).log()}
    return case


def to(case, dtype, device="cpu", trained=GRADIENTS, blank_dtype=None):
    """The case with new leaves in `dtype`; those of the extra blank stay fp32 if that is a half type."""
    kinds = dict.fromkeys(GRADIENTS, dtype) | dict.fromkeys(GRADIENTS[2:], torch.promote_types(dtype, FP32))
    out = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in case.items()}
    for name in GRADIENTS:
        if name in out:
            out[name] = out[name].detach().to(kinds[name], copy=True).requires_grad_(name in trained)
    return out


def run(function, case, upstream=None, **settings):
    """(output, gradients by name) of the loss times `upstream`."""
    out = function(**case, **settings)
    loss = out.loss if upstream is None else out.loss * upstream.to(out.loss)
    loss.sum().backward()
    out = out._replace(loss=out.loss.detach())
    return out, {name: case[name].grad for name in GRADIENTS if name in case and case[name].requires_grad}


def check(case, dtype, *, device="cpu", impl="torch", reduction="none", trained=GRADIENTS, exact=None, seed=0):
    """Asserts the accuracy of loss and gradients; returns for each (our error, eager's) over the norm of the truth."""
    rounded = to(case, dtype, device)  # the truth is computed from the rounded inputs
    upstream = None
    if reduction == "none":
        generator = torch.Generator().manual_seed(seed)
        upstream = torch.randn(case["hidden"].shape[0], generator=generator, dtype=FP64).to(device)
    common = {"reduction": reduction, "zero_infinity": True}
    true_out, truth = run(eager.linear_ctc_loss, to(rounded, FP64, device, trained), upstream, **common)
    eager_out, theirs = run(eager.linear_ctc_loss, to(rounded, dtype, device, trained), upstream, **common)
    out, ours = run(linear_ctc_loss, to(rounded, dtype, device, trained), upstream, exact=exact, impl=impl, **common)
    assert ours.keys() == truth.keys()
    inside = torch.promote_types(dtype, FP32)
    assert out.loss.dtype == out.path_log_prob.dtype == inside
    pairs = {"loss": assert_as_accurate(out.loss, eager_out.loss, true_out.loss, dtype, "loss")}
    assert_as_accurate(out.path_log_prob, eager_out.path_log_prob, true_out.path_log_prob, dtype, "path_log_prob")
    for name in truth:
        assert ours[name].dtype == rounded[name].dtype and ours[name].shape == rounded[name].shape
        pairs[name] = assert_as_accurate(ours[name], theirs[name], truth[name], dtype, name)
    norms = {"loss": true_out.loss} | truth
    return {name: relative(pair, norms[name]) for name, pair in pairs.items()}


# ---- accuracy


def draws(frames, rows, labels):
    return {
        "batch": st.integers(1, 5),
        "frames": st.integers(1, frames),
        "rows": st.sampled_from([2, 3, 7, 63, 100, 1000, 5000]).filter(lambda n: n <= rows),
        "width": st.sampled_from([1, 7, 16]),
        "labels": st.integers(0, labels),
        "kinds": st.sampled_from([1, 2, None]),
        "place": st.sampled_from(["first", "middle", "last", "extra"]),
        "sharpness": st.sampled_from([0.1, 1.0, 10.0]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "trained": st.sampled_from([GRADIENTS, ("hidden", *GRADIENTS[2:]), ("weight",)]),
        "seed": st.integers(0, 10**6),
    }


ONE_FRAME = {"batch": 2, "frames": 1, "rows": 2, "width": 7, "labels": 1, "kinds": None, "place": "first"}
ONE_FRAME |= {"sharpness": 1.0, "reduction": "mean", "trained": GRADIENTS, "seed": 0}
THE_LARGEST = ONE_FRAME | {
    "batch": 5,
    "frames": 300,
    "rows": 5000,
    "labels": 120,
    "place": "extra",
    "reduction": "none",
}


def check_draw(dtype, impl, batch, frames, rows, width, labels, kinds, place, sharpness, reduction, trained, seed):
    blank = {"first": 0, "middle": rows // 2, "last": rows - 1, "extra": rows}[place]
    case = make(batch, frames, rows, width, labels, blank=blank, kinds=kinds, sharpness=sharpness, seed=seed)
    check(case, dtype, impl=impl, reduction=reduction, trained=trained, seed=seed)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_as_accurate_as_eager(dtype):
    @EVERY_DRAW
    @given(**draws(300, 5000, 120))
    @example(**ONE_FRAME)
    @example(**THE_LARGEST)
    def every_draw(**draw):
        check_draw(dtype, "torch", **draw)

    every_draw()


@settings(EVERY_DRAW, max_examples=12)
@given(**draws(12, 63, 7))
def test_interpreter_is_as_accurate_as_eager(**draw):
    check_draw(FP32, "triton", **draw)


@not_interpreted
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rms_error_is_at_most_eagers(device, impl, dtype, reduction):
    cases = [make(5, 20, 300, 16, 7, blank=blank, seed=seed) for seed in range(6) for blank in (0, 300)]
    errors = [check(case, dtype, device=device, impl=impl, reduction=reduction) for case in cases]
    for name in GRADIENTS[:2] if reduction == "mean" else ("loss", *GRADIENTS):  # a mean is one number a draw
        assert_rms([found[name] for found in errors if name in found], torch.finfo(FP32).eps, name)


@not_interpreted
@pytest.mark.parametrize("probability", [0.46, 0.9993, 0.999997])
@pytest.mark.parametrize("place", ["row", "extra"])
def test_a_blank_that_is_sure(device, impl, probability, place):
    rows = 5000
    case = make(2, 150, rows, 64, 9, blank=rows if place == "extra" else 0, seed=3, full=True)
    if place == "extra":
        case["blank_weight"] *= 0.1
        logits = case["hidden"] @ case["weight"].t()
        wanted = logits.logsumexp(-1).mean() + torch.tensor(probability / (1 - probability)).log()
        case["blank_bias"] = wanted - (case["hidden"] @ case["blank_weight"]).mean()
    else:  # move each frame along the blank's row until the probability is as wanted
        weight = case["weight"]
        weight[0] *= 8 / weight[0].norm()
        logits = case["hidden"] @ weight.t()
        wanted = logits[..., 1:].logsumexp(-1) + torch.tensor(probability / (1 - probability), dtype=FP64).log()
        case["hidden"] += ((wanted - logits[..., 0]) / weight[0].square().sum())[..., None] * weight[0]
        found = (case["hidden"] @ weight.t()).softmax(-1)[..., 0]
        assert 1 / 3 < float((1 - found).mean()) / (1 - probability) < 3
    check(case, BF16, device=device, impl=impl, trained=("hidden", *GRADIENTS[2:]))


@not_interpreted
@pytest.mark.parametrize("loss_scale", [1.0, 2.0**16])
def test_probabilities_that_fp16_cannot_hold(device, impl, loss_scale):
    """Silence: the model is sure of the blank, and 20 000 columns, whose gradient it is, share 0.1 to 1e-5."""
    pairs, rows = [], 20000
    for seed in range(5):
        case = make(2, 10, rows, 64, 3, blank=rows, seed=seed, full=True)
        common = torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=FP64)
        case["weight"] += common / common.norm()
        case["target_lengths"] *= 0
        case["hidden"] *= 0.3
        case["blank_weight"] *= 0.0
        case["blank_bias"] = torch.tensor(rows * 10.0 ** (seed + 1), dtype=FP64).log()
        given, upstream = to(case, FP16, device), torch.tensor(loss_scale)
        (_, truth), (_, theirs), (_, ours) = (
            run(function, to(given, dtype, device, ("hidden",)), upstream, zero_infinity=True, **others)
            for function, dtype, others in (
                (eager.linear_ctc_loss, FP64, {}),
                (eager.linear_ctc_loss, FP16, {}),
                (linear_ctc_loss, FP16, {"exact": True, "impl": impl}),
            )
        )
        gradients = (ours["hidden"], theirs["hidden"], truth["hidden"])
        pairs.append(relative(assert_as_accurate(*gradients, FP16, f"hidden, seed {seed}"), truth["hidden"]))
    assert_rms(pairs, 0.0, "hidden")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("together", [2, 3, 9])
def test_labels_of_several_utterances_in_one_product(monkeypatch, together, dtype):
    """As on a GPU: groups that divide the batch and that do not, utterances shorter than their group, junk behind."""
    case = make(5, 13, 40, 8, 4, blank=40, seed=3)
    case["input_lengths"] = torch.tensor([13, 0, 7, 13, 11])
    case["target_lengths"] = torch.minimum(case["target_lengths"], torch.tensor([4, 0, 2, 3, 1]))
    case["hidden"].masked_fill_(~eager.length_mask(case["input_lengths"], 13)[..., None], torch.nan)

    def result():
        given = to(case, dtype, "cpu", GRADIENTS)
        return run(linear_ctc_loss, given, zero_infinity=True, exact=True)

    one, gradients = result()
    monkeypatch.setattr(linear_ctc_path_module, "_together", lambda _: together)
    several, found = result()
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(several.loss, one.loss, **close)
    assert torch.equal(several.path, one.path)
    for name in GRADIENTS:
        rounding = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6} if dtype == BF16 else close
        torch.testing.assert_close(found[name], gradients[name], **rounding)


def test_the_difference_of_a_label_that_is_almost_certain():
    """1 - 1e-7 is 1 in fp32, but the sum of all other columns still gives the difference exactly."""
    p = torch.tensor([[1 - 3e-7, 1e-7, 5e-8], [0.2, 0.3, 0.1]], dtype=FP64)
    gamma = torch.tensor([[1 - 2e-7, 2e-7, 0.0], [0.1, 0.6, 0.3]], dtype=FP64)
    off = 1 - p.sum(1)
    log_probs = torch.stack([p[0].log(), p[1].log()]).float()
    log_probs[0, 0] = float(torch.tensor(-3e-7, dtype=FP64))  # as log1p gives it
    stats = vocab_rows.RowStats(*[None] * 3, off.float())
    found = label_rows.label_gradient(log_probs, gamma.float(), stats)
    torch.testing.assert_close(found.double(), p - gamma, rtol=1e-5, atol=1e-13)


@everywhere
@pytest.mark.parametrize("blank", [0, 40])
def test_fp64_gives_fp64(device, impl, blank):
    case = make(2, 9, 40, 5, 3, blank=blank)
    ours = run(linear_ctc_loss, to(case, FP64, device), impl=impl, zero_infinity=True)
    theirs = run(eager.linear_ctc_loss, to(case, FP64, device), zero_infinity=True)
    assert ours[0].loss.dtype == ours[0].path_log_prob.dtype == FP64
    torch.testing.assert_close(ours[0].loss, theirs[0].loss)
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient)


# ---- skipping columns


def peaky(frames=200, rows=4000, width=256, labels=7):
    """Each frame has one label, or blank, that is most probable, and 20 other labels that are possible."""
    case = make(2, frames, rows, width, labels, blank=rows, seed=5, full=True)
    generator = torch.Generator().manual_seed(0)
    weight = case["weight"]
    planted = torch.randint(rows, (2, frames), generator=generator)
    planted[:, torch.linspace(1, frames - 2, labels).long()] = case["targets"]
    others = torch.randint(60, (2, frames, 20), generator=generator)
    strengths = 6 + 2 * torch.rand(2, frames, 20, 1, generator=generator, dtype=FP64)
    case["hidden"] = 14 * weight[planted] + (weight[others] * strengths).sum(2)
    case["blank_bias"] = torch.tensor(14.0, dtype=FP64)
    return case


@everywhere
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["float32", "bfloat16", "float16"])
def test_the_error_of_skipping_is_within_its_certificate(device, impl, dtype):
    skip_unless_runnable(device, impl, dtype)
    case = peaky(frames=40 if impl == "triton" and device == "cpu" else 200)
    trained = ("hidden", "blank_weight")
    out, skipping = run(linear_ctc_loss, to(case, dtype, device, trained), reduction="sum", impl=impl, exact=False)
    whole, exact = run(linear_ctc_loss, to(case, dtype, device, trained), reduction="sum", impl=impl, exact=True)
    most = active_columns.MOST_ACTIVE_TRITON if impl == "triton" else active_columns.MOST_ACTIVE
    assert 0 < out.active_share < 1 / most and whole.active_share == 1 and whole.error_bound == 0
    error = (skipping["hidden"] - exact["hidden"]).float().norm() / skipping["hidden"].float().norm()
    assert 0 < error <= out.error_bound + torch.finfo(dtype).eps
    assert torch.equal(out.loss, whole.loss) and torch.equal(out.path, whole.path)
    assert torch.equal(skipping["blank_weight"], exact["blank_weight"])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_skipping_changes_nothing_else(dtype):
    """For every draw loss and path are bitwise equal, and the gradient of hidden is within the bound."""
    shares = []

    @EVERY_DRAW
    @given(**{name: value for name, value in draws(300, 5000, 120).items() if name not in ("reduction", "trained")})
    @example(batch=2, frames=40, rows=5000, width=16, labels=5, kinds=None, place="extra", sharpness=10.0, seed=0)
    def every_draw(batch, frames, rows, width, labels, kinds, place, sharpness, seed):
        blank = {"first": 0, "middle": rows // 2, "last": rows - 1, "extra": rows}[place]
        case = make(batch, frames, rows, width, labels, blank=blank, kinds=kinds, sharpness=sharpness, seed=seed)
        common = {"reduction": "mean", "zero_infinity": True}
        out, skipping = run(linear_ctc_loss, to(case, dtype, trained=("hidden",)), exact=False, **common)
        whole, exact = run(linear_ctc_loss, to(case, dtype, trained=("hidden",)), exact=True, **common)
        assert torch.equal(out.loss, whole.loss) and torch.equal(out.path, whole.path)
        norm = skipping["hidden"].double().norm()
        error = (skipping["hidden"].double() - exact["hidden"].double()).norm()
        assert error <= (float(out.error_bound) + torch.finfo(dtype).eps) * norm
        shares.append(float(out.active_share))

    every_draw()
    assert any(0 < share < 1 / active_columns.MOST_ACTIVE for share in shares)


def test_without_a_reduction_the_certificate_holds_however_the_losses_are_weighed():
    """A sure utterance with an unsure one: what is small relative to both together is large for the first alone."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4000, 32, generator=generator)
    weight[0] = 0
    hidden = torch.zeros(2, 60, 32)
    hidden[0] = weight[7]
    hidden[1] = 0.2 * torch.randn(32, generator=generator) + 0.6 * weight[torch.arange(60) % 3 + 11]
    common = {"targets": torch.tensor([[7], [9]]), "input_lengths": [60, 60], "target_lengths": [1, 1], "blank": 0}
    for upstream in ([1.0, 0.0], [0.0, 1.0], [1.0, 1e-3]):
        gradients = []
        for exact in (True, False):
            leaf = hidden.clone().requires_grad_()
            out = linear_ctc_loss(leaf, weight, **common, reduction="none", exact=exact)
            (out.loss * torch.tensor(upstream)).sum().backward()
            gradients.append(leaf.grad)
        whole, found = gradients
        assert (found - whole).norm() <= (float(out.error_bound) + 1e-5) * whole.norm()
        assert (found - whole).norm() <= 0.05 * whole.norm()  # where one bound holds for all it is nearly 1


def test_flat_rows_skip_nothing():
    case = make(2, 50, 3000, 16, 5, sharpness=0.1)
    out, _ = run(linear_ctc_loss, to(case, FP32), exact=False)
    assert out.active_share == 1 and out.error_bound == 0


@pytest.mark.parametrize(("dtype", "large"), [(FP64, True), (FP32, True), (BF16, True), (BF16, False), (FP16, True)])
def test_by_default_columns_are_skipped_in_bfloat16_and_large_heads_only(monkeypatch, dtype, large):
    monkeypatch.setattr(active_columns, "LEAST_COLUMNS", 4000 if large else 4001)
    case = peaky(frames=60)
    out, found = run(linear_ctc_loss, to(case, dtype, trained=("hidden",)))
    skips = large and dtype == BF16
    assert (out.active_share < 1) == skips and (out.error_bound > 0) == skips
    _, expected = run(linear_ctc_loss, to(case, dtype, trained=("hidden",)), exact=not skips)
    assert torch.equal(found["hidden"], expected["hidden"])


def test_by_default_products_under_autocast_decide():
    case = peaky(frames=60)
    case["weight"] = torch.cat([case["weight"], torch.zeros(active_columns.LEAST_COLUMNS, 256, dtype=FP64)])
    case["blank"] = len(case["weight"])
    for enabled in (False, True):
        with torch.autocast("cpu", enabled=enabled):
            out = linear_ctc_loss(**to(case, FP32, trained=("hidden",)))
        assert (out.active_share < 1) == enabled


def test_a_trained_head_gets_its_whole_gradient():
    """Skipping affects the gradient of hidden only: rows of the head that are rarely probable still get theirs."""
    case = peaky()
    _, skipping = run(linear_ctc_loss, to(case, FP32), reduction="mean", exact=False)
    _, exact = run(linear_ctc_loss, to(case, FP32), reduction="mean", exact=True)
    assert not torch.equal(skipping["hidden"], exact["hidden"])
    assert torch.equal(skipping["weight"], exact["weight"])


# ---- paths


@everywhere
@pytest.mark.parametrize("blank", [0, 30, 63])
def test_path_is_the_argmax(device, impl, blank):
    case = to(make(3, 17, 63, 8, 4, blank=blank), FP64, device)
    theirs = eager.linear_ctc_loss(**case)
    out = linear_ctc_loss(**case, impl=impl)
    head = {name: case[name] for name in ("hidden", "weight", "blank", "blank_weight", "blank_bias") if name in case}
    alone = linear_ctc_path(lengths=case["input_lengths"], **head, impl=impl)
    no_targets = linear_ctc_loss(**case | {"targets": None, "target_lengths": None}, impl=impl)
    assert no_targets.loss is None
    for path, log_prob in (out[1:3], alone, no_targets[1:3]):
        assert path.dtype == torch.int64 and not log_prob.requires_grad
        assert torch.equal(path, theirs.path)
        torch.testing.assert_close(log_prob, theirs.path_log_prob)


@everywhere
@pytest.mark.parametrize("blank", [0, 2, 5])
def test_ties_go_to_the_lowest_id(device, impl, blank):
    """Rows 1, 3 and 4 are equal, so labels and other columns have equal logits."""
    weight = torch.tensor([[0.0], [1.0], [0.0], [1.0], [1.0]])
    extra = {"blank_weight": torch.tensor([1.0])} if blank == 5 else {}
    hidden = torch.ones(3, 4, 1)
    targets = torch.tensor([[3], [4], [1]])
    lengths = torch.tensor([4, 3, 2]), torch.tensor([1, 1, 1])
    case = {"hidden": hidden, "weight": weight, **extra}
    case = {name: x.to(device) for name, x in case.items()}
    case |= {"targets": targets, "input_lengths": lengths[0], "target_lengths": lengths[1]}
    out = linear_ctc_loss(**case, blank=blank, impl=impl)
    expected = [[1, 1, 1, 1], [1, 1, 1, -1], [1, 1, -1, -1]]
    assert out.path.tolist() == expected
    negative = linear_ctc_path(-case["hidden"], *[weight.to(device)], lengths[0], blank=0, impl=impl)[0]
    assert negative.tolist() == [[0, 0, 0, 0], [0, 0, 0, -1], [0, 0, -1, -1]]


# ---- losses and reductions


@everywhere
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=["float16", "bfloat16", "float32"])
def test_what_cannot_be_aligned(device, impl, reduction, zero_infinity, dtype):
    """Too short for its repeats, one frame for two labels, no frame at all: inf or 0, gradient 0, never NaN."""
    case = make(4, 7, 20, 8, 3, blank=20, full=True)
    case["targets"] = torch.tensor([[1, 1, 1], [2, 3, 0], [4, 5, 6], [7, 8, 9]])
    case["target_lengths"] = torch.tensor([3, 2, 1, 3])
    case["input_lengths"] = torch.tensor([4, 1, 0, 7])
    ours, theirs = to(case, dtype, device), to(case, FP32, device)
    out, gradients = run(linear_ctc_loss, ours, reduction=reduction, zero_infinity=zero_infinity, impl=impl)
    expected = eager.linear_ctc_loss(**theirs, reduction=reduction, zero_infinity=zero_infinity).loss
    torch.testing.assert_close(out.loss, expected, rtol=0.05, atol=0.05)
    assert all(x.isfinite().all() for x in gradients.values())
    assert not gradients["hidden"][:3].any() and gradients["hidden"][3].any()


@everywhere
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_targets_and_frames(device, impl, reduction):
    """No frame and no label: 0. No label: the blank's. All lengths 0, no column of targets, no frame, no utterance."""
    case = to(make(3, 5, 20, 8, 2, blank=20), FP32, device)
    case |= {"target_lengths": torch.tensor([0, 0, 2]), "input_lengths": torch.tensor([0, 5, 4])}
    case["targets"] = torch.tensor([[-100, -100], [-100, -100], [1, 2]], device=device)
    theirs = eager.linear_ctc_loss(**case, reduction=reduction)
    out, gradients = run(linear_ctc_loss, case, reduction=reduction, impl=impl)
    torch.testing.assert_close(out.loss, theirs.loss)
    assert not gradients["hidden"][0].any() and gradients["hidden"][1].any()
    for batch, frames in ((3, 5), (3, 0), (0, 5), (0, 0)):
        empty = make(max(batch, 1), max(frames, 1), 20, 8, 0, blank=20)
        empty |= {"hidden": empty["hidden"][:batch, :frames], "targets": empty["targets"][:batch]}
        lengths = torch.zeros(batch, dtype=torch.int64)
        empty |= {"target_lengths": lengths, "input_lengths": lengths}
        empty = to(empty, FP32, device)
        out, gradients = run(linear_ctc_loss, empty, reduction=reduction, impl=impl)
        assert out.path.shape == (batch, frames) and not out.loss.any()
        assert out.loss.shape == ((batch,) if reduction == "none" else ())
        assert all(not x.any() for x in gradients.values())


@everywhere
def test_every_form_of_the_arguments_gives_the_same(device, impl):
    """Concatenated and int32 targets, lengths as lists and on any device, views of any strides."""
    case = make(3, 9, 21, 6, 4, blank=21, seed=1)
    one, gradients = run(linear_ctc_loss, to(case, FP32, device), reduction="sum", impl=impl)
    valid = torch.arange(4) < case["target_lengths"][:, None]
    changes = {
        "concatenated": {"targets": case["targets"][valid]},
        "int32": {name: case[name].int() for name in ("targets", "input_lengths", "target_lengths")},
        "lists": {name: case[name].tolist() for name in ("input_lengths", "target_lengths")},
        "targets on the CPU": {"targets": case["targets"].cpu()},
        "lengths on the device": {name: case[name].to(device) for name in ("input_lengths", "target_lengths")},
    }
    for change in changes.values():
        again, found = run(linear_ctc_loss, to(case, FP32, device) | change, reduction="sum", impl=impl)
        assert torch.equal(again.path, one.path)
        torch.testing.assert_close(again.loss, one.loss)
        for name in GRADIENTS:
            torch.testing.assert_close(found[name], gradients[name])
    leaf = to(case, FP32, device)
    views = leaf | {
        "hidden": leaf["hidden"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
        "weight": leaf["weight"].detach().t().contiguous().t().requires_grad_(),
        "blank_weight": leaf["blank_weight"].detach().repeat(2, 1).t().contiguous().t()[0].requires_grad_(),
    }
    assert not views["hidden"].is_contiguous() and not views["weight"].is_contiguous()
    again, found = run(linear_ctc_loss, views, reduction="sum", impl=impl)
    torch.testing.assert_close(again.loss, one.loss)
    for name in GRADIENTS:
        torch.testing.assert_close(found[name], gradients[name])


@everywhere
@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_frames_past_a_length_may_hold_anything(device, impl, junk):
    case = to(make(3, 9, 21, 6, 2, seed=1), FP32, device)
    case["input_lengths"] = torch.tensor([9, 4, 1])
    one, gradients = run(linear_ctc_loss, case, impl=impl)
    past = torch.arange(9, device=device) >= case["input_lengths"].to(device)[:, None]
    dirty = to(case, FP32, device)
    dirty["hidden"] = case["hidden"].detach().masked_fill(past[..., None], junk).requires_grad_()
    again, found = run(linear_ctc_loss, dirty, impl=impl)
    assert torch.equal(again.loss, one.loss) and torch.equal(again.path, one.path)
    assert all(torch.equal(found[name], gradients[name]) for name in found)
    assert not found["hidden"][past].any()


@everywhere
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("exact", [False, True])
def test_nan_and_inf_in_hidden_are_that_utterances_own(device, impl, value, exact):
    case = to(make(3, 5, 63, 6, 2, blank=63, full=True), FP32, device, ("hidden", "blank_bias"))
    clean, gradients = run(linear_ctc_loss, case, reduction="none", exact=exact, impl=impl)
    dirty = to(case, FP32, device, ("hidden",))
    with torch.no_grad():
        dirty["hidden"][1, 4, 0] = value
    out, found = run(linear_ctc_loss, dirty, reduction="none", exact=exact, impl=impl)
    assert out.loss[1].isnan() and torch.equal(out.loss[::2], clean.loss[::2])
    assert found["hidden"][1].isnan().any() and torch.equal(found["hidden"][::2], gradients["hidden"][::2])
    assert ((out.path >= 0) & (out.path <= 63)).all()


@not_interpreted
def test_autocast_is_as_eagers(device, impl):
    """fp32 states and a bf16 head: the product in bf16, the rest in fp32, gradients in the dtypes of their tensors."""
    case = to(make(3, 20, 300, 16, 5, blank=300), FP32, device)
    case["weight"] = case["weight"].detach().to(BF16).requires_grad_()
    truth = to({name: x for name, x in case.items()}, FP64, device)
    with torch.autocast(device, dtype=BF16):
        theirs = run(eager.linear_ctc_loss, {n: _leaf(x) for n, x in case.items()}, reduction="sum")
        ours = run(linear_ctc_loss, {n: _leaf(x) for n, x in case.items()}, reduction="sum", exact=True, impl=impl)
    exact = run(eager.linear_ctc_loss, truth, reduction="sum")
    assert_as_accurate(ours[0].loss, theirs[0].loss, exact[0].loss, FP32, "loss")
    for name in GRADIENTS:
        assert ours[1][name].dtype == case[name].dtype
        assert_as_accurate(ours[1][name], theirs[1][name], exact[1][name], BF16, name)


def _leaf(x):
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


# ---- what is computed, and how much of it


@everywhere
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("blank_weight",), ("blank_bias",), ()], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_only_the_gradients_that_are_wanted(device, impl, trained, reduction):
    case = to(make(2, 9, 30, 6, 2, blank=30), FP32, device, trained)
    out = linear_ctc_loss(**case, reduction=reduction, impl=impl)
    assert out.loss.requires_grad == bool(trained)
    assert not out.path_log_prob.requires_grad and not out.active_share.requires_grad
    if trained:
        out.loss.sum().backward()
    assert {name for name in GRADIENTS if case[name].grad is not None} == set(trained)


class Allocations(TorchDispatchMode):
    """Records the products, and the number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.itemsize)
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products.append(tuple(args[-1].shape))
        return out


@pytest.mark.parametrize("need", [(True, False, True), (True, True, True), (False, False, False)], ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_no_tensor_of_all_rows_and_columns(need, exact):
    case = make(4, 250, 20000, 8, 7, blank=20000, full=True)
    case = to(case, FP32, trained=())
    head = Head(case["weight"], 20000, case["blank_weight"], case["blank_bias"])
    with Allocations() as seen:
        settings = linear_ctc.Settings(FP32, "torch", "sum", False, exact, linear_ctc.Need(*need), False)
        linear_ctc._run(case["hidden"], head, case["targets"], case["input_lengths"], case["target_lengths"], settings)
    assert seen.largest <= vocab_rows.CHUNK_ROWS_CPU * 20000
    # Without a gradient the head is multiplied by the rows only, and never by probabilities.
    wide = [shape for shape in seen.products if 8 in shape and max(shape) > 100]
    assert any(need) or all(shape[0] == 8 for shape in wide)


MEMORY = """
import json, sys, torch
from soundwave import eager
from soundwave.fused.functional import linear_ctc_loss
which, dtype = sys.argv[1], getattr(torch, sys.argv[2])
torch.manual_seed(0)
hidden = torch.randn(4, 250, 64).to(dtype).requires_grad_()
weight = torch.empty(128256, 64, dtype=dtype).normal_().div_(8)
targets = torch.randint(1, 128256, (4, 12))
lengths = torch.full((4,), 250), torch.full((4,), 12)
first = hidden[:1, :4], weight[:100], targets[:1, :2] % 99 + 1, torch.tensor([4]), torch.tensor([2])
for function in (linear_ctc_loss, eager.linear_ctc_loss):  # so that one-time allocations are not counted
    function(*first, blank=0).loss.backward()
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()  # not ru_maxrss, which starts at the value of the parent process
function = eager.linear_ctc_loss if which == "eager" else linear_ctc_loss
function(hidden, weight, targets, *lengths, blank=0).loss.backward()
print(json.dumps(peak() - before))
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_is_an_eighth_of_eagers(dtype, tmp_path):
    added, program = {}, tmp_path / "memory.py"
    program.write_text(MEMORY)
    for which in ("eager", "fused"):
        done = processes.run([sys.executable, program, which, dtype], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        added[which] = json.loads(done.stdout)
    print(f"\nadded at V = 128256 in {dtype}: {added['eager'] >> 10} MB by eager, {added['fused'] >> 10} MB by fused")
    assert added["eager"] > 500 << 10  # 1 000 rows of 128 256 columns in float32
    assert added["fused"] <= added["eager"] / 8


@everywhere
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bitwise_equal_over_20_runs(device, impl, dtype, reduction):
    interpreted = device == "cpu" and impl == "triton"
    case = make(3, 6 if interpreted else 150, 33 if interpreted else 2000, 16, 9, kinds=3, blank=5)
    case["targets"] = torch.where(case["targets"] >= 0, case["targets"] % 3, -100)
    case |= {"weight": case["weight"] * 3}
    first = None
    for _ in range(3 if interpreted else 20):
        out, gradients = run(linear_ctc_loss, to(case, dtype, device), reduction=reduction, impl=impl, exact=False)
        values = [*out, *gradients.values()]
        first = first or values
        assert all(torch.equal(a, b) for a, b in zip(first, values, strict=True))


# ---- bad input


def small(device="cpu"):
    return to(make(2, 7, 20, 6, 3, blank=20, full=True), FP32, device)


BAD = {
    "reduction": (lambda c: {"reduction": "average"}, "reduction = 'average'"),
    "impl": (lambda c: {"impl": "cuda"}, "impl = 'cuda'"),
    "blank without its row": (lambda c: {"blank_weight": None, "blank_bias": None}, "blank = 20"),
    "blank past the head": (lambda c: {"blank": 21}, "blank = 21"),
    "negative blank": (lambda c: {"blank": -1}, "blank = -1"),
    "bias for a row of the head": (lambda c: {"blank": 0, "blank_weight": None}, "blank_bias"),
    "hidden of rank 1": (lambda c: {"hidden": c["hidden"][0, 0]}, r"hidden has shape \[6\]"),
    "packed hidden of other rows": (
        lambda c: {"hidden": c["hidden"][0]},
        r"hidden has 7 packed rows, but lengths = \[7, 7\]: they must add up",
    ),
    "integer hidden": (lambda c: {"hidden": c["hidden"].detach().long()}, "hidden is torch.int64"),
    "quantized weight": (lambda c: {"weight": c["weight"].detach().to(torch.uint8)}, "weight is torch.uint8"),
    "another width": (lambda c: {"weight": c["weight"][:, :5]}, r"weight has shape \[20, 5\]"),
    "a head without rows": (lambda c: {"weight": c["weight"][:0]}, r"weight has shape \[0, 6\]"),
    "another blank width": (lambda c: {"blank_weight": c["blank_weight"][:5]}, r"blank_weight has shape \[5\]"),
    "a bias for each": (lambda c: {"blank_bias": c["blank_weight"]}, r"blank_bias has shape \[6\]"),
    "another device": (lambda c: {"weight": c["weight"].to("meta")}, "weight is on meta"),
    "floating targets": (lambda c: {"targets": c["targets"].float()}, "targets is torch.float32"),
    "targets of another batch": (lambda c: {"targets": c["targets"][:1]}, r"targets has shape \[1, 3\]"),
    "floating lengths": (lambda c: {"input_lengths": torch.ones(2)}, "input_lengths is torch.float32"),
    "lengths of another batch": (lambda c: {"target_lengths": torch.ones(3).long()}, r"target_lengths has shape \[3\]"),
    "no target lengths": (lambda c: {"target_lengths": None}, "target_lengths = None"),
    "a label past the head": (lambda c: {"targets": c["targets"].fill_(21)}, r"targets\[0, 0\] = 21"),
    "a label that is blank": (lambda c: {"targets": c["targets"].fill_(20)}, r"targets\[0, 0\] = 20"),
    "a negative label": (lambda c: {"targets": c["targets"].fill_(-1)}, r"targets\[0, 0\] = -1"),
    "more frames than there are": (lambda c: {"input_lengths": torch.tensor([7, 8])}, r"input_lengths\[1\] = 8"),
    "fewer than none": (lambda c: {"input_lengths": torch.tensor([-1, 7])}, r"input_lengths\[0\] = -1"),
    "more labels than there are": (lambda c: {"target_lengths": torch.tensor([3, 4])}, r"target_lengths\[1\] = 4"),
    "too few concatenated": (lambda c: {"targets": c["targets"].flatten()[:5]}, "targets has 5 labels"),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_what_does_not_fit_is_named(change):
    change, message = change
    case = small()
    with pytest.raises(ValueError, match=message):
        linear_ctc_loss(**case | change(case))


def test_a_path_past_its_frames_is_named():
    case = small()
    with pytest.raises(ValueError, match=r"lengths\[1\] = 8"):
        linear_ctc_path(case["hidden"], case["weight"], torch.tensor([7, 8]), blank=0)


@pytest.mark.gpu
def test_a_bad_label_on_cuda_is_named_later():
    case = small("cuda")
    case["targets"] = case["targets"].clone()
    case["targets"][1, 2] = 77
    out = linear_ctc_loss(**case, reduction="none")
    assert out.loss[0].isfinite() and out.loss[1].isnan()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"targets\[1, 2\] = 77"):
        out.loss.sum().backward()
    with pytest.raises(ValueError, match=r"targets\[1, 2\] = 77"):
        linear_ctc_loss(**case, validate=True)


@everywhere
def test_a_second_derivative_raises(device, impl):
    case = to(make(2, 7, 20, 6, 3, blank=20, full=True), FP32, device)
    loss = linear_ctc_loss(**case, impl=impl).loss
    (gradient,) = torch.autograd.grad(loss, case["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.gpu
def test_more_logits_than_int32_counts():
    """In a batch whose B·T·V passes 2^31 the first and the last utterance get the same results as alone.

    Products of a whole batch and of one utterance may sum in another order. So all values are multiples of 1/4 up to 1,
    whose sums of eight products are exact in any order, in bfloat16 too, and of equal logits the lowest id is taken.
    """
    case = make(23, 750, 128257, 8, 9, seed=2, full=True)
    case |= {name: (case[name] * 4).round().clamp(-4, 4) / 4 for name in ("hidden", "weight")}
    of_utterances = ("hidden", "targets", "input_lengths", "target_lengths")
    parts = [case | {name: case[name][[row]] for name in of_utterances} for row in (0, -1)]
    whole, gradients = run(linear_ctc_loss, to(case, BF16, "cuda", ("hidden",)), reduction="sum")
    for row, part in zip((0, -1), parts, strict=True):
        out, found = run(linear_ctc_loss, to(part, BF16, "cuda", ("hidden",)), reduction="sum", exact=True)
        assert torch.equal(whole.path[row], out.path[0])
        torch.testing.assert_close(gradients["hidden"][row], found["hidden"][0], rtol=0.05, atol=1e-3)


# ---- registration


def arguments(case, reduction="none", impl="torch", need=(True, True, True)):
    tensors = [case[name] for name in ("hidden", "weight", "blank_weight", "blank_bias")]
    tensors += [case[name] for name in ("targets", "input_lengths", "target_lengths")]
    return (*tensors, 20, FP32, impl, reduction, False, True, *need, False)


@not_interpreted
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_registration(device, impl, reduction):
    case = small(device)
    given = arguments(case, reduction, impl)
    torch.library.opcheck(torch.ops.soundwave.linear_ctc_fwd.default, given)
    out = torch.ops.soundwave.linear_ctc_fwd(*given)
    grad = torch.ones_like(out[0]).detach()
    torch.library.opcheck(torch.ops.soundwave.linear_ctc_bwd.default, (grad, *(x.detach() for x in out[-4:])))
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in given[:10]]
    grad = torch.ones(2, device=device)
    torch.library.opcheck(torch.ops.soundwave.linear_ctc_dweight.default, (*plain, grad))
    path = (*plain[:4], plain[5], 20, FP32, impl, False)
    torch.library.opcheck(torch.ops.soundwave.linear_ctc_path.default, path)


@not_interpreted
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(device, impl, backend, reduction):
    def function(hidden, weight, blank_weight, blank_bias, targets, input_lengths, target_lengths):
        with torch.autocast(device, dtype=FP16 if device == "cuda" else BF16, enabled=False):
            out = linear_ctc_loss(
                hidden * 1.0, weight, targets, input_lengths, target_lengths, blank=20, blank_weight=blank_weight,
                blank_bias=blank_bias, reduction=reduction, impl=impl,
            )  # fmt: skip
        return out.loss.sum() * 2, out.path

    tensors = ("hidden", "weight", "blank_weight", "blank_bias", "targets", "input_lengths", "target_lengths")
    one, two = small(device), small(device)
    expected, path = function(*(one[name] for name in tensors))
    expected.backward()
    torch._dynamo.reset()
    found, compiled_path = torch.compile(function, backend=backend, fullgraph=True)(*(two[name] for name in tensors))
    found.backward()
    assert torch.equal(found, expected) and torch.equal(path, compiled_path)
    assert all(torch.equal(one[name].grad, two[name].grad) for name in GRADIENTS)


def test_the_definition():
    case = make(2, 9, 30, 5, 3)
    log_probs = (case["hidden"] @ case["weight"].t()).log_softmax(-1).transpose(0, 1)
    names = ("targets", "input_lengths", "target_lengths", "blank")
    expected = F.ctc_loss(log_probs, *(case[name] for name in names), "none")
    torch.testing.assert_close(eager.linear_ctc_loss(**case, reduction="none").loss, expected)


def test_the_module_is_the_function():
    case = small()
    module = fused.LinearCTCLoss(20, reduction="sum", zero_infinity=True)
    names = ("hidden", "weight", "targets", "input_lengths", "target_lengths", "blank_weight", "blank_bias")
    loss = module(*(case[name] for name in names))
    assert torch.equal(loss, linear_ctc_loss(**case, reduction="sum", zero_infinity=True).loss)
    assert "blank=20, reduction='sum'" in repr(module)
    assert not list(module.parameters()) and F.relu(loss) == loss


def test_what_probability_0_makes_infeasible_has_no_gradient():
    """Two equal labels need a blank between them, which has probability 0 here."""
    case = to(make(2, 6, 20, 7, 2, blank=20, full=True), FP32, trained=("hidden", "blank_weight"))
    case["targets"][0] = 1
    with torch.no_grad():
        case["blank_bias"].fill_(-torch.inf)
    out, gradients = run(linear_ctc_loss, case, reduction="none", zero_infinity=True)
    assert out.loss[0] == 0 and not gradients["hidden"][0].any()


def test_what_probability_0_makes_infeasible_has_no_say_in_what_is_skipped():
    """The lost utterance is sure of labels that its transcript does not have, a mass far above the other's."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4000, 64, generator=generator)
    weight /= weight.norm(dim=1, keepdim=True)
    targets = torch.randint(1, 3900, (2, 5), generator=generator)
    targets[0, 1] = targets[0, 0]  # they need a blank between them
    hidden = torch.empty(2, 24, 64)
    hidden[0] = 30 * weight[3999 - torch.arange(24) % 3]
    hidden[1] = 16 * weight[targets[1, (torch.arange(24) // 4).clamp(max=4)]]
    hidden[1] += 0.1 * torch.randn(24, 64, generator=generator)
    settings = {"blank": 4000, "blank_weight": torch.zeros(64), "blank_bias": torch.tensor(-torch.inf)}
    gradients = []
    for exact in (False, True):
        leaf = hidden.clone().requires_grad_()
        out = linear_ctc_loss(leaf, weight, targets, [24, 24], [5, 5], zero_infinity=True, exact=exact, **settings)
        out.loss.backward()
        gradients.append(leaf.grad)
    found, whole = gradients
    assert whole[1].any() and (found - whole).norm() <= 0.05 * whole.norm()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("zero_infinity", [False, True])
def test_what_probability_0_makes_infeasible_adds_nothing_to_a_trained_head(reduction, zero_infinity):
    case = make(2, 6, 20, 7, 2, blank=20, full=True)
    case["targets"][0], case["targets"][1] = 1, torch.tensor([2, 3])
    case["blank_bias"].fill_(-torch.inf)
    alone = {name: value[1:] if name not in (*GRADIENTS[1:], "blank") else value for name, value in case.items()}
    trained = ("hidden", "weight")
    out, found = run(linear_ctc_loss, to(case, FP32, trained=trained), reduction=reduction, zero_infinity=zero_infinity)
    _, expected = run(linear_ctc_loss, to(alone, FP32, trained=trained), reduction=reduction)
    factor = 2 if reduction == "mean" else 1  # the mean over two utterances halves each
    torch.testing.assert_close(found["weight"] * factor, expected["weight"])
    torch.testing.assert_close(found["hidden"][1:] * factor, expected["hidden"])
    assert not found["hidden"][0].any() and out.loss.isinf().any() != zero_infinity
