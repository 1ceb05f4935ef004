"""Checkpoints in the layout of the released one: what they compute, their conversion, training from them, bad ones.

The reference is written from the description of the released code in plain PyTorch: `nn.TransformerEncoderLayer` with
batch_first off, `nn.MultiheadAttention` with a padding mask, `F.ctc_loss`, one clip at a time. The checkpoint is tiny
and random; Whisper's encoder and Llama are transformers' own.

case                                        what must hold
from_pretrained, either implementation      logits, kept frames, loss and gradients within 2e-4 in float32
soundwave.load, 4 bits, stage I's part      answers; the language model in 4 bits; no language model
convert, there and back                     every tensor the same bits, all other files the same bytes
training stages II and III                  checkpoint, resume, saved model; the backbones stay in the released folder
damage                                      one line, before a weight is read
"""

import json
import math
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import soundwave
from soundwave.backbones import check, shards
from soundwave.inference.answer import answer
from soundwave.inference.long import transcribe
from soundwave.model import pretrained
from soundwave.model.configuration import CONFIG_VERSION, SoundwaveConfig
from soundwave.model.merging import merge
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.model.processing import SoundwaveProcessor
from soundwave.model.released import convert
from soundwave.report.utterances import examine
from tests.released import (
    END,
    FRAMES,
    HEADS,
    LAYER,
    LBM,
    PLACEHOLDER,
    WINDOW,
    D,
    E,
    V,
    llama_config,
    random_tensors,
    whisper_config,
    write_released,
)
from tests.short_runs import SETTINGS, copy_recordings, manifest_of, same_bits, train

CLOSE = {"rtol": 2e-4, "atol": 2e-4}
# ---------------------------------------------------------------- the checkpoint


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return random_tensors()


@pytest.fixture(scope="module")
def released(state, tmp_path_factory) -> Path:
    return write_released(tmp_path_factory.mktemp("released") / "Soundwave", state)


@pytest.fixture
def copy(released, tmp_path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(released, tmp_path / "copy"))


# ---------------------------------------------------------------- the reference


class Reference(nn.Module):
    """The released model, one clip at a time, from its description."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        self.tower, self.llama = WhisperEncoder(whisper_config()), LlamaForCausalLM(llama_config())
        self.projector, self.out_norm = nn.Linear(2 * E, D), nn.LayerNorm(D)
        self.layer = nn.TransformerEncoderLayer(D, HEADS, 2 * D, dropout=0.0, norm_first=True)  # batch_first is off
        self.attention, self.norm = nn.MultiheadAttention(D, HEADS, batch_first=True), nn.LayerNorm(D)
        self.head = nn.Linear(D, V, bias=False)
        self.parts = {
            "model.audio_tower.": self.tower, "model.mm_projector1.": self.projector, LAYER: self.layer,
            "model.out_norm.": self.out_norm, "model.audio_feature_head.": self.head,
            f"{LBM}encoder_attn.": self.attention, f"{LBM}atten_layer_norm.": self.norm, "": self.llama,
        }  # fmt: skip
        for prefix, part in self.parts.items():
            part.load_state_dict({name: state[f"{prefix}{name}"] for name in part.state_dict()})
        self.tower.requires_grad_(False)
        self.eval()

    def frames(self, features: torch.Tensor) -> torch.Tensor:
        """All frames [T, D] of one window [n_mels, T_mel]."""
        encoded = self.tower(features[None]).last_hidden_state
        hidden = self.projector(encoded.reshape(1, encoded.shape[1] // 2, 2 * E))
        return self.out_norm(self.layer(hidden))[0]  # [1, T, D] in a layer that reads [sequence, batch, D]

    def kept(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which frames begin a run of the head's argmax bool [T], and the shrunk ones [K, D]."""
        tokens = self.head(frames).argmax(-1)
        first = torch.ones(len(tokens), dtype=torch.bool)
        first[1:] = tokens[1:] != tokens[:-1]
        queries = frames[first][None]
        attended, _ = self.attention(queries, frames[None], frames[None], key_padding_mask=~first[None])
        return first, self.norm(queries + attended)[0]

    def prompt(self, ids: list[int], speech: torch.Tensor) -> torch.Tensor:
        """Embeddings [L, D] of tokens whose placeholder is replaced by kept frames."""
        place = ids.index(PLACEHOLDER)
        text = self.llama.get_input_embeddings()(torch.tensor(ids))
        return torch.cat([text[:place], speech, text[place + 1 :]])

    def forward(self, features, prompts, answers, transcripts):
        """Kept frames and logits of each clip, and the loss of the batch: next token + 0.3 CTC."""
        kept, logits, wanted, predicted, ctc = [], [], [], [], []
        for clip, prompt, said in zip(features, prompts, answers, strict=True):
            frames = self.frames(clip)
            first, speech = self.kept(frames)
            kept.append(first.nonzero()[:, 0])
            embeddings = self.prompt(prompt + said, speech)
            out = self.llama(inputs_embeds=embeddings[None]).logits[0]
            logits.append(out)
            # The label of each kept frame is -100; logits at n are compared with the label at n + 1.
            labels = torch.full((len(embeddings),), -100)
            labels[len(embeddings) - len(said) :] = torch.tensor(said)
            predicted.append(out[:-1])
            wanted.append(labels[1:])
            ctc.append(self.head(frames).log_softmax(-1))
        lm = F.cross_entropy(torch.cat(predicted), torch.cat(wanted))
        targets = nn.utils.rnn.pad_sequence([torch.tensor(t) for t in transcripts], True, -100)
        sizes = torch.tensor([len(t) for t in transcripts])
        size = torch.full((len(ctc),), FRAMES)
        loss = F.ctc_loss(
            torch.stack(ctc, 1), targets, size, sizes, blank=PLACEHOLDER, reduction="mean", zero_infinity=True
        )
        return kept, logits, lm + 0.3 * loss


