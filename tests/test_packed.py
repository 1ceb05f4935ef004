"""Packed rows give what padded ones give: encoder, adapters, CTC, peaks, splice, and training on packed sequences.

Two models share their parameters; one of them pads. In float32 sums have another order, which gives a few roundings at
the width of the widest product: losses agree within 1e-5.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from soundwave import eager, fused
from soundwave.eager import IGNORE_INDEX
from soundwave.fused import functional as op
from soundwave.fused.sequences import splice_packed
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import SoundwaveForConditionalGeneration, freeze_all_but
from soundwave.model.packed import ATTENTION, encode_packed, reason_against_packing
from soundwave.training.stages import TRAINED

V, D, HEADS, MELS, WIDTH = 50, 32, 4, 8, 16
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SIZES = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "attention_dropout": 0.0,
}  # fmt: skip
# Settings of a family, which is named up to the first dash. A window of 5 is shorter than the sequences.
PACKED = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": 5}, "smollm3": {"no_rope_layer_interval": 2},
    "olmo2": {}, "phi3": {}, "granite": {}, "gemma": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "deepseek_v3": {  # its heads of values are smaller than those of keys
        "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1,
    },
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
}  # fmt: skip
PADDED = {
    "gpt2": {
        "n_embd": D, "n_head": HEADS, "n_layer": 2, "n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "bloom": {"n_head": HEADS, "n_layer": 2},
    "gemma2": {"attn_logit_softcapping": 50.0},
    "mistral-dropout": {"attention_dropout": 0.1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}  # fmt: skip
REASONS = {
    "gpt2": "it has no rotary embeddings",
    "bloom": "its attention is not in transformers' registry",
    "gemma2": "its attention caps the logits",
    "mistral-dropout": "its attention has a dropout of 0.1",
    "lfm2": "it has layers of the kind 'conv'",
}


def language_model(family: str, **settings):
    config = AutoConfig.for_model(family.partition("-")[0], **(SIZES | settings))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def encoder(layers: int = 2) -> WhisperEncoder:
    torch.manual_seed(1)
    config = WhisperConfig(
        d_model=WIDTH, encoder_layers=layers, encoder_attention_heads=2, encoder_ffn_dim=32, num_mel_bins=MELS
    )
    return WhisperEncoder(config).eval()


def model_of(family: str = "llama", stage: int = 2, **changes) -> SoundwaveForConditionalGeneration:
    """A model without any randomness in training."""
    without = {"adapter_dropout": 0.0, "spec_augment_time_masks": 0, "spec_augment_mel_masks": 0, "lora_rank": 0}
    config = SoundwaveConfig(
        vocab_size=V, hidden_size=D, audio_hidden_size=WIDTH, num_attention_heads=HEADS, audio_placeholder_id=V,
        stage=stage, exact=True, **without | changes,
    )  # fmt: skip
    llm = language_model(family, **(PACKED | PADDED)[family])
    torch.manual_seed(2)
    model = SoundwaveForConditionalGeneration(config, encoder(), llm)
    with torch.no_grad():
        for parameter in (model.shrinking.out_proj.weight, model.blank_weight):
            parameter.normal_(std=0.3)
        model.blank_bias.fill_(2.0)
    if config.lora_rank:
        model.add_lora()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    freeze_all_but(model, TRAINED[stage] if config.lora_rank else ("alignment.", "blank_", "shrinking.", "language_"))
    return model.train()


def padded(model: SoundwaveForConditionalGeneration) -> SoundwaveForConditionalGeneration:
    """The same model, which pads."""
    config = SoundwaveConfig(**model.config.to_diff_dict() | {"packed": False})
    other = SoundwaveForConditionalGeneration(config, model.audio_tower, model.language_model)
    other.load_state_dict({k: v for k, v in model.state_dict(keep_vars=True).items()}, assign=True, strict=False)
    return other.train(model.training)


# Mel frames of each recording (None: text alone), tokens of the prompt and of the answer.
BATCHES = {
    "mixture": ([61, None, 20, 33], [5, 9, 6, 3], [4, 2, 7, 1]),
    "one-recording": ([40], [4], [3]),
    "one-text": ([None], [6], [3]),
    "shortest": ([1, 2, 3], [2, 3, 2], [1, 1, 1]),
    "text-only": ([None, None], [3, 8], [2, 5]),
    "one-of-30-s": ([3000, 100], [4, 4], [3, 3]),
    "equal": ([32, 32], [4, 4], [3, 3]),
}


def batch_of(recordings, prompts, answers, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = max(p + a for p, a in zip(prompts, answers, strict=True))
    ids = torch.randint(3, V, (len(prompts), size), generator=generator)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, (mels, prompt, answer) in enumerate(zip(recordings, prompts, answers, strict=True)):
        mask[row, : prompt + answer] = 1
        ids[row, prompt + answer :] = 0
        labels[row, prompt : prompt + answer] = ids[row, prompt : prompt + answer]
        if mels is not None:
            ids[row, 1] = V
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    lengths = torch.tensor([mels for mels in recordings if mels is not None])
    if len(lengths):
        features = torch.randn(len(lengths), MELS, int(lengths.max()), generator=generator)
        features.masked_fill_(~eager.length_mask(lengths, features.shape[2])[:, None], torch.nan)
        targets = torch.randint(3, V, (len(lengths), 3), generator=generator)
        targets[0, 1:] = IGNORE_INDEX
        if len(lengths) > 2:
            targets[1] = IGNORE_INDEX  # a recording without a transcript
        batch |= {"input_features": features, "feature_lengths": lengths, "ctc_labels": targets}
    return batch


def losses_and_gradients(model, batch) -> tuple[list[Tensor], dict[str, Tensor]]:
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    found = [x for x in (out.loss, out.ctc_loss, out.lm_loss) if x is not None]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in found], gradients


def assert_same(model, batch) -> None:
    other = padded(model)
    losses, gradients = losses_and_gradients(model, batch)
    wanted, expected = losses_and_gradients(other, batch)
    for found, want in zip(losses, wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys() and gradients
    for name, want in expected.items():
        torch.testing.assert_close(gradients[name], want, rtol=1e-3, atol=1e-4 * float(want.abs().max()) + 1e-7)


# ---------------------------------------------------------------- the whole model


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_losses_and_gradients_are_those_of_padded_rows(batch):
    assert_same(model_of(), batch_of(*batch))


@pytest.mark.parametrize("family", PACKED)
def test_every_family_trains_on_packed_sequences(family):
    model = model_of(family)
    assert reason_against_packing(model.language_model) == ""
    assert_same(model, batch_of(*BATCHES["mixture"]))
    assert model.language_model.config._attn_implementation == ATTENTION


@pytest.mark.parametrize("family", PADDED)
def test_a_family_that_cannot_be_packed_is_padded_and_says_why_once(family):
    model, batch = model_of(family), batch_of(*BATCHES["mixture"])
    with pytest.warns(UserWarning, match=f"trains on padded sequences, because {REASONS[family]}"):
        model(**batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch)
    assert model.language_model.config._attn_implementation != ATTENTION
    if "dropout" not in family:
        assert_same(model, batch)


@pytest.mark.parametrize("changes", [{"semantics": "released"}, {"keep": "frames", "keys": "none"}, {"frame_stack": 3}])
def test_every_rule_holds_on_packed_rows(changes):
    model, batch = model_of(**changes), batch_of(*BATCHES["mixture"])
    if changes.get("keys") == "none":
        freeze_all_but(model, ("alignment.", "blank_", "language_"))
    assert_same(model, batch)


@pytest.mark.parametrize("stage", TRAINED)
def test_every_stage_trains_the_same_on_packed_rows(stage):
    model, batch = model_of(stage=stage, lora_rank=2), batch_of(*BATCHES["mixture"])
    if stage == 1:
        batch = {name: batch[name] for name in ("input_features", "feature_lengths", "ctc_labels")}
    elif stage == 3:
        del batch["ctc_labels"]
    assert_same(model, batch)


def test_gradient_checkpointing_changes_nothing():
    model, batch = model_of(lora_rank=2), batch_of(*BATCHES["mixture"])
    losses, gradients = losses_and_gradients(model, batch)
    model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    again, others = losses_and_gradients(model, batch)
    assert losses == again and all(torch.equal(gradients[name], others[name]) for name in gradients)


def test_a_training_step_builds_no_mask_of_all_rows_and_pads_nothing():
    """No tensor of a step has as many rows as padded sequences would, nor a square of all rows."""
    model, batch = model_of(), batch_of(*BATCHES["mixture"])
    sizes: set[tuple[int, ...]] = set()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.update(tuple(x.shape) for x in tree_leaves(out) if isinstance(x, Tensor))
            return out

    seen = []
    hook = model.language_model.base_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or kwargs["hidden_states"])[0].shape), with_kwargs=True
    )
    with Sizes():
        model(**batch).loss.backward()
    hook.remove()
    (shape,) = {tuple(shape) for shape in seen}
    assert shape[0] == 1 or len(shape) == 2
    rows = shape[-2]
    assert not any(size[-2:] == (rows, rows) for size in sizes)


def test_every_sequence_begins_at_position_0():
    """Rotary embeddings alone would not tell: they see the distance of two rows."""
    model, seen = model_of(), []
    model.language_model.base_model.register_forward_pre_hook(
        lambda _, __, given: seen.append((given["position_ids"], given["attention_mask"])), with_kwargs=True
    )
    model(**batch_of(*BATCHES["mixture"]))
    ((positions, bounds),) = seen
    lengths = bounds[0, 0, 0].diff()
    assert bounds.dtype == torch.int32 and bounds.shape[1] == int(lengths.max()) and len(lengths) == 4
    assert torch.equal(positions[0], torch.cat([torch.arange(int(n)) for n in lengths]))


def test_lora_reads_bfloat16_as_it_is_under_autocast():
    """peft would cast it to float32, and autocast back; the products are the same."""
    model, batch = model_of(lora_rank=2), batch_of(*BATCHES["mixture"])
    for part in (model.audio_tower, model.language_model):
        for name, parameter in part.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
    seen = set()
    for name, module in model.language_model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype))
    losses, gradients = losses_and_gradients(model, batch)
    assert seen == {torch.bfloat16}
    model.language_model.gradient_checkpointing_enable({"use_reentrant": False})  # backward computes outside of it
    again, others = losses_and_gradients(model, batch)
    assert seen == {torch.bfloat16, torch.float32}
    assert losses == again and all(torch.equal(gradients[name], others[name]) for name in gradients)


def test_the_last_mlp_computes_the_rows_of_answers_alone():
    model, (recordings, prompts, answers) = model_of(), BATCHES["mixture"]
    shapes = []
    layers = model.language_model.base_model.layers
    for layer in layers:
        layer.mlp.up_proj.register_forward_hook(lambda _, inputs, out: shapes.append(tuple(out.shape)))
    batch = batch_of(recordings, prompts, answers)
    model(**batch).loss.backward()
    (first, rows, _), last = shapes
    assert first == 1 and rows > sum(answers) + len(recordings)
    assert last == (1, sum(answers), SIZES["intermediate_size"])
    assert not layers[-1].mlp._forward_pre_hooks and not layers[-1].mlp._forward_hooks


def test_generation_and_logits_are_those_of_a_model_that_pads():
    model = model_of().eval()
    batch = batch_of(*BATCHES["mixture"])
    inputs = {name: x for name, x in batch.items() if "labels" not in name}
    other = padded(model)
    expected = other.generate(**inputs, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        before = model(**batch).logits
    model.train()(**batch)  # from here on its attention is ours
    model.eval()
    assert model.language_model.config._attn_implementation == ATTENTION
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, before, **CLOSE)


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize("lengths", [[61, 20, 33], [1, 2, 3, 4], [3000, 1], [7], [10, 10]], ids=str)
def test_the_encoder_gives_each_clip_what_it_gives_it_alone(lengths):
    tower, lengths = encoder(), torch.tensor(lengths)
    features = torch.randn(len(lengths), MELS, int(lengths.max()) + 3)
    features.masked_fill_(~eager.length_mask(lengths, features.shape[2])[:, None], torch.nan)
    with torch.no_grad():
        rows, counts = encode_packed(tower, features, lengths)
        assert counts.tolist() == [-(-n // 2) for n in lengths.tolist()]
        for i, clip in enumerate(rows.split(counts.tolist())):
            alone = SoundwaveForConditionalGeneration.encode(
                SimpleNamespace(
                    audio_tower=tower, packed=False, compute_dtype=torch.float32, config=SoundwaveConfig()
                ),
                features[i : i + 1, :, : int(lengths[i])], lengths[i : i + 1],
            )[0][0]  # fmt: skip
            torch.testing.assert_close(clip, alone, **CLOSE)


def test_the_encoder_does_not_see_neighbours():
    tower, lengths = encoder(), torch.tensor([9, 12, 5])
    features = torch.randn(3, MELS, 12)
    with torch.no_grad():
        first, counts = encode_packed(tower, features, lengths)
        features[1] = 1e3
        second, _ = encode_packed(tower, features, lengths)
    start, stop = int(counts[0]), int(counts[:2].sum())
    torch.testing.assert_close(first[:start], second[:start], rtol=0, atol=1e-6)
    torch.testing.assert_close(first[stop:], second[stop:], rtol=0, atol=1e-6)
    assert not torch.allclose(first[start:stop], second[start:stop])


ROWS = {"mixture": [5, 1, 8, 0], "one": [7], "equal": [4, 4], "no-rows": [0, 0]}


def rows_and_padded(lengths: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Packed rows, and the same padded with values that nobody may see."""
    rows = torch.randn(sum(lengths), width)
    out = torch.full((len(lengths), max(lengths) + 2, width), 1e4)
    for i, part in enumerate(rows.split(lengths)):
        out[i, : len(part)] = part
    return rows.requires_grad_(), out.requires_grad_()


