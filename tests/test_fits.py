"""The table of what fits on a 24 GB card in docs/train-your-own.md is what `soundwave.memory` predicts today."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from soundwave.memory import GIB, LLAMA_8B_WHISPER_LARGE, largest_batch, predict

PAGE = Path(__file__).resolve().parents[1] / "docs" / "train-your-own.md"
WHISPERS = {
    "small": {"mels": 80, "audio_width": 768, "audio_layers": 12, "audio_heads": 12, "audio_mlp": 3072},
    "medium": {"mels": 80, "audio_width": 1024, "audio_layers": 24, "audio_heads": 16, "audio_mlp": 4096},
    "large-v3": {"mels": 128, "audio_width": 1280, "audio_layers": 32, "audio_heads": 20, "audio_mlp": 5120},
}
LLMS = {
    "Qwen3-4B": {"width": 2560, "layers": 36, "heads": 32, "kv_heads": 8, "mlp": 9728, "vocab": 151_936},
    "Qwen3-8B": {"width": 4096, "layers": 36, "heads": 32, "kv_heads": 8, "mlp": 12_288, "vocab": 151_936},
    "Llama-3.1-8B": {"width": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "mlp": 14_336, "vocab": 128_256},
}


@pytest.mark.parametrize("whisper", WHISPERS)
@pytest.mark.parametrize("llm", LLMS)
def test_the_table_of_what_fits_is_the_prediction(llm, whisper):
    dims = replace(LLAMA_8B_WHISPER_LARGE, **WHISPERS[whisper], **LLMS[llm])
    cells = [" / ".join(str(largest_batch(stage, s, dims=dims)) for s in (5, 15, 30)) for stage in (1, 2, 3)]
    cells.append(f"{predict(2, 1, 30.0, dims=dims).peak / GIB:.1f}")
    (row,) = re.findall(rf"^\| {re.escape(llm)} \| {whisper} \| (.*) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert row == " | ".join(cells)
