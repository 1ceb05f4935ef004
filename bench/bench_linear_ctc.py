"""CTC over the vocabulary of an LLM: hidden [B, T, D] and a frozen head [V, D] -> the loss, and d loss / d hidden.

Ours runs with `exact=False`, which skips columns of negligible probability, and with `exact=True`. The definition needs
two products of 2·N·V·D operations each, over the N valid frames. Where ours skips columns it needs fewer operations, so
its share of the roof may exceed 100 %. "two-products" computes these two products and nothing else, one in forward and
one in backward.

The peer is pruned-ctc, which does not store the logits either: it keeps the log-probabilities of the labels, and
backward computes the logits once more, chunk by chunk of the vocabulary, three products with a frozen head. It needs
k2, sums over utterances, and takes the blank's row as a row of the head; so the head is copied once, with that row.
"recompute" is the same scheme in plain PyTorch, by chunks of frames, and runs anywhere.
"""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bench import shapes
from bench.contenders import compiled, plain
from bench.race import Absent, Operation, Problem
from soundwave import eager
from soundwave.fused import functional


@functools.lru_cache(maxsize=1)  # One is enough: cases with the same head follow each other.
def head(vocabulary: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return shapes.make_head(vocabulary, width, dtype, device)


RECOMPUTED_ROWS = 1024  # rows of a chunk: their logits in float32 take 0.5 GB over the vocabulary of Llama 3


class TwoProducts(torch.autograd.Function):
    """The logits in forward, and in backward a product of the same size."""

    @staticmethod
    def forward(ctx, rows, weight):
        logits = rows @ weight.T
        ctx.save_for_backward(logits, weight)
        return logits[0, 0].clone()

    @staticmethod
    def backward(ctx, grad):
        logits, weight = ctx.saved_tensors
        return logits @ weight, None


def problem(case: shapes.Case, device: torch.device) -> Problem:
    weight = head(case.V, case.D, case.dtype, device)

    def inputs(seed: int) -> tuple:
        made = shapes.utterances(case, weight, seed)
        return (made.hidden.requires_grad_(), *made[1:])

    def loss(function, **options):
        def run(hidden, targets, input_lengths, target_lengths, blank_weight, blank_bias):
            return function(
                hidden,
                weight,
                targets,
                input_lengths,
                target_lengths,
                blank=case.V,
                blank_weight=blank_weight,
                blank_bias=blank_bias,
                **options,
            ).loss

        return run

    valid = eager.length_mask(shapes.lengths(case.B, case.T, case.lengths), case.T).flatten().nonzero()[:, 0].to(device)

    def two_products(hidden, *_):
        rows = hidden.flatten(0, 1)
        return TwoProducts.apply(rows if len(valid) == len(rows) else rows[valid], weight)

    def label_log_probs(rows, labels, blank_weight, blank_bias):
        """Log-probabilities [n, 1 + U] of the blank and of `labels` [n, U] in rows [n, D]."""
        logits = (rows @ weight.T).float()
        blank = (rows.float() @ blank_weight)[:, None] + blank_bias
        total = torch.logaddexp(logits.logsumexp(1, keepdim=True), blank)
        return torch.cat([blank, logits.gather(1, labels)], 1) - total

    def recompute(hidden, targets, input_lengths, target_lengths, blank_weight, blank_bias):
        rows, labels = hidden.flatten(0, 1)[valid], targets.repeat_interleave(hidden.shape[1], 0)[valid]
        chunks = [
            checkpoint(label_log_probs, *parts, blank_weight, blank_bias, use_reentrant=False)
            for parts in zip(rows.split(RECOMPUTED_ROWS), labels.split(RECOMPUTED_ROWS), strict=True)
        ]
        log_probs = chunks[0].new_zeros(hidden.shape[0] * hidden.shape[1], 1 + targets.shape[1])
        log_probs = log_probs.index_copy(0, valid, torch.cat(chunks)).unflatten(0, hidden.shape[:2]).transpose(0, 1)
        # A label that comes twice has one column, that of its first place, or it would count as two labels.
        first = (targets[:, :, None] == targets[:, None, :]).int().argmax(2)
        return functional.ctc_loss(log_probs, 1 + first, input_lengths, target_lengths)

    def exact_in_torch():
        if device.type == "cuda":
            raise Absent("ours-triton-exact shows it")
        return loss(functional.linear_ctc_loss, impl="torch", exact=True)

    def pruned_ctc():
        import k2
        from pruned_ctc import pruned_ctc_loss

        if case.lengths != "equal":
            raise Absent("it sums over utterances; where targets differ in length that is another loss than the mean")
        whole = torch.cat([weight, weight[:1]])  # the last row is the blank's
        bias = torch.zeros(case.V + 1, dtype=torch.float32, device=device)
        ragged = {}  # by the tensor of targets: a collator makes them, outside of the loss

        def run(hidden, targets, input_lengths, target_lengths, blank_weight, blank_bias):
            if id(targets) not in ragged:
                labels = [row[:n] for row, n in zip(targets.tolist(), target_lengths.tolist(), strict=True)]
                ragged[id(targets)] = targets, k2.RaggedTensor(labels).to(device)
            whole[-1], bias[-1] = blank_weight, blank_bias
            loss = pruned_ctc_loss(hidden, whole, bias, ragged[id(targets)][1], input_lengths, blank_id=case.V)
            return loss / (hidden.shape[0] * case.U)

        return run

    rows = int(shapes.lengths(case.B, case.T, case.lengths).sum())
    product = 2.0 * rows * case.V * case.D
    moved = case.dtype.itemsize * (case.V * case.D + 2.0 * rows * case.D)  # the head, hidden, its gradient
    return Problem(
        inputs,
        {
            "eager": plain(loss(eager.linear_ctc_loss)),
            "compiled": compiled(loss(eager.linear_ctc_loss)),
            "two-products": plain(two_products),
            "recompute": plain(recompute),
            "pruned-ctc": pruned_ctc,
            "ours-torch": plain(loss(functional.linear_ctc_loss, impl="torch", exact=False)),
            "ours-torch-exact": exact_in_torch,
            "ours-triton": plain(loss(functional.linear_ctc_loss, impl="triton", exact=False)),
            "ours-triton-exact": plain(loss(functional.linear_ctc_loss, impl="triton", exact=True)),
        },
        flops={"both": 2 * product},
        bytes={"both": moved},
        different=("two-products",),
        agreement=0.05,  # Skipping columns may change the gradient by so much; the tests check its smaller bound.
    )


OURS = ("ours-torch", "ours-torch-exact", "ours-triton", "ours-triton-exact")
LINEAR_CTC = Operation(
    "linear_ctc",
    shapes.linear_ctc,
    problem,
    ("eager", "compiled", "two-products", "recompute", "pruned-ctc", *OURS),
    needs={
        "two-products": ("cuda",),
        "pruned-ctc": ("k2", "pruned_ctc"),
        "ours-triton": ("cuda",),
        "ours-triton-exact": ("cuda",),
    },
)


@pytest.mark.operation(LINEAR_CTC)
def test_linear_ctc(race):
    race()