def valid(padded_rows: Tensor, lengths) -> Tensor:
    return torch.cat([row[:n] for row, n in zip(padded_rows, lengths, strict=True)])


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("attend", ["frames", "self"])
@pytest.mark.parametrize("stack", [1, 2, 3])
def test_the_alignment_adapter_takes_either_form(lengths, attend, stack):
    config = SimpleNamespace(
        audio_hidden_size=6, hidden_size=D, num_attention_heads=HEADS, frame_stack=stack, attend=attend,
        adapter_dropout=0.0, layer_norm_eps=1e-5,
    )  # fmt: skip
    adapter = fused.AlignmentAdapter(config)
    rows, frames = rows_and_padded(lengths, 6)
    hidden, counts = adapter(rows, lengths)
    expected, wanted = adapter(frames, lengths)
    assert torch.equal(counts, wanted)
    torch.testing.assert_close(hidden, valid(expected, counts), **CLOSE)
    upstream = torch.randn_like(hidden)
    (found,) = torch.autograd.grad((hidden * upstream).sum(), rows)
    (want,) = torch.autograd.grad((valid(expected, counts) * upstream).sum(), frames)
    torch.testing.assert_close(found, valid(want, lengths), **CLOSE)


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("keep", ["peaks", "runs"])
@pytest.mark.parametrize("keys", ["all", "kept", "none"])
def test_ctc_peaks_and_the_shrinking_adapter_take_either_form(lengths, keep, keys):
    rows, hidden = rows_and_padded(lengths, D)
    path, scores = torch.randint(3, (len(rows),)), torch.randn(len(rows))
    padded_path, padded_scores = (x.new_zeros(hidden.shape[:2]) for x in (path, scores))
    for i, (ids, values) in enumerate(zip(path.split(lengths), scores.split(lengths), strict=True)):
        padded_path[i, : len(ids)], padded_scores[i, : len(ids)] = ids, values
    peaks = op.ctc_peaks(path, lengths, blank=0, keep=keep, scores=scores)
    expected = op.ctc_peaks(padded_path, lengths, blank=0, keep=keep, scores=padded_scores)
    assert torch.equal(peaks.cu_seqlens, expected.cu_seqlens) and peaks.max_seqlen == expected.max_seqlen
    assert torch.equal(rows[peaks.index], hidden.flatten(0, 1)[expected.index])
    adapter = fused.ShrinkingAdapter(
        SimpleNamespace(hidden_size=D, num_attention_heads=HEADS, keys=keys, layer_norm_eps=1e-5)
    )
    out, wanted = adapter(rows, lengths, peaks), adapter(hidden, lengths, expected)
    torch.testing.assert_close(out, wanted, **CLOSE)
    upstream = torch.randn_like(out)
    (found,) = torch.autograd.grad((out * upstream).sum(), rows)
    (want,) = torch.autograd.grad((wanted * upstream).sum(), hidden)
    torch.testing.assert_close(found, valid(want, lengths), **CLOSE)


