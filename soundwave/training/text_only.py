"""Text-only answers of the language model itself, which stages II and III mix into data that has none.

The paper mixes 78 000 text questions into stage II. Whoever has only recordings and transcripts does not have them, and
a model that is trained on transcripts alone soon answers text as if it had to write down speech (docs/log.md). Its own
answers before the training, without LoRA, are what it should go on to say: self-distillation, with no text of others.
"""

import json
import re
from pathlib import Path

import torch

from soundwave.backbones.load import token_ids
from soundwave.data.instructions import instructions
from soundwave.data.manifest import Sample, read_manifest
from soundwave.data.samples import Samples
from soundwave.model.modeling import SoundwaveForConditionalGeneration, batch_to
from soundwave.model.processing import SoundwaveProcessor
from soundwave.training.journal import write_text

FILE = "text_only.jsonl"
TASK = "text_only"
LONGEST = 64  # tokens; an answer that is longer is cut behind its last whole sentence
AT_ONCE = 32  # answers


def how_many(stage: int, share: float, samples: Samples) -> int:
    """How many text-only answers are mixed in: none in stage I, and none where the data has its own."""
    return 0 if stage == 1 or samples.has_text_only() else int(share * len(samples))


def own_answers(
    file: Path, model: SoundwaveForConditionalGeneration, processor: SoundwaveProcessor, count: int, seed: int
) -> None:
    """Write the language model's greedy answers to `count` instructions, without LoRA, as a manifest."""
    prompts = instructions(count, seed)
    has_lora = bool(model.config.lora_rank)
    if has_lora:
        model.language_model.disable_adapters()
    rows = []
    for start in range(0, len(prompts), AT_ONCE):
        asked = prompts[start : start + AT_ONCE]
        for prompt, text in zip(asked, _answer(model.eval(), processor, asked), strict=True):
            rows += [{"task": TASK, "prompt": prompt, "answer": text}] if text else []
    if has_lora:
        model.language_model.enable_adapters()
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@torch.no_grad()
def _answer(model: SoundwaveForConditionalGeneration, processor: SoundwaveProcessor, prompts: list[str]) -> list[str]:
    ends = {processor.tokenizer.eos_token_id, *token_ids(model.language_model.generation_config.eos_token_id)} - {None}
    batch = batch_to(dict(processor(prompts)), model.device)
    rows = model.generate(
        **batch,
        max_new_tokens=LONGEST,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=processor.pad_token_id,
    ).tolist()
    texts = []
    for row in rows:
        end = next((place for place, token in enumerate(row) if token in ends), None)
        text = processor.tokenizer.decode(row[:end], skip_special_tokens=True).strip()
        texts.append(text if end is not None else _whole_sentences(text))
    return texts


def _whole_sentences(text: str) -> str:
    """A text up to the end of its last whole sentence; nothing, if it has none."""
    found = re.match(r".*(?:[.!?](?=\s|$)|[。！？])", text, re.DOTALL)
    return found[0].strip() if found else ""


def read_answers(file: Path) -> list[Sample]:
    """The samples that `own_answers` wrote, of which there may be none."""
    return read_manifest(file) if file.stat().st_size else []
