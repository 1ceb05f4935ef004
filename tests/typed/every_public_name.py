"""Uses each public name as a program would. It is checked for types, never run."""

from pathlib import Path

import numpy as np
import torch
from typing_extensions import assert_type

import soundwave
from soundwave import (
    Answer,
    LoadedModel,
    SoundwaveConfig,
    SoundwaveForConditionalGeneration,
    SoundwaveProcessor,
    SpeechPipeline,
    Transcript,
    ask,
    eager,
    fused,
    load,
    transcribe,
)
from soundwave.fused import functional

assert_type(soundwave.__version__, str)

# using a model
loaded = load("runs/demo/model")
assert_type(loaded, LoadedModel)
model, processor = loaded
assert_type(model, SoundwaveForConditionalGeneration)
assert_type(processor, SoundwaveProcessor)
assert_type(transcribe("recording.wav", loaded), Transcript)
assert_type(transcribe(Path("recording.wav"), "runs/demo/model"), Transcript)
assert_type(transcribe(np.zeros(16_000, np.float32), loaded, sampling_rate=8_000), Transcript)
assert_type(transcribe(torch.zeros(16_000), loaded), Transcript)
assert_type(transcribe(["a.wav", Path("b.wav"), np.zeros(9)], loaded, batch_size=4), list[Transcript])
assert_type(transcribe(["a.wav", "b.wav"], loaded), list[Transcript])
assert_type(SpeechPipeline(model=loaded.model, batch_size=4), SpeechPipeline)
answer = ask("recording.wav", "Who speaks?", loaded, max_new_tokens=8)
assert_type(answer, Answer)
words: str = answer.text.strip() + transcribe("a.wav", loaded).text
length: float = answer.seconds + answer.heard

# the classes
config = SoundwaveConfig.from_backbones("embedded:whisper-tiny.en", "embedded:smollm2-135m-instruct", lora_rank=8)
network = SoundwaveForConditionalGeneration.from_backbones(config, language_model=False)
network = SoundwaveForConditionalGeneration.from_pretrained("runs/demo/model")
batch = SoundwaveProcessor.from_pretrained("runs/demo/model")(["What is said?"], [np.zeros(16_000, np.float32)])
tokens = network.generate(**batch, max_new_tokens=4)
assert_type(tokens, torch.Tensor)

# the operations
hidden, weight, rows = torch.zeros(2, 7, 8), torch.zeros(11, 8), torch.zeros(5, 8)
targets, frames, labels = torch.ones(2, 3, dtype=torch.int64), torch.tensor([7, 5]), torch.tensor([3, 2])
out = functional.linear_ctc_loss(hidden, weight, targets, frames, labels, blank=0)
assert out.loss is not None
out.loss.backward()
path, score = functional.linear_ctc_path(hidden, weight, frames, blank=0)
peaks = functional.ctc_peaks(path, frames, blank=0, scores=score)
bounds: torch.Tensor = peaks.cu_seqlens
longest: int = peaks.max_seqlen
loss: torch.Tensor = functional.ctc_loss(hidden.transpose(0, 1), targets, frames, labels, zero_infinity=True)
loss = functional.linear_cross_entropy(rows, weight, torch.zeros(5, dtype=torch.int64))
normed = functional.add_layer_norm(rows, rows, torch.ones(8), torch.zeros(8))
query = torch.zeros(5, 2, 4)
attended: torch.Tensor = functional.shrink_attention(query, query, query, bounds, bounds, 5, 5)
spliced = functional.splice(
    hidden, torch.zeros(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64), rows, bounds,
    audio_placeholder_id=10,
)  # fmt: skip
positions: torch.Tensor = spliced.position_ids

# the modules
loss = fused.CTCLoss(blank=0, zero_infinity=True)(hidden.transpose(0, 1), targets, frames, labels)
loss = fused.transformers_ctc_loss(hidden, targets, frames, 0)
loss = fused.LinearCTCLoss(blank=0)(hidden, weight, targets, frames, labels)
loss = fused.LinearCrossEntropyLoss()(rows, weight, torch.zeros(5, dtype=torch.int64))
modules: list[torch.nn.Module] = [fused.AlignmentAdapter(config), fused.ShrinkingAdapter(config)]
modules += [eager.AlignmentAdapter(config), eager.ShrinkingAdapter(config)]