@pytest.fixture(scope="module")
def reference(state) -> Reference:
    return Reference(state)


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    """Three clips of noise, each of another length and loudness, the last one a whole window."""
    noise, found = np.random.default_rng(0), []
    for seconds, pace in ((0.7, 900), (1.9, 2000), (WINDOW, 4000)):
        time = np.arange(int(16_000 * seconds))
        found.append((noise.standard_normal(len(time)) * np.sin(time / pace) / 8).astype(np.float32))
    return found


PROMPTS = ["What is said?", "Say it again, please.", "Hm?"]
ANSWERS, TEXTS = ["yes", "no, never", "a b"], ["aa b", "to be", "yes"]


def batch_of(processor, clips):
    return dict(processor(PROMPTS[: len(clips)], clips, ANSWERS[: len(clips)], TEXTS[: len(clips)]))


def of_reference(reference, processor, clips):
    """Kept frames, logits and loss of the reference, whose features Whisper's own extractor makes."""
    extract = WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW)
    features = torch.from_numpy(extract(clips, sampling_rate=16_000, return_tensors="np")["input_features"])
    assert features.shape[1:] == (80, 100 * WINDOW)
    prompts = [processor.prompt_ids(prompt) for prompt in PROMPTS[: len(clips)]]
    answers = [processor.answer_ids(said) for said in ANSWERS[: len(clips)]]
    return reference(features, prompts, answers, [processor.ctc_ids(text) for text in TEXTS[: len(clips)]])


STILL = {"adapter_dropout": 0.0, "spec_augment_time_masks": 0, "spec_augment_mel_masks": 0}


def load(folder, **changes):
    return SoundwaveForConditionalGeneration.from_pretrained(folder, **STILL | changes)


# ---------------------------------------------------------------- the same as the reference


IMPLEMENTATIONS = {
    "fused": {}, "fused, padded": {"packed": False}, "eager": {"implementation": "eager"},
}  # fmt: skip