@pytest.mark.parametrize("lengths", [[5, 3, 8], [7], [4, 4]], ids=str)
def test_linear_ctc_takes_either_form(lengths):
    rows, hidden = rows_and_padded(lengths, D)
    weight, blank = torch.randn(V, D), torch.randn(D)
    targets, counts = torch.randint(V, (len(lengths), 2)), torch.tensor([1, 2, 2][: len(lengths)])
    results = []
    for x in (rows, hidden):
        out = op.linear_ctc_loss(
            x, weight, targets, lengths, counts, blank=V, blank_weight=blank, zero_infinity=True, exact=True
        )
        results.append((*out[:3], *torch.autograd.grad(out.loss, x)))
        path = op.linear_ctc_path(x, weight, lengths, blank=V, blank_weight=blank)
        assert torch.equal(path[0], out.path)
    (loss, path, scores, gradient), (wanted, *others) = results
    assert torch.equal(path, valid(others[0], lengths))
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(scores, valid(others[1], lengths))
    torch.testing.assert_close(gradient, valid(others[2], lengths), **CLOSE)


SPLICED = {
    "mixture": ([4, 2, 5], [True, False, True], [3, 2]),
    "text": ([2, 3], [False, False], []),
    "empty-speech": ([2, 3], [True, True], [0, 4]),
    "one": ([1], [True], [5]),
    "nothing": ([0, 0], [False, False], []),
}


