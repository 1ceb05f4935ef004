"""Counts, without a GPU, what the host waits for and what is launched: each operation, and a step of each stage.

    python tests/count_waits.py            the table as JSON
    python tests/count_waits.py --write    docs/gpu-waits.md

Every case runs forward and backward on the device of `fake_cuda`, with small sizes; a count does not depend on them.
Lengths, labels and targets are on the CPU, where the collator makes them, unless the case says otherwise.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
ROOT = Path(__file__).resolve().parents[1]
# The root would offer its folder kernels/ to transformers; soundwave is found through its installation.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

import torch  # noqa: E402
from fake_cuda import CUDA, DECIDE, Log, fake_cuda, prepare, to_cuda  # noqa: E402
from waits_page import DOCUMENT, document  # noqa: E402

from soundwave.fused import functional as op  # noqa: E402
from soundwave.kernels import vocab_rows  # noqa: E402

B, T, D, V, U = 2, 6, 16, 96, 2


def linear_ctc(rows: int = B, on_cuda: bool = False, trained: bool = False, **settings: Any) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, T, D, generator=generator, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, requires_grad=trained)
    blank = torch.zeros(D, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    labels = torch.randint(V, (rows, U), generator=generator), T - torch.arange(rows) % 2, 1 + torch.arange(rows) % U
    hidden, weight, *blank = map(to_cuda, (hidden, weight, *blank))
    labels = tuple(map(to_cuda, labels)) if on_cuda else labels

    def call() -> None:
        out = op.linear_ctc_loss(
            hidden, weight, *labels, blank=V, blank_weight=blank[0], blank_bias=blank[1], zero_infinity=True, **settings
        )
        (out.loss.sum() if out.loss.dim() else out.loss).backward()

    return call


def two_chunks(exact: bool) -> Callable[[], None]:
    """180 rows in chunks of 128, the fewest."""
    call, most = linear_ctc(30, exact=exact), vocab_rows.CHUNK_BYTES

    def smaller() -> None:
        vocab_rows.CHUNK_BYTES = 0
        call()
        vocab_rows.CHUNK_BYTES = most

    return smaller


def ctc(on_cuda: bool = False) -> Callable[[], None]:
    log_probs = to_cuda(torch.randn(T, B, V).log_softmax(-1).requires_grad_())
    given = torch.randint(1, V, (B, U)), torch.full((B,), T), torch.full((B,), U)
    given = tuple(map(to_cuda, given)) if on_cuda else given
    return lambda: op.ctc_loss(log_probs, *given).backward()


def cross_entropy(on_cuda: bool = False) -> Callable[[], None]:
    hidden, weight = to_cuda(torch.randn(B, T, D, requires_grad=True)), to_cuda(torch.randn(V, D))
    target = torch.randint(V, (B, T))
    target[:, ::2] = -100
    target = to_cuda(target) if on_cuda else target
    return lambda: op.linear_cross_entropy(hidden, weight, target).backward()


def cross_entropy_with_options() -> Callable[[], None]:
    """Every option, a trained head, per-token losses, and a gradient of lse."""
    hidden, weight, bias = (to_cuda(torch.randn(*shape, requires_grad=True)) for shape in ((B * T, D), (V, D), (V,)))
    class_weight, target = to_cuda(torch.rand(V)), torch.randint(V, (B * T,))
    target[::2] = -100
    options = {"label_smoothing": 0.1, "softcap": 30.0, "z_loss": 1e-4, "reduction": "none", "return_lse": True}

    def call() -> None:
        loss, lse = op.linear_cross_entropy(hidden, weight, target, bias=bias, class_weight=class_weight, **options)
        (loss.sum() + lse.sum()).backward()

    return call


def add_layer_norm() -> Callable[[], None]:
    x, residual = (to_cuda(torch.randn(rows, D, requires_grad=True)) for rows in (T, 2 * T))
    weight, bias = (to_cuda(torch.ones(D, requires_grad=True)) for _ in range(2))
    index = to_cuda(torch.arange(0, 2 * T, 2))
    return lambda: op.add_layer_norm(x, residual, weight, bias, residual_index=index).sum().backward()


def shrink_attention() -> Callable[[], None]:
    query, key, value = (to_cuda(torch.randn(rows, 2, D, requires_grad=True)) for rows in (6, 2 * T, 2 * T))
    bounds = (to_cuda(torch.tensor(x, dtype=torch.int32)) for x in ([0, 4, 6], [0, T, 2 * T]))
    arguments = (query, key, value, *bounds, 4, T)
    return lambda: op.shrink_attention(*arguments).sum().backward()


def path_and_scores() -> tuple[torch.Tensor, torch.Tensor]:
    path = torch.tensor([9, 4, 4, 9, 2, 9]).repeat(B, 1)
    return to_cuda(path), to_cuda(torch.zeros(path.shape))


def ctc_peaks() -> Callable[[], None]:
    path, scores = path_and_scores()
    lengths = torch.tensor([T, T - 1])
    return lambda: op.ctc_peaks(path, lengths, blank=9, scores=scores)


def splice() -> Callable[[], None]:
    embeddings, speech = (
        to_cuda(torch.randn(B, 5, D, requires_grad=True)),
        to_cuda(torch.randn(6, D, requires_grad=True)),
    )
    ids = torch.arange(5).repeat(B, 1)
    bounds = torch.tensor([0, 4, 6], dtype=torch.int32)
    ids, mask, bounds = map(to_cuda, (ids, torch.ones_like(ids), bounds))
    return lambda: op.splice(embeddings, ids, mask, speech, bounds, audio_placeholder_id=2)[0].sum().backward()


# ---- a step of training


def batch_of(stage: int) -> dict[str, torch.Tensor]:
    """What a collator makes of two recordings of different lengths; in stage II one is without a transcript."""
    batch = {"input_features": torch.randn(B, 8, 24), "feature_lengths": torch.tensor([24, 20])}
    labels = torch.tensor([[5, 6], [-100, -100] if stage == 2 else [8, -100]])
    batch["ctc_labels"] = labels
    if stage == 2:
        ids = torch.tensor([[1, V, 20, 21, 22], [1, V, 23, 24, 0]])
        mask = (ids > 0).to(torch.int64)
        answers = torch.where(mask.bool() & (torch.arange(5) > 2), ids, -100)
        batch |= {"input_ids": ids, "attention_mask": mask, "labels": answers}
    return batch


def model_of(stage: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from soundwave.model.configuration import SoundwaveConfig
    from soundwave.model.modeling import SoundwaveForConditionalGeneration, freeze_all_but
    from soundwave.training.stages import TRAINED

    encoder = WhisperEncoder(
        WhisperConfig(d_model=D, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=D, num_mel_bins=8)
    )
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V, hidden_size=D, intermediate_size=D, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2,
        )
    )  # fmt: skip
    config = SoundwaveConfig(
        vocab_size=V, hidden_size=D, audio_hidden_size=D, num_attention_heads=2, audio_placeholder_id=V, stage=stage,
        lora_rank=2, implementation="fused",
    )  # fmt: skip
    model = SoundwaveForConditionalGeneration(config, encoder, language_model if stage > 1 else None)
    if stage > 1:
        model.add_lora()
    else:
        model._head = language_model.get_output_embeddings().weight.detach()
    freeze_all_but(model, TRAINED[stage])
    return to_cuda(model)


def step_of_training(stage: int, accumulation: int = 1) -> Log:
    """The log from the end of the first step of a training to the end of the second."""
    from accelerate import PartialState
    from transformers import TrainerCallback, TrainingArguments

    from soundwave.data.sampling import BucketBatchSampler
    from soundwave.training.trainer import SoundwaveTrainer

    ends: list[Log] = []

    class AtEnds(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(log.copy())

    runs = (*DECIDE, "_shrink_attention_fwd_kernel")  # it writes over NaN, and a step with NaN would be skipped
    with tempfile.TemporaryDirectory() as folder, fake_cuda(runs) as log:
        arguments = TrainingArguments(
            folder, max_steps=3, per_device_train_batch_size=B, gradient_accumulation_steps=accumulation, use_cpu=True,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
            label_names=["labels"], logging_nan_inf_filter=False,
        )  # fmt: skip
        PartialState().device = CUDA
        TrainingArguments.device = property(lambda self: self._setup_devices and CUDA)
        trainer = SoundwaveTrainer(
            model_of(stage), arguments, train_dataset=list(range(3 * B * accumulation)),
            data_collator=lambda _: batch_of(stage), callbacks=[AtEnds()],
            batch_sampler=BucketBatchSampler([1.0] * 3 * B * accumulation, ["x"] * 3 * B * accumulation, B, seed=0),
        )  # fmt: skip
        trainer.train()
    return ends[1].since(ends[0])


OPERATIONS: dict[str, Callable[[], Callable[[], None]]] = {
    "ctc_loss": ctc,
    "ctc_loss, labels and lengths on the GPU": lambda: ctc(on_cuda=True),
    "linear_ctc_loss, exact": lambda: linear_ctc(exact=True),
    "linear_ctc_loss, exact, 5 utterances": lambda: linear_ctc(5, exact=True),
    "linear_ctc_loss, exact, two chunks": lambda: two_chunks(exact=True),
    "linear_ctc_loss, exact, trained head": lambda: linear_ctc(exact=True, trained=True),
    "linear_ctc_loss, exact, labels and lengths on the GPU": lambda: linear_ctc(exact=True, on_cuda=True),
    "linear_ctc_loss, skipping": lambda: linear_ctc(exact=False),
    "linear_ctc_loss, skipping, two chunks": lambda: two_chunks(exact=False),
    "linear_ctc_loss, skipping, reduction none": lambda: linear_ctc(exact=False, reduction="none"),
    "linear_cross_entropy": cross_entropy,
    "linear_cross_entropy, every option": cross_entropy_with_options,
    "linear_cross_entropy, target on the GPU": lambda: cross_entropy(on_cuda=True),
    "add_layer_norm": add_layer_norm,
    "shrink_attention": shrink_attention,
    "ctc_peaks": ctc_peaks,
    "splice": splice,
}
STEPS = {"a step of stage I": 1, "a step of stage II": 2}


def count(prepared: Callable[[], Callable[[], None]]) -> Log:
    call = prepared()
    with fake_cuda() as log:
        call()
    return log


def table() -> dict[str, dict[str, Any]]:
    """For each case the waits and launches as `[kind, line, number]`."""
    prepare()
    logs = {name: count(prepared) for name, prepared in OPERATIONS.items()}
    logs |= {name: step_of_training(stage) for name, stage in STEPS.items()}
    return {
        name: {
            what: sorted([*key, number] for key, number in counter.items())
            for what, counter in (("waits", log.waits), ("launches", log.launches))
        }
        for name, log in logs.items()
    }


if __name__ == "__main__":
    cases = table()
    if "--write" in sys.argv:
        DOCUMENT.write_text(document(cases))
    else:
        json.dump(cases, sys.stdout)