@pytest.mark.parametrize("changes", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("count", [1, 3])
def test_logits_and_kept_frames_are_those_of_the_reference(released, reference, clips, changes, count):
    model, processor = load(released, **changes), SoundwaveProcessor.from_pretrained(released)
    batch = batch_of(processor, clips[:count])
    with torch.no_grad():
        kept, logits, loss = of_reference(reference, processor, clips[:count])
        out = model(**batch)
        _, lengths, ctc = model.align(batch["input_features"], batch["feature_lengths"])
        peaks = model.kept_frames(ctc, lengths)
    assert lengths.tolist() == [FRAMES] * count
    assert min(map(len, kept)) > 3 and max(map(len, kept)) < FRAMES  # frames are dropped, and some are kept
    assert peaks.index.tolist() == [FRAMES * i + int(frame) for i, rows in enumerate(kept) for frame in rows]
    for row, expected in zip(out.logits, logits, strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, **CLOSE)
    torch.testing.assert_close(out.loss, loss, **CLOSE)


def test_the_blank_is_among_the_labels_that_are_read(released, clips):
    """Otherwise the other tests would not see which row of the head it is."""
    model, processor = load(released), SoundwaveProcessor.from_pretrained(released)
    path = model(**processor.pad_features([processor.features(clips[1])])).path
    share = float((path == PLACEHOLDER).float().mean())
    assert model.blank == PLACEHOLDER and 0.05 < share < 0.95


def check_gradient(name, found, wanted):
    error, norm = (float(torch.linalg.vector_norm(x)) for x in (found - wanted, wanted))
    assert error <= 2e-4 * norm and norm > 0, f"{name}: the gradient differs by {error:.2g}, its norm is {norm:.2g}"


@pytest.mark.parametrize("changes", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_loss_and_gradients_of_training_are_those_of_the_reference(released, state, clips, changes):
    reference, processor = Reference(state), SoundwaveProcessor.from_pretrained(released)
    *_, loss = of_reference(reference, processor, clips)
    loss.backward()
    model = load(released, **changes).train().requires_grad_(True)
    model.audio_tower.requires_grad_(False)
    out = model(**batch_of(processor, clips))
    out.loss.backward()
    torch.testing.assert_close(out.loss, loss, **CLOSE)
    found = {name: p.grad for name, p in model.named_parameters()}
    expected = {
        "alignment.projector.": reference.projector, "alignment.layer.": reference.layer,
        "alignment.out_norm.": reference.out_norm, "shrinking.norm.": reference.norm,
        "shrinking.": reference.attention, "language_model.": reference.llama,
    }  # fmt: skip
    compared = {"ctc_head"}
    check_gradient("ctc_head", found["ctc_head"], reference.head.weight.grad)
    for prefix, part in expected.items():
        for name, parameter in part.named_parameters():
            check_gradient(name, found[f"{prefix}{name}"], parameter.grad)
            compared.add(f"{prefix}{name}")
    assert compared == {name for name, p in model.named_parameters() if p.requires_grad}


def test_answers_are_those_of_the_reference_one_by_one(released, reference, clips):
    model, processor = load(released), SoundwaveProcessor.from_pretrained(released)
    extract = WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW)
    written = []
    with torch.no_grad():
        for prompt, clip in zip(PROMPTS, clips, strict=True):
            features = torch.from_numpy(extract([clip], sampling_rate=16_000, return_tensors="np")["input_features"])[0]
            _, speech = reference.kept(reference.frames(features))
            embeddings = reference.prompt(processor.prompt_ids(prompt), speech)
            tokens: list[int] = []
            while len(tokens) < 8 and END not in tokens:
                logits = reference.llama(inputs_embeds=embeddings[None]).logits[0, -1]
                tokens.append(int(logits.argmax()))
                more = reference.llama.get_input_embeddings()(torch.tensor(tokens[-1:]))
                embeddings = torch.cat([embeddings, more])
            written.append(processor.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    found = answer(model, processor, PROMPTS, [processor.features(clip) for clip in clips], max_new_tokens=8)
    assert found == written and len(set(written)) > 1


def test_features_of_another_length_are_refused(released, clips):
    model, processor = load(released), SoundwaveProcessor.from_pretrained(released)
    features = processor.features(clips[0])
    assert features.shape == (80, 100 * WINDOW)
    with pytest.raises(ValueError, match=r"input_features has 60 mel frames .* reads whole windows of 300 \(3 s\)"):
        model(input_features=features[None, :, :60])
    with pytest.raises(ValueError, match="feature_lengths goes down to 60"):
        model(input_features=features[None], feature_lengths=torch.tensor([60]))


def test_a_prompt_holds_the_checkpoints_own_placeholder(released):
    processor = SoundwaveProcessor.from_pretrained(released)
    assert processor.prompt_ids("Hm?").count(PLACEHOLDER) == 1
    assert len(processor.tokenizer) == V  # no token was added
    assert PLACEHOLDER not in processor.prompt_ids("<audio_patch>", has_audio=False)
    assert PLACEHOLDER not in processor.ctc_ids("<audio_patch>")


# ---------------------------------------------------------------- loading


def test_one_file_loads_as_shards_do(released, state, tmp_path):
    single = write_released(tmp_path / "single", state, shards=1)
    found, wanted = load(single).state_dict(), load(released).state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_16_bits_load(state, tmp_path, dtype):
    folder = write_released(tmp_path / "half", {name: x.to(dtype) for name, x in state.items()})
    model = load(folder, dtype=torch.bfloat16)
    name = "model.mm_projector1.weight"
    assert torch.equal(model.alignment.projector.weight, state[name].to(dtype).float())
    assert {model.ctc_head.dtype, model.audio_tower.conv1.weight.dtype, model.head_weight.dtype} == {torch.bfloat16}


def test_the_language_model_loads_in_4_bits(released, clips):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, processor = load(released, quantization="nf4"), SoundwaveProcessor.from_pretrained(released)
    linear = [m for m in model.language_model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(linear) == 14 and type(model.language_model) is LlamaForCausalLM
    assert torch.isfinite(model(**batch_of(processor, clips[:1])).loss)


def test_without_its_language_model_it_reads_by_ctc(released, clips):
    model, processor = load(released, language_model=False), SoundwaveProcessor.from_pretrained(released)
    whole = load(released)
    inputs = processor.pad_features([processor.features(clips[1])])
    with torch.no_grad():
        assert model.language_model is None and torch.equal(model(**inputs).path, whole(**inputs).path)


def test_loading_says_nothing(released, capfd, monkeypatch):
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)  # the bar of the weights, as in the commands
    load(released)
    assert capfd.readouterr() == ("", "")


def test_load_and_transcribe_take_the_folder(released, clips, tmp_path):
    import soundfile

    loaded = soundwave.load(released)
    soundfile.write(tmp_path / "a.wav", clips[1], 16_000)
    found = transcribe(tmp_path / "a.wav", loaded, max_new_tokens=4)
    assert loaded.model.config.semantics == "released" and found.seconds == pytest.approx(1.9)


def test_the_number_of_mel_bins_is_that_of_the_weights(state, tmp_path):
    """Whisper-large-v2 and -v3 differ in nothing else, and the public configuration names one of them."""
    wide = state | {"model.audio_tower.conv1.weight": torch.randn(E, 128, 3)}
    folder = write_released(tmp_path / "wide", wide)
    model, processor = load(folder), SoundwaveProcessor.from_pretrained(folder)
    assert model.audio_tower.conv1.weight.shape[1] == processor.feature_extractor.feature_size == 128


# ---------------------------------------------------------------- conversion


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def others_in(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_conversion_there_and_back_changes_no_bit(state, tmp_path, shards, dtype):
    source = write_released(tmp_path / "source", {name: x.to(dtype) for name, x in state.items()}, shards)
    assert convert(source, tmp_path / "ours") == "soundwave"
    assert convert(tmp_path / "ours", tmp_path / "back") == "released"
    found, wanted = tensors_in(tmp_path / "back"), tensors_in(source)
    assert found.keys() == wanted.keys() and all(
        found[name].dtype == dtype and torch.equal(found[name].view(torch.uint8), wanted[name].view(torch.uint8))
        for name in wanted
    )
    assert others_in(tmp_path / "back") == others_in(source)
    assert {p.name for p in (tmp_path / "back").iterdir()} == {p.name for p in source.iterdir()}


def test_a_converted_checkpoint_computes_the_same_bits_and_can_be_moved(released, clips, tmp_path):
    convert(released, tmp_path / "ours")
    moved = (tmp_path / "ours").rename(tmp_path / "moved")
    batch = batch_of(SoundwaveProcessor.from_pretrained(released), clips)
    again = batch_of(SoundwaveProcessor.from_pretrained(moved), clips)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    with torch.no_grad():
        found, wanted = load(moved)(**batch), load(released)(**batch)
    assert torch.equal(found.logits, wanted.logits) and torch.equal(found.loss, wanted.loss)


def test_a_converted_checkpoint_is_read_by_transformers_alone(released, tmp_path, clips):
    convert(released, tmp_path / "ours")
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "ours" / "backbones" / "language_model")
    assert torch.equal(llama.lm_head.weight, load(released).head_weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_rank": 4}, "has LoRA matrices, .*soundwave merge"),
        ({"keep": "peaks"}, "keep = 'peaks', which the released layout cannot say: there it is 'runs'"),
        ({"frame_stack": 3}, "frame_stack = 3"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps = 1e-06"),
    ],
    ids=str,
)
def test_what_the_released_layout_cannot_say_is_refused(released, tmp_path, change, said):
    convert(released, tmp_path / "ours")
    values = json.loads((tmp_path / "ours" / "config.json").read_text()) | change
    (tmp_path / "ours" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=said):
        convert(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_model_of_other_origin_is_refused(model_folders, tmp_path):
    with pytest.raises(ValueError, match="was not made of a released checkpoint"):
        convert(model_folders[3], tmp_path / "back")


def test_what_is_there_is_not_overwritten(released, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match="full is there already"):
        convert(released, tmp_path / "full")
    with pytest.raises(ValueError, match="lies within"):
        convert(released, released / "ours")
    with pytest.raises(FileNotFoundError, match="holds no model"):
        convert(tmp_path, tmp_path / "new")


def test_a_disk_that_is_full_is_told_before(released, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(ValueError, match=r"ours takes 0\.0 GiB, but .* has 0\.0 GiB free"):
        convert(released, tmp_path / "ours")


def test_a_conversion_that_fails_leaves_nothing(released, tmp_path, monkeypatch):
    monkeypatch.setattr("soundwave.model.released.copy_tensors", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        convert(released, tmp_path / "ours")
    assert list(tmp_path.iterdir()) == []


def test_settings_without_a_place_are_told(released, tmp_path):
    convert(released, tmp_path / "ours")
    values = json.loads((tmp_path / "ours" / "config.json").read_text()) | {"ctc_weight": 0.5}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(values))
    lines: list[str] = []
    convert(tmp_path / "ours", tmp_path / "back", lines.append)
    assert "not kept, because the released layout has no place for it: ctc_weight = 0.5" in lines


def test_a_tower_outside_of_the_folder_is_brought_in(state, tmp_path):
    source = write_released(tmp_path / "a" / "source", state, audio_tower="../whisper")
    shutil.move(source / "whisper", tmp_path / "a" / "whisper")
    lines: list[str] = []
    convert(source, tmp_path / "ours", lines.append)
    assert any("names released/whisper in place of '../whisper'" in line for line in lines)
    convert(tmp_path / "ours", tmp_path / "b" / "back")
    assert torch.equal(load(tmp_path / "b" / "back").ctc_head, load(source).ctc_head)


# ---------------------------------------------------------------- training from it


@pytest.fixture(scope="module")
def manifest(tiny_corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    rows = copy_recordings(tiny_corpus, folder, 4)
    return manifest_of(folder, [row | {"text": "ab", "task": "asr", "prompt": "Hm?", "answer": "ab"} for row in rows])


@pytest.fixture(scope="module")
def tuned(released, manifest, tmp_path_factory):
    """Stage II from the checkpoint, three steps, of which each leaves a checkpoint."""
    out = tmp_path_factory.mktemp("runs") / "2"
    return train(2, out, manifest, model=released, steps=3, save_steps=1, save_total_limit=3, seed=3)


def test_stage_two_trains_adapters_and_new_lora_matrices(released, tuned):
    values = json.loads((tuned.folder / "config.json").read_text())
    assert [values[name] for name in ("audio_tower", "language_model", "ctc_head")] == [str(released.resolve())] * 3
    assert (values["lora_rank"], values["stage"], values["semantics"]) == (SETTINGS["lora_rank"], 3, "released")
    assert not any("blank" in name or "ctc_head" in name for name in tuned.state)
    assert any(".lora_B." in name and x.any() for name, x in tuned.state.items())
    before = dict(load(released).named_parameters())
    changed = {name.split(".")[0] for name, x in tuned.state.items() if name in before and (x != before[name]).any()}
    assert changed == {"alignment", "shrinking"}


def test_a_run_goes_on_from_its_checkpoint_to_the_same_weights(released, manifest, tuned, tmp_path):
    out = Path(shutil.copytree(tuned.folder.parent, tmp_path / "2"))
    for name in ("model", "checkpoint-2", "checkpoint-3"):
        shutil.rmtree(out / name)
    again = train(2, out, manifest, model=released, steps=3, save_steps=1, save_total_limit=3, seed=3, resume=True)
    assert same_bits(again.state, tuned.state)


def test_the_trained_model_loads_and_stage_three_follows(manifest, tuned, tmp_path, clips):
    model, processor = load(tuned.folder), SoundwaveProcessor.from_pretrained(tuned.folder)
    assert all(torch.equal(dict(model.named_parameters())[name], x) for name, x in tuned.state.items())
    assert torch.isfinite(model(**batch_of(processor, clips)).loss)
    third = train(3, tmp_path / "3", manifest, model=tuned.folder, train_shrinking=True)
    assert third.state.keys() == tuned.state.keys()


def test_stage_three_starts_from_the_checkpoint_and_stage_one_does_not(released, manifest, tmp_path):
    third = train(3, tmp_path / "3", manifest, model=released, lora_rank=2)
    assert json.loads((third.folder / "config.json").read_text())["lora_rank"] == 2
    with pytest.raises(ValueError, match="has seen stage 3, but stage 1 starts from one of stage 1"):
        train(1, tmp_path / "1", manifest, model=released)


def test_a_converted_checkpoint_is_trained_as_the_released_one(released, manifest, tuned, tmp_path):
    convert(released, tmp_path / "ours")
    settings = {"steps": 3, "save_steps": 1, "save_total_limit": 3, "seed": 3}
    found = train(2, tmp_path / "2", manifest, model=tmp_path / "ours", **settings)
    assert same_bits(found.state, tuned.state)
    with pytest.raises(ValueError, match="has LoRA matrices"):
        convert(found.folder, tmp_path / "back")


def test_what_was_trained_is_merged_and_written_in_the_released_layout(released, tuned, reference, clips, tmp_path):
    """The way of a model from the release, through training, back to those who use the authors' code."""
    merge(tuned.folder, tmp_path / "merged", dtype="float32")
    assert convert(tmp_path / "merged", tmp_path / "back") == "released"
    assert others_in(tmp_path / "back") == others_in(released)
    batch = batch_of(SoundwaveProcessor.from_pretrained(released), clips)
    with torch.no_grad():
        trained, found = load(tuned.folder)(**batch), load(tmp_path / "back")(**batch)
        before = load(released)(**batch)
    torch.testing.assert_close(found.logits, trained.logits, **CLOSE)
    assert not torch.allclose(found.logits[:, -1], before.logits[:, -1], **CLOSE)
    again = Reference(tensors_in(tmp_path / "back"))
    *_, loss = of_reference(again, SoundwaveProcessor.from_pretrained(released), clips)
    torch.testing.assert_close(found.loss, loss, **CLOSE)


def test_a_report_shows_its_frames_and_tokens(released, clips):
    model, processor = load(released), SoundwaveProcessor.from_pretrained(released)
    shown = examine(model, processor, clips[1])
    path = model(**processor.pad_features([processor.features(clips[1])])).path[0]
    assert len(shown["kept"]) == 1 + int((path[1:] != path[:-1]).sum())
    blanks = [one for one in shown["kept"] if path[one["frame"]] == PLACEHOLDER]
    assert blanks and all(one["text"] == "" for one in blanks)


# ---------------------------------------------------------------- damage


@pytest.fixture
def unread(monkeypatch):
    """Fails a test in which a weight is read, by us or by transformers."""

    def refuse(*args, **kwargs):
        raise AssertionError("a weight was read")

    for place in ("model.pretrained.read_tensors", "backbones.load.read_tensors", "model.released.copy_tensors"):
        monkeypatch.setattr(f"soundwave.{place}", refuse)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", refuse)


def rewrite(folder: Path, change) -> None:
    """Change the tensors of one shard of a checkpoint, and its index with them."""
    file = folder / "model-00001-of-00003.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    places = {name: shard for name, shard in places.items() if shard != file.name} | dict.fromkeys(tensors, file.name)
    index.write_text(json.dumps({"weight_map": places}))


def edit(folder: Path, **changes) -> None:
    """Change values of `config.json`; None removes one."""
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: x for name, x in values.items() if x is not None}))


def first_of(tensors: dict, start: str = "") -> str:
    return next(name for name in sorted(tensors) if name.startswith(start))


def cut_off(folder: Path) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_pickled(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def of_another_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = "model-00009-of-00003.safetensors"
    index.write_text(json.dumps(values))


def of_another_folder(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))


def misplaced(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    shards = sorted(set(values["weight_map"].values()))
    place = shards.index(values["weight_map"]["model.norm.weight"])
    values["weight_map"]["model.norm.weight"] = shards[place - 1]
    index.write_text(json.dumps(values))


def edit_whisper(folder: Path, **changes) -> None:
    values = json.loads((folder / "whisper" / "config.json").read_text()) | changes
    (folder / "whisper" / "config.json").write_text(json.dumps(values))


DAMAGE = {
    "a missing tensor": (
        lambda f: rewrite(f, lambda x: x.pop(first_of(x, "model.layers"))), r"lacks 1 tensors, e\.g\. model\.layers",
    ),
    "a missing part": (
        lambda f: rewrite(f, lambda x: [x.pop(n) for n in list(x) if n.startswith("model.audio_tower")]),
        r"lacks \d+ tensors, e\.g\. model\.audio_tower\.",
    ),
    "an unknown tensor": (
        lambda f: rewrite(f, lambda x: x.update({"model.vision_tower.weight": torch.zeros(2)})),
        r"holds 1 tensors that its config\.json has no place for, e\.g\. model\.vision_tower\.weight",
    ),
    "a tensor of another shape": (
        lambda f: rewrite(f, lambda x: x.update({first_of(x): torch.zeros(3, 5)})), r"is \[3, 5\], wanted \[",
    ),
    "a quantised tensor": (
        lambda f: rewrite(f, lambda x: x.update({first_of(x): x[first_of(x)].to(torch.int8)})), "is stored as I8",
    ),
    "a shard that is cut off": (cut_off, r"damaged safetensors file \(model-00002-of-00003\.safetensors"),
    "a shard that is missing": (
        lambda f: (f / "model-00003-of-00003.safetensors").unlink(), "has no model-00003-of-00003.safetensors, but its",
    ),
    "an index that names no shard": (of_another_index, "has no model-00009-of-00003.safetensors, but its index names"),
    "an index that names a file elsewhere": (of_another_folder, "'../a.safetensors', which is no file of its folder"),
    "an index that is wrong": (misplaced, "holds model.norm.weight, but the index does not place it there"),
    "an index that is damaged": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"), r"index\.json is damaged",
    ),
    "no weights": (lambda f: [x.unlink() for x in f.glob("model*")], "has neither model.safetensors nor"),
    "pickled weights": (only_pickled, "its pytorch_model.bin is a pickle, which is not read"),
    "a Whisper of another width": (
        lambda f: edit_whisper(f, d_model=32), f"is 32 wide, but .* has adapter_size = {E}",
    ),
    "a Whisper without heads": (lambda f: edit_whisper(f, encoder_attention_heads=0), "no encoder can be built"),
    "a Whisper with heads in words": (
        lambda f: edit_whisper(f, encoder_attention_heads="two"), "cannot be read .*encoder_attention_heads",
    ),
    "no adapter_size": (lambda f: edit(f, adapter_size=None), "lacks 'adapter_size'"),
    "adapter_size in words": (lambda f: edit(f, adapter_size="24"), "has adapter_size = '24'"),
    "no audio_tower": (lambda f: edit(f, audio_tower=None), "lacks 'audio_tower'"),
    "the checkpoint as its own tower": (lambda f: edit(f, audio_tower="."), "is no Whisper model"),
    "a placeholder past the vocabulary": (
        lambda f: edit(f, audio_patch_token=V), f"audio_patch_token = {V}, but it must be below vocab_size = {V}",
    ),
    "several placeholders": (lambda f: edit(f, audio_patch_size=2), "audio_patch_size = 2"),
    "another width of Llama": (lambda f: edit(f, hidden_size=64), r"wanted \[.*as of config\.json"),
    "a configuration of a later transformers": (
        lambda f: edit(f, rope_parameters={"rope_type": "of_tomorrow", "rope_theta": 1.0}),
        "no configuration of a Llama",
    ),
    "a tower that is not there": (
        lambda f: edit(f, audio_tower="somebody/whisper"),
        r"somebody/whisper.*Only that model's config\.json is needed",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_one_line_before_a_weight_is_read(copy, unread, monkeypatch, damage, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    damage(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        SoundwaveForConditionalGeneration.from_pretrained(copy)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        soundwave.load(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        convert(copy, copy.parent / "out")


def without_placeholder(folder: Path) -> None:
    words = json.loads((folder / "tokenizer.json").read_text())
    words["added_tokens"] = [token for token in words["added_tokens"] if token["content"] != "<audio_patch>"]
    (folder / "tokenizer.json").write_text(json.dumps(words))


TOKENIZERS = {
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), "the tokenizer has no chat template"),
    "no placeholder": (without_placeholder, f"the tokenizer has no token {PLACEHOLDER}"),
    "none": (lambda f: [path.unlink() for path in f.glob("tokenizer*")], "tokenizer.json is missing"),
}


@pytest.mark.parametrize(("damage", "said"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_that_does_not_fit_is_told_before_a_weight_is_read(copy, unread, damage, said, manifest, tmp_path):
    damage(copy)
    for use in (
        soundwave.load,
        lambda folder: convert(folder, tmp_path / "ours"),
        lambda folder: train(2, tmp_path / "2", manifest, model=folder),
    ):
        with pytest.raises(ValueError, match=f"language_model = '{copy}': .*{said}") as error:
            use(copy)
        assert "\n" not in str(error.value)


HUB = {
    "gated": ("You are trying to access a gated repo.\nMake sure to have access", "is gated on Hugging Face's Hub"),
    "no network": ("We couldn't connect to 'https://huggingface.co' to load\nthe files", "Hub cannot be reached"),
    "absent": ("somebody/whisper is not a local folder and is not a valid\nidentifier", "Hub gives no such model"),
}


@pytest.mark.parametrize(("answered", "said"), HUB.values(), ids=HUB)
@pytest.mark.parametrize("setting", ["audio_tower", "language_model"])
def test_what_the_hub_answers_is_one_line(monkeypatch, setting, answered, said):
    def refuse(*args, **kwargs):
        raise OSError(answered)

    monkeypatch.setattr(check.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ValueError, match=f"{setting} = 'somebody/whisper': .*{said}") as error:
        check.read_config(setting, "somebody/whisper")
    assert "\n" not in str(error.value)


def test_a_released_folder_that_was_moved_is_told_by_the_model_trained_from_it(tuned, released, tmp_path):
    moved = Path(shutil.copytree(tuned.folder, tmp_path / "model"))
    values = json.loads((moved / "config.json").read_text())
    names = dict.fromkeys(("audio_tower", "language_model", "ctc_head"), str(tmp_path / "gone"))
    (moved / "config.json").write_text(json.dumps(values | names))
    with pytest.raises(ValueError, match=f"{tmp_path}/gone': there is no such folder; was it moved"):
        load(moved)


# ---------------------------------------------------------------- models and backbones of our own layout


def test_an_older_version_is_told_that_the_model_is_newer(tuned):
    """It would take the head and the window for settings that do nothing."""
    assert json.loads((tuned.folder / "config.json").read_text())["config_version"] == CONFIG_VERSION > 1


def test_a_folder_relative_to_a_saved_configuration_is_found_from_anywhere(small_llm, tmp_path, monkeypatch):
    shutil.copytree(small_llm, tmp_path / "model" / "llm")
    SoundwaveConfig(language_model="./llm", audio_tower="./absent").save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    found = SoundwaveConfig.from_pretrained("model")
    assert (found.language_model, found.audio_tower) == (str(tmp_path / "model" / "llm"), "./absent")


def test_a_misfit_of_our_layout_is_told_before_a_weight_is_read(tuned, tmp_path, unread):
    for damage, said in (
        (lambda x: x.pop(first_of(x, "language_model.")), r"1 parameters missing \['language_model"),
        (lambda x: x.update({first_of(x, "language_model."): torch.zeros(3)}), r"is \[3\], wanted \["),
    ):
        model = Path(shutil.copytree(tuned.folder, tmp_path / str(len(said))))
        tensors = load_file(model / "model.safetensors")
        damage(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=said):
            load(model)


def test_a_language_model_with_a_cut_off_shard_is_told_before_the_encoder_is_read(small_llm, tmp_path, monkeypatch):
    shutil.copytree(small_llm, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    monkeypatch.setattr(pretrained, "load_encoder", lambda *_: pytest.fail("the encoder was read"))
    with pytest.raises(ValueError, match=f"{tmp_path} has a damaged safetensors file"):
        SoundwaveForConditionalGeneration.from_backbones(SoundwaveConfig(language_model=str(tmp_path)))


def test_a_copied_tensor_that_ends_too_early_is_told(released, tmp_path):
    stored = shards.stored_tensors(released)
    name, at = next(iter(stored.items()))
    with pytest.raises(OSError, match="ends within"):
        shards.copy_tensors({name: at._replace(start=10**9)}, tmp_path / "a.safetensors")


def test_copied_tensors_begin_where_their_dtype_may(tmp_path):
    """One byte before a float would misplace it."""
    state = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2), "c": torch.ones(0), "d": torch.ones(())}
    save_file(state, tmp_path / "model.safetensors")
    shards.copy_tensors(shards.stored_in(tmp_path / "model.safetensors"), tmp_path / "b.safetensors")
    assert same_bits(load_file(tmp_path / "b.safetensors"), state)
    header = struct.unpack("<Q", (tmp_path / "b.safetensors").read_bytes()[:8])[0]
    starts = [at.start - 8 - header for at in shards.stored_in(tmp_path / "b.safetensors").values()]
    assert math.gcd(header, 8) == 8 and sorted(starts)[0] == 0