@pytest.mark.parametrize(("tokens", "spoken", "speech"), SPLICED.values(), ids=SPLICED)
def test_splice_without_padding_is_splice_without_its_padding(tokens, spoken, speech):
    size = max(tokens) + 1
    ids = torch.randint(3, V, (len(tokens), size))
    mask = (torch.arange(size) < torch.tensor(tokens)[:, None]).long()
    for row, has in enumerate(spoken):
        if has:
            ids[row, tokens[row] // 2] = V
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    bounds = torch.tensor([0, *speech]).cumsum(0)
    given = [torch.randn(*shape, requires_grad=True) for shape in ((len(tokens), size, D), (sum(speech), D))]
    call = {"audio_placeholder_id": V, "labels": labels}
    packed = splice_packed(given[0], ids, mask, given[1], bounds, **call)
    expected = op.splice(given[0], ids, mask, given[1], bounds, **call)
    kept = expected.attention_mask.bool()
    assert torch.equal(packed.embeddings, expected.embeddings[kept]) and torch.equal(
        packed.labels, expected.labels[kept]
    )
    assert packed.cu_seqlens.diff().tolist() == kept.sum(1).tolist()
    assert packed.max_seqlen == int(kept.sum(1).max())
    upstream = torch.randn_like(packed.embeddings)
    found = torch.autograd.grad((packed.embeddings * upstream).sum(), given)
    wanted = torch.autograd.grad((expected.embeddings[kept] * upstream).sum(), given)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: op.ctc_peaks(torch.zeros(5, dtype=torch.int64), [3, 1], blank=0, keep="runs"), "5 packed rows"),
        (lambda: op.linear_ctc_path(torch.randn(5, D), torch.randn(V, D), [3, 3], blank=0), "5 packed rows"),
        (lambda: op.linear_ctc_path(torch.randn(2, D), torch.randn(V, D), [3, -1], blank=0), "2 packed rows"),
        (lambda: model_of().alignment(torch.randn(5, WIDTH), [3, 1]), "lengths add up to 4, but there are 5"),
    ],
    ids=["peaks", "path", "negative", "alignment"],
)
def test_lengths_that_do_not_add_up_to_the_packed_rows_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
