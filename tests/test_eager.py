"""Eager operations and adapters against brute force, explicit logits in float64 and torch's own modules."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from soundwave import eager, fused
from soundwave.model.configuration import SoundwaveConfig

D = 5  # width in the CTC tests
EXACT = {"rtol": 1e-9, "atol": 1e-11}  # float64, another order of summation


# ---------------------------------------------------------------- linear CTC


def ctc_by_paths(log_probs, target, blank):
    """-log of the summed probability of all paths through [T, V] that collapse to `target`."""
    size, rows = log_probs.shape
    scores = []
    for path in itertools.product(range(rows), repeat=size):
        if [label for label, _ in itertools.groupby(path) if label != blank] == target:
            scores.append(sum(log_probs[t, label] for t, label in enumerate(path)))
    return -torch.stack(scores).logsumexp(0)


def ctc_problem(blank_kind, rows=4, frames=4, batch=3, seed=0):
    """Leaf tensors in float64 and the blank, which is the first row, a middle row or an extra row."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    leaves = {"hidden": leaf(batch, frames, D)}
    if blank_kind == "extra":
        leaves |= {"weight": leaf(rows - 1, D), "blank_weight": leaf(D), "blank_bias": leaf()}
    else:
        leaves |= {"weight": leaf(rows, D)}
    blank = {"first": 0, "middle": rows // 2, "extra": rows - 1}[blank_kind]
    return leaves, blank


def explicit_log_probs(leaves):
    """Log-probabilities [B, T, V] by one product with the whole head, the extra row last."""
    head, bias = leaves["weight"], torch.zeros(leaves["weight"].shape[0], dtype=torch.float64)
    if "blank_weight" in leaves:
        head, bias = torch.cat([head, leaves["blank_weight"][None]]), torch.cat([bias, leaves["blank_bias"][None]])
    return torch.einsum("btd,vd->btv", leaves["hidden"], head).add(bias).log_softmax(-1)


def run_ctc(leaves, targets, input_lengths, target_lengths, **kwargs):
    rest = {name: value for name, value in leaves.items() if name not in ("hidden", "weight")}
    lengths = torch.tensor(input_lengths)
    target_lengths = None if target_lengths is None else torch.tensor(target_lengths)
    return eager.linear_ctc_loss(leaves["hidden"], leaves["weight"], targets, lengths, target_lengths, **rest, **kwargs)


BLANKS = ["first", "middle", "extra"]


@pytest.mark.parametrize("blank_kind", BLANKS)
def test_ctc_loss_and_gradients_are_those_of_all_paths_summed(blank_kind):
    leaves, blank = ctc_problem(blank_kind)
    a, b = [label for label in range(4) if label != blank][:2]
    targets, input_lengths = [[a, a], [b, a], [b]], [4, 3, 1]
    padded = torch.tensor([[a, a], [b, a], [b, -100]])
    loss = run_ctc(leaves, padded, input_lengths, [2, 2, 1], blank=blank, reduction="none").loss
    log_probs = explicit_log_probs(leaves)
    lengths_and_targets = enumerate(zip(input_lengths, targets, strict=True))
    expected = torch.stack([ctc_by_paths(log_probs[i, :t], target, blank) for i, (t, target) in lengths_and_targets])
    torch.testing.assert_close(loss, expected, **EXACT)
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = torch.autograd.grad(loss, list(leaves.values()), upstream)
    wanted = torch.autograd.grad(expected, list(leaves.values()), upstream)
    for name, x, y in zip(leaves, found, wanted, strict=True):
        torch.testing.assert_close(x, y, **EXACT, msg=lambda text, name=name: f"gradient of {name}: {text}")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("blank_kind", BLANKS)
def test_ctc_equals_torch_on_explicit_logits(blank_kind, reduction):
    leaves, blank = ctc_problem(blank_kind, rows=63, frames=37, batch=4, seed=1)
    targets = torch.randint(1, 30, (4, 9))  # 31 and 62 are the blanks
    input_lengths, target_lengths = [37, 30, 20, 25], [9, 1, 7, 0]
    loss = run_ctc(leaves, targets, input_lengths, target_lengths, blank=blank, reduction=reduction).loss
    expected = F.ctc_loss(
        explicit_log_probs(leaves).transpose(0, 1),
        targets,
        torch.tensor(input_lengths),
        torch.tensor(target_lengths),
        blank,
        reduction,
    )
    torch.testing.assert_close(loss, expected, **EXACT)
    found = torch.autograd.grad(loss.sum(), list(leaves.values()))
    for x, y in zip(found, torch.autograd.grad(expected.sum(), list(leaves.values())), strict=True):
        torch.testing.assert_close(x, y, **EXACT)


def test_ctc_of_an_empty_target_is_the_probability_of_blanks_alone():
    leaves, blank = ctc_problem("extra")
    empty = torch.zeros(3, 0, dtype=torch.int64)
    loss = run_ctc(leaves, empty, [4, 1, 0], [0, 0, 0], blank=blank, reduction="none").loss
    log_probs = explicit_log_probs(leaves)[..., blank]
    torch.testing.assert_close(loss, torch.stack([-log_probs[0].sum(), -log_probs[1, 0], log_probs.new_zeros(())]))


@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ctc_by_the_recursion_is_torchs_loss(reduction, zero_infinity):
    """Gradients agree for the logits: torch's is right only after a log-softmax.

    The third utterance is too short: its gradient is 0 here, and NaN in torch without `zero_infinity`.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 4, 6, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.tensor([[1, 1, 5], [3, 4, -100], [2, 2, 2], [-100, -100, -100]])
    given = targets, torch.tensor([9, 4, 4, 7]), torch.tensor([3, 2, 3, 0]), 0, reduction, zero_infinity
    loss, expected = eager.ctc_loss(logits.log_softmax(-1), *given), F.ctc_loss(logits.log_softmax(-1), *given)
    torch.testing.assert_close(loss, expected, **EXACT)
    found, wanted = (torch.autograd.grad(x[x.isfinite()].sum(), logits)[0] for x in (loss, expected))
    assert not found[:, 2].any()
    torch.testing.assert_close(found, wanted.nan_to_num(), **EXACT)


def test_ctc_gradient_is_that_of_the_log_probabilities_as_given():
    scores = torch.randn(3, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    loss = eager.ctc_loss(scores, torch.tensor([[1]]), torch.tensor([3]), torch.tensor([1]), reduction="sum")
    expected = ctc_by_paths(scores[:, 0], [1], 0)
    torch.testing.assert_close(loss, expected, **EXACT)
    (found,), (wanted,) = (torch.autograd.grad(x, scores) for x in (loss, expected))
    torch.testing.assert_close(found, wanted, **EXACT)


INFEASIBLE = {"too_short": ([1, 2], 1), "repeat_without_room": ([1, 1], 2), "no_frames": ([2, 1], 0)}


@pytest.mark.parametrize("case", INFEASIBLE)
def test_zero_infinity_leaves_an_infeasible_utterance_out(case):
    target, length = INFEASIBLE[case]
    leaves, blank = ctc_problem("extra", batch=2)
    targets = torch.tensor([[2, 1], target])
    loss = run_ctc(leaves, targets, [4, length], [2, 2], blank=blank, reduction="none", zero_infinity=True).loss
    assert loss[1] == 0 and loss[0] > 0
    found = torch.autograd.grad(loss.sum(), list(leaves.values()))
    assert not found[0][1].any()
    alone = run_ctc(leaves, targets, [4, length], [2, 2], blank=blank, reduction="none", zero_infinity=True).loss[0]
    for x, y in zip(found, torch.autograd.grad(alone, list(leaves.values())), strict=True):
        torch.testing.assert_close(x, y, **EXACT)  # so nothing is NaN either


@pytest.mark.parametrize("case", INFEASIBLE)
def test_without_zero_infinity_an_infeasible_loss_is_infinite(case):
    target, length = INFEASIBLE[case]
    leaves, blank = ctc_problem("extra", batch=1)
    loss = run_ctc(leaves, torch.tensor([target]), [length], [2], blank=blank, reduction="none").loss
    assert loss.item() == float("inf")


@pytest.mark.parametrize("filling", [-100, -1, 10**6])
def test_ctc_ignores_padding_of_targets(filling):
    leaves, blank = ctc_problem("middle", batch=2)
    padded = torch.tensor([[1, 3, 0], [3, filling, filling]])
    exact = torch.tensor([1, 3, 0, 3])  # concatenated
    losses = [
        run_ctc(leaves, targets, [4, 2], [3, 1], blank=blank, reduction="none").loss for targets in (padded, exact)
    ]
    torch.testing.assert_close(*losses, **EXACT)


def test_ctc_ignores_frames_past_a_length_and_gives_them_no_gradient():
    leaves, blank = ctc_problem("extra", batch=2)
    targets = torch.tensor([[0, 1], [2, 0]])
    loss = run_ctc(leaves, targets, [4, 2], [2, 1], blank=blank, reduction="none").loss
    (gradient,) = torch.autograd.grad(loss.sum(), leaves["hidden"])
    assert not gradient[1, 2:].any() and gradient[1, :2].any()
    with torch.no_grad():
        leaves["hidden"][1, 2:] = 7.0
    again = run_ctc(leaves, targets, [4, 2], [2, 1], blank=blank, reduction="none").loss
    torch.testing.assert_close(again, loss, rtol=0, atol=0)


def test_path_is_the_argmax_within_the_lengths_and_carries_no_gradient():
    leaves, blank = ctc_problem("extra", rows=7, frames=6)
    out = run_ctc(leaves, torch.ones(3, 1, dtype=torch.int64), [6, 2, 0], [1, 1, 0], blank=blank, zero_infinity=True)
    log_probs = explicit_log_probs(leaves)
    for i, length in enumerate([6, 2, 0]):
        assert out.path[i].tolist() == log_probs[i, :length].argmax(-1).tolist() + [-1] * (6 - length)
        torch.testing.assert_close(out.path_log_prob[i, :length], log_probs[i, :length].amax(-1), **EXACT)
        assert not out.path_log_prob[i, length:].any()
    assert out.loss.requires_grad and not out.path.requires_grad and not out.path_log_prob.requires_grad


def test_the_path_alone_is_the_losss():
    leaves, blank = ctc_problem("extra")
    out = run_ctc(leaves, torch.tensor([[1], [2], [0]]), [4, 3, 0], [1, 1, 0], blank=blank)
    path, path_log_prob = eager.linear_ctc_path(**leaves, lengths=torch.tensor([4, 3, 0]), blank=blank)
    assert torch.equal(path, out.path) and torch.equal(path_log_prob, out.path_log_prob)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_path_takes_the_lowest_of_equal_ids(dtype):
    weight = torch.randn(63, D, generator=torch.Generator().manual_seed(2)).to(dtype)
    weight[[50, 7, 31]] = 10 * torch.ones(D, dtype=dtype)
    hidden = torch.ones(2, 7, D, dtype=dtype)
    tied = eager.linear_ctc_loss(hidden, weight, None, torch.tensor([7, 7]), None, blank=50)
    assert tied.loss is None and (tied.path == 7).all()
    extra = eager.linear_ctc_loss(
        hidden, weight, None, torch.tensor([7, 7]), None, blank=63, blank_weight=weight[7], blank_bias=torch.zeros(())
    )
    assert (extra.path == 7).all()


def test_ctc_of_half_precision_input_is_computed_in_float32():
    leaves, blank = ctc_problem("extra", rows=63, frames=37)
    halves = {name: value.detach().bfloat16() for name, value in leaves.items()}
    out = run_ctc(halves, torch.ones(3, 2, dtype=torch.int64), [37] * 3, [2] * 3, blank=blank)
    assert out.loss.dtype == out.path_log_prob.dtype == torch.float32


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([[1, 2], [9, 1]]), r"targets\[1, 0\] = 9, but that is not one of the head's 4 rows"),
        (torch.tensor([1, 2, 9, 1]), r"targets\[2\] = 9, but that is not"),
        (torch.tensor([1, 2, 1, 0]), r"targets\[3\] = 0, but that is the blank"),
    ],
    ids=["padded", "concatenated", "blank"],
)
def test_a_wrong_label_is_named_by_its_place(targets, message):
    lengths = torch.tensor([5, 5]), torch.tensor([2, 2])
    with pytest.raises(ValueError, match=message):
        eager.linear_ctc_loss(torch.zeros(2, 5, D), torch.zeros(4, D), targets, *lengths, blank=0)


@pytest.mark.parametrize(
    ("blank", "extra"),
    [(4, False), (-1, False), (2, True), (5, True)],
    ids=["extra_without_weight", "negative", "row_with_weight", "past_extra"],
)
def test_a_blank_that_does_not_fit_the_head_is_refused(blank, extra):
    with pytest.raises(ValueError, match=rf"blank = {blank}, .*0 to 3.*4 together with blank_weight"):
        eager.linear_ctc_loss(
            torch.zeros(1, 2, D),
            torch.zeros(4, D),
            None,
            torch.tensor([2]),
            None,
            blank=blank,
            blank_weight=torch.zeros(D) if extra else None,
        )


# ---------------------------------------------------------------- peaks


def peaks_by_hand(path, lengths, blank, keep, scores):
    """Kept frames of each utterance, run by run."""
    kept = []
    for row, length, score in zip(path, lengths, scores, strict=True):
        frames = []
        for label, run in itertools.groupby(range(length), key=lambda t, row=row: row[t]):
            run = list(run)
            if keep == "runs":
                frames.append(run[0])
            elif label != blank:
                frames.append(max(run, key=lambda t, score=score: (score[t], -t)))
        kept.append(frames or [0] * (length > 0))
    return kept


@st.composite
def paths(draw):
    batch, size = draw(st.integers(1, 4)), draw(st.integers(1, 9))

    def matrix(values):
        return draw(st.lists(st.lists(values, min_size=size, max_size=size), min_size=batch, max_size=batch))

    lengths = draw(st.lists(st.integers(0, size), min_size=batch, max_size=batch))
    return matrix(st.integers(0, 2)), lengths, matrix(st.sampled_from([-3.0, -1.0, -0.5]))


@pytest.mark.parametrize("keep", ["peaks", "runs"])
@settings(max_examples=300, deadline=None)
@given(paths())
def test_kept_frames_are_those_found_run_by_run(keep, problem):
    path, lengths, scores = problem
    peaks = eager.ctc_peaks(torch.tensor(path), torch.tensor(lengths), blank=1, keep=keep, scores=torch.tensor(scores))
    expected = peaks_by_hand(path, lengths, 1, keep, scores)
    size = len(path[0])
    assert peaks.index.tolist() == [i * size + t for i, frames in enumerate(expected) for t in frames]
    counts = [len(frames) for frames in expected]
    assert peaks.cu_seqlens.tolist() == [0, *itertools.accumulate(counts)]
    assert peaks.max_seqlen == max(counts)
    assert (peaks.index.dtype, peaks.cu_seqlens.dtype) == (torch.int64, torch.int32)


@pytest.mark.parametrize("keep", ["peaks", "runs"])
def test_all_blank_keeps_frame_0(keep):
    path, scores = torch.full((2, 5), 3), torch.rand(2, 5)
    peaks = eager.ctc_peaks(path, torch.tensor([5, 1]), blank=3, keep=keep, scores=scores)
    assert (peaks.index.tolist(), peaks.cu_seqlens.tolist(), peaks.max_seqlen) == ([0, 5], [0, 1, 2], 1)


@pytest.mark.parametrize("shape", [(3, 0), (0, 4)], ids=["no_frames", "no_utterances"])
def test_nothing_keeps_nothing(shape):
    lengths = torch.zeros(shape[0], dtype=torch.int64)
    peaks = eager.ctc_peaks(torch.zeros(shape, dtype=torch.int32), lengths, blank=0, scores=torch.zeros(shape))
    assert (peaks.index.tolist(), peaks.cu_seqlens.tolist(), peaks.max_seqlen) == ([], [0] * (shape[0] + 1), 0)
    assert peaks.index.dtype == torch.int64


def test_every_frame_is_kept_up_to_each_length():
    peaks = eager.every_frame(torch.tensor([3, 0, 5]), 5)
    assert peaks.index.tolist() == [0, 1, 2, 10, 11, 12, 13, 14]
    assert peaks.cu_seqlens.tolist() == [0, 3, 3, 8] and peaks.max_seqlen == 5


def test_peaks_without_scores_are_refused():
    with pytest.raises(ValueError, match="scores = None"):
        eager.ctc_peaks(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([2]), blank=0)


def test_an_unknown_keep_rule_is_refused():
    with pytest.raises(ValueError, match="keep = 'all', but it must be 'peaks' or 'runs'"):
        eager.ctc_peaks(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([2]), blank=0, keep="all")


# ---------------------------------------------------------------- attention and norm


@pytest.mark.parametrize("scale", [None, 0.3])
def test_packed_attention_is_torchs_of_each_utterance(scale):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(n, 2, 4, generator=generator, dtype=torch.float64) for n in (5, 7, 7))
    bounds = torch.tensor([0, 2, 4, 5], dtype=torch.int32), torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    found = eager.shrink_attention(query, key, value, *bounds, 2, 4, scale=scale)
    for q, k in (((0, 2), (0, 3)), ((4, 5), (3, 7))):
        one = (query[slice(*q)], key[slice(*k)], value[slice(*k)])
        expected = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in one), scale=scale).transpose(0, 1)
        torch.testing.assert_close(found[slice(*q)], expected, **EXACT)
    assert not found[2:4].any()  # the second utterance has no keys


def test_no_utterances_have_no_attention():
    empty, bounds = torch.zeros(0, 2, 4), torch.zeros(1, dtype=torch.int32)
    assert eager.shrink_attention(empty, empty, empty, bounds, bounds, 0, 0).shape == (0, 2, 4)


def test_residual_and_norm_are_torchs_norm_of_the_sum():
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(n, 6, generator=generator) for n in (3, 5))
    norm, index = nn.LayerNorm(6), torch.tensor([4, 0, 2])
    y, total = eager.add_layer_norm(x, residual, norm.weight, norm.bias, residual_index=index, return_sum=True)
    assert torch.equal(total, x + residual[index]) and torch.equal(y, norm(total))
    assert torch.equal(eager.add_layer_norm(x, residual[:3], norm.weight, norm.bias), norm(x + residual[:3]))


# ---------------------------------------------------------------- splicing

AUDIO = 99
PAD_ID = AUDIO  # ids of padding must not matter


def splice_by_hand(ids, embeddings, speech, labels, side):
    """Rows of (token embeddings or speech rows), masks and labels, as lists; `ids` without padding."""
    recordings = iter(speech)
    rows, new_labels = [], []
    for row_ids, row, row_labels in zip(ids, embeddings, labels, strict=True):
        out, out_labels = [], []
        for token, vector, label in zip(row_ids, row, row_labels, strict=True):
            part = list(next(recordings)) if token == AUDIO else [vector]
            out += part
            out_labels += [-100] * len(part) if token == AUDIO else [label]
        rows.append(out)
        new_labels.append(out_labels)
    size = max(map(len, rows))
    result = torch.zeros(len(rows), size, embeddings[0].shape[-1])
    mask, label_matrix = torch.zeros(len(rows), size, dtype=torch.int64), torch.full((len(rows), size), -100)
    for i, row in enumerate(rows):
        start = size - len(row) if side == "left" else 0
        for t, vector in enumerate(row):
            result[i, start + t], mask[i, start + t] = vector, 1
            label_matrix[i, start + t] = new_labels[i][t]
    return result, mask, label_matrix


def splice_problem(ids, kept, side):
    """Padded arguments of a splice whose rows are `ids`; all vectors and labels differ."""
    size, width = max(map(len, ids)), 3
    input_ids, mask = torch.full((len(ids), size), PAD_ID), torch.zeros(len(ids), size, dtype=torch.int64)
    labels = torch.full((len(ids), size), -100)
    embeddings = torch.randn(len(ids), size, width)  # padding is not zero
    for i, row in enumerate(ids):
        place = slice(size - len(row), size) if side == "left" else slice(0, len(row))
        input_ids[i, place], mask[i, place] = torch.tensor(row), 1
        labels[i, place] = torch.arange(len(row)) + 10 * i
    speech = torch.randn(sum(kept), width)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(kept)], dtype=torch.int32)
    return input_ids, mask, labels, embeddings, speech, cu_seqlens


SPLICES = {
    "middle": ([[5, AUDIO, 6, 7], [5, 6, AUDIO, 7, 8]], [3, 1]),
    "start_and_end": ([[AUDIO, 5, 6], [5, 6, 7, AUDIO]], [2, 4]),
    "alone": ([[AUDIO], [AUDIO]], [1, 7]),
    "text_between": ([[5, AUDIO, 6], [5, 6, 7, 8, 9, 4], [AUDIO, 6]], [2, 5]),
    "text_only": ([[5, 6], [5, 6, 7]], []),
    "nothing_kept": ([[5, AUDIO, 6], [5, AUDIO, 7, 8]], [0, 2]),
    "single": ([[5, AUDIO, 6]], [63]),
}


@pytest.mark.parametrize("output_side", ["left", "right"])
@pytest.mark.parametrize("input_side", ["left", "right"])
@pytest.mark.parametrize("case", SPLICES)
def test_speech_stands_where_its_placeholder_stood(case, input_side, output_side):
    ids, kept = SPLICES[case]
    input_ids, mask, labels, embeddings, speech, cu_seqlens = splice_problem(ids, kept, input_side)
    found = eager.splice(
        embeddings,
        input_ids,
        mask,
        speech,
        cu_seqlens,
        audio_placeholder_id=AUDIO,
        labels=labels,
        padding_side=output_side,
    )
    bare = [row.bool() for row in mask]
    expected = splice_by_hand(
        ids,
        [row[keep] for row, keep in zip(embeddings, bare, strict=True)],
        speech.split(kept) if kept else [],
        [row[keep].tolist() for row, keep in zip(labels, bare, strict=True)],
        output_side,
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_gradients_reach_speech_and_text_but_not_placeholder_or_padding():
    input_ids, mask, labels, embeddings, speech, cu_seqlens = splice_problem(*SPLICES["text_between"], "right")
    embeddings.requires_grad_()
    speech.requires_grad_()
    out, out_mask, _ = eager.splice(embeddings, input_ids, mask, speech, cu_seqlens, audio_placeholder_id=AUDIO)
    upstream = torch.randn(out.shape)
    out.backward(upstream)
    spliced, _, _ = eager.splice(embeddings.grad, input_ids, mask, speech.grad, cu_seqlens, audio_placeholder_id=AUDIO)
    torch.testing.assert_close(spliced, upstream * out_mask[..., None], rtol=0, atol=0)
    assert not embeddings.grad[(mask == 0) | (input_ids == AUDIO)].any()


def test_splice_keeps_the_dtype_of_the_embeddings():
    input_ids, mask, _, embeddings, speech, cu_seqlens = splice_problem([[5, AUDIO]], [2], "right")
    out, out_mask, labels = eager.splice(
        embeddings.bfloat16(), input_ids, mask, speech, cu_seqlens, audio_placeholder_id=AUDIO
    )
    assert (out.dtype, out_mask.dtype, labels) == (torch.bfloat16, torch.int64, None)


def test_a_second_placeholder_is_refused():
    problem = splice_problem([[AUDIO, 5, AUDIO], [5]], [2, 1], "right")
    input_ids, mask, _, embeddings, speech, cu_seqlens = problem
    with pytest.raises(ValueError, match="input_ids holds the audio placeholder more than once"):
        eager.splice(embeddings, input_ids, mask, speech, cu_seqlens, audio_placeholder_id=AUDIO)


def test_any_mask_but_0_counts_as_1():
    input_ids, mask, labels, embeddings, speech, cu_seqlens = splice_problem(
        [[AUDIO, 5, 6], [5, AUDIO]], [2, 1], "right"
    )
    ones, others = (
        eager.splice(embeddings, input_ids, m, speech, cu_seqlens, audio_placeholder_id=AUDIO, labels=labels)
        for m in (mask, 3 * mask)
    )
    assert all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def test_a_batch_of_no_rows_is_spliced_to_none():
    none = torch.zeros(0, 3, dtype=torch.int64)
    bounds = torch.zeros(1, dtype=torch.int64)
    out, mask, _ = eager.splice(torch.zeros(0, 3, D), none, none, torch.zeros(0, D), bounds, audio_placeholder_id=AUDIO)
    assert (out.shape, mask.shape) == ((0, 0, D), (0, 0))


@pytest.mark.parametrize("kept", [[2], [2, 1, 1]], ids=["too_few", "too_many"])
def test_recordings_and_placeholders_must_agree(kept):
    input_ids, mask, _, embeddings, speech, cu_seqlens = splice_problem([[AUDIO, 5], [5, AUDIO]], kept, "right")
    with pytest.raises(ValueError, match=f"2 rows with an audio placeholder, .* {len(kept)} recordings"):
        eager.splice(embeddings, input_ids, mask, speech, cu_seqlens, audio_placeholder_id=AUDIO)


# ---------------------------------------------------------------- adapters


def small_config(semantics="paper", **changes):
    return SoundwaveConfig(
        audio_hidden_size=10,
        hidden_size=24,
        num_attention_heads=3,
        semantics=semantics,
        **changes,
    )


def randomised(module):
    """In float64 and evaluation mode; biases and norms do not have their neutral initial values."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double().eval()


SEMANTICS = ["paper", "released"]
LENGTHS = [13, 7, 1, 4]


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_alignment_of_an_utterance_depends_on_nothing_around_it(semantics):
    adapter = randomised(eager.AlignmentAdapter(small_config(semantics)))
    frames = torch.full((4, 15, 10), torch.nan, dtype=torch.float64)  # padding may have any values
    for row, length in zip(frames, LENGTHS, strict=True):
        row[:length] = torch.randn(length, 10)
    hidden, lengths = adapter(frames, torch.tensor(LENGTHS))
    assert hidden.shape == (4, 8, 24) and lengths.tolist() == [7, 4, 1, 2]
    for i, length in enumerate(LENGTHS):
        alone, alone_length = adapter(frames[i : i + 1, :length], torch.tensor([length]))
        assert alone_length.item() == alone.shape[1] == lengths[i]
        torch.testing.assert_close(hidden[i, : lengths[i]], alone[0], **EXACT)


def test_alignment_concatenates_neighbours_and_fills_the_last_group_with_zeros():
    adapter = randomised(eager.AlignmentAdapter(small_config(frame_stack=3)))
    frames = torch.randn(1, 5, 10, dtype=torch.float64)
    filled = torch.cat([frames[0].flatten(), torch.zeros(10, dtype=torch.float64)]).view(1, 2, 30)
    mask = torch.ones(1, 2, dtype=torch.bool)
    expected = adapter.out_norm(adapter.layer(adapter.projector(filled), mask))
    torch.testing.assert_close(adapter(frames, torch.tensor([5]))[0], expected, **EXACT)


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_shrinking_of_an_utterance_depends_on_nothing_around_it(semantics):
    adapter = randomised(eager.ShrinkingAdapter(small_config(semantics)))
    hidden = 100 * torch.randn(4, 15, 24, dtype=torch.float64)  # frames past a length are large, too
    kept = [[0, 5, 12], [6], [0], [1, 2]]
    index = torch.tensor([i * 15 + t for i, frames in enumerate(kept) for t in frames])
    cu_seqlens = torch.tensor([0, 3, 4, 5, 7], dtype=torch.int32)
    packed = adapter(hidden, torch.tensor(LENGTHS), eager.Peaks(index, cu_seqlens, 3))
    for i, (length, frames) in enumerate(zip(LENGTHS, kept, strict=True)):
        peaks = eager.Peaks(torch.tensor(frames), torch.tensor([0, len(frames)], dtype=torch.int32), len(frames))
        alone = adapter(hidden[i : i + 1, :length], torch.tensor([length]), peaks)
        torch.testing.assert_close(packed[cu_seqlens[i] : cu_seqlens[i + 1]], alone, **EXACT)


def adapter_layer(attend, **changes):
    arguments = {"hidden_size": 24, "num_heads": 3, "attend": attend, "dropout": 0.1, "eps": 1e-5} | changes
    return randomised(eager.AdapterLayer(**arguments))


def torch_layer(layer, **changes):
    """torch's own encoder layer with the parameters of `layer`, under the same names."""
    reference = nn.TransformerEncoderLayer(24, 3, 48, norm_first=True, **{"batch_first": True} | changes)
    reference.load_state_dict(layer.state_dict(), strict=True)
    return reference.double().eval()


def test_adapter_layer_is_torchs_pre_norm_encoder_layer():
    layer = adapter_layer("frames")
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    mask = eager.length_mask(torch.tensor([7, 1, 4]), 7)
    expected = torch_layer(layer)(x, src_key_padding_mask=~mask)
    torch.testing.assert_close(layer(x, mask)[mask], expected[mask], **EXACT)


def test_attend_self_is_torchs_layer_with_batch_first_off():
    """The released code gives [1, T, D] to a layer that reads [sequence, batch, D]."""
    layer = adapter_layer("self")
    x = torch.randn(1, 7, 24, dtype=torch.float64)
    expected = torch_layer(layer, batch_first=False)(x)
    torch.testing.assert_close(layer(x, torch.ones(1, 7, dtype=torch.bool)), expected, **EXACT)


@pytest.mark.parametrize("keys", ["all", "kept"])
def test_shrinking_adapter_is_torchs_attention_and_norm(keys):
    adapter = randomised(eager.ShrinkingAdapter(small_config(keys=keys)))
    attention, norm = nn.MultiheadAttention(24, 3, batch_first=True).double(), nn.LayerNorm(24, eps=1e-5).double()
    state = adapter.state_dict()
    norm.load_state_dict({name: state.pop(f"norm.{name}") for name in ("weight", "bias")}, strict=True)
    attention.load_state_dict(state, strict=True)
    hidden = torch.randn(2, 9, 24, dtype=torch.float64)
    peaks = eager.Peaks(torch.tensor([0, 4, 8, 9, 12]), torch.tensor([0, 3, 5], dtype=torch.int32), 3)
    packed = adapter(hidden, torch.tensor([9, 5]), peaks)
    for i, (kept, length) in enumerate([([0, 4, 8], 9), ([0, 3], 5)]):
        query = hidden[i : i + 1, kept]
        key = hidden[i : i + 1, :length] if keys == "all" else query
        expected = norm(query + attention(query, key, key, need_weights=False)[0])[0]
        torch.testing.assert_close(packed[peaks.cu_seqlens[i] : peaks.cu_seqlens[i + 1]], expected, **EXACT)


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_every_parameter_of_both_adapters_gets_a_finite_gradient(semantics):
    alignment = eager.AlignmentAdapter(small_config(semantics))
    shrinking = eager.ShrinkingAdapter(small_config(semantics))
    # A recording without a single frame is among them.
    hidden, lengths = alignment(torch.randn(3, 8, 10), torch.tensor([8, 0, 3]))
    peaks = eager.Peaks(torch.tensor([0, 2, 8]), torch.tensor([0, 2, 2, 3], dtype=torch.int32), 2)
    (shrinking(hidden, lengths, peaks) * torch.randn(3, 24)).sum().backward()
    for module in (alignment, shrinking):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


def test_shrinking_nothing_gives_no_rows():
    adapter = eager.ShrinkingAdapter(small_config())
    lengths = torch.tensor([0, 0])
    peaks = eager.ctc_peaks(torch.full((2, 3), -1), lengths, blank=7, scores=torch.zeros(2, 3))
    assert adapter(torch.randn(2, 3, 24), lengths, peaks).shape == (0, 24)


@pytest.mark.parametrize("module", [eager, fused], ids=["eager", "fused"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attend": "frame"}, "attend = 'frame', but it must be one of frames, self"),
        ({"keys": "al"}, "keys = 'al', but it must be one of all, kept, none"),
        ({"num_attention_heads": 3}, "hidden_size = 16, but it must be a multiple of num_attention_heads = 3"),
    ],
    ids=["attend", "keys", "heads"],
)
def test_any_object_may_be_the_configuration_but_wrong_words_are_refused(module, change, message):
    settings = {"audio_hidden_size": 6, "hidden_size": 16, "num_attention_heads": 2, "frame_stack": 2}
    settings |= {"attend": "frames", "keys": "all", "adapter_dropout": 0.0, "layer_norm_eps": 1e-5}
    module.AlignmentAdapter(SimpleNamespace(**settings)), module.ShrinkingAdapter(SimpleNamespace(**settings))
    kind = module.ShrinkingAdapter if "keys" in change else module.AlignmentAdapter
    with pytest.raises(ValueError, match=message):
        kind(SimpleNamespace(**settings | change))


def test_dropout_acts_in_training_alone():
    adapter = eager.AlignmentAdapter(small_config(adapter_dropout=0.5))
    frames, lengths = torch.randn(1, 8, 10), torch.tensor([8])
    assert not torch.equal(adapter(frames, lengths)[0], adapter(frames, lengths)[0])
    adapter.eval()
    assert torch.equal(adapter(frames, lengths)[0], adapter(frames, lengths)[0])


def test_parameter_counts_are_the_papers_with_llama_8b_and_whisper_large():
    config = SoundwaveConfig(audio_hidden_size=1280, hidden_size=4096, num_attention_heads=32, vocab_size=128_256)
    with torch.device("meta"):
        counts = [
            sum(parameter.numel() for parameter in adapter(config).parameters())
            for adapter in (eager.AlignmentAdapter, eager.ShrinkingAdapter)
        ]
    # The paper's 144.75 M are projector and layer; out_norm adds its 8 192. Its 67.1 M hold with the norm and without.
    assert counts == [144_752_640 + 8_192, 67_125_248 + 8_192]
