"""The language model in NF4 on the CPU: it trains, also after it has generated."""

from pathlib import Path

import bitsandbytes
import pytest
import torch

from soundwave import backbones
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import SoundwaveForConditionalGeneration, freeze_all_but

PROMPTS = ["What is the capital of France?", "Say no."]
ANSWERS = ["Paris is its capital.", "no"]


def build(small_llm, dtype: torch.dtype) -> SoundwaveForConditionalGeneration:
    """A quantised model that trains only LoRA, from a fixed seed."""
    config = SoundwaveConfig.from_backbones(backbones.WHISPER, str(small_llm), lora_rank=4, quantization="nf4")
    torch.manual_seed(0)
    model = SoundwaveForConditionalGeneration.from_backbones(config, dtype=dtype)
    freeze_all_but(model, ("lora",))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.02)  # with zeros here lora_A would have no gradient
    return model


def lora_gradients(model, batch) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if ".lora_" in name and p.grad is not None}


@pytest.fixture(scope="module")
def batch(processor) -> dict[str, torch.Tensor]:
    return dict(processor(PROMPTS, answers=ANSWERS))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request, small_llm) -> SoundwaveForConditionalGeneration:
    return build(small_llm, request.param)


def test_every_linear_of_the_layers_is_nf4_and_the_embeddings_are_not(model):
    layers = [m for m in model.language_model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    assert {(m.weight.quant_type, m.weight.quant_state.nested) for m in layers} == {("nf4", True)}
    assert all(not isinstance(m, bitsandbytes.nn.Linear4bit) for m in (model.audio_tower, model.alignment))
    assert model.head_weight.dtype == model.compute_dtype


def test_no_weight_lies_in_the_mapped_file(model):
    """Else the whole file would stay in memory, with the weights that are quantised."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".safetensors")]
    files = [range(*(int(end, 16) for end in fields[0].split("-"))) for fields in maps]
    held = [name for name, p in model.language_model.named_parameters() if any(p.data_ptr() in file for file in files)]
    assert held == []


def test_lora_matrices_are_float32(model):
    assert {p.dtype for name, p in model.named_parameters() if ".lora_" in name} == {torch.float32}


def test_gradients_after_a_generate_are_those_without_it(model, batch, processor):
    before = lora_gradients(model, batch)
    model.eval()
    model.generate(**processor(PROMPTS), max_new_tokens=3, do_sample=False, pad_token_id=processor.pad_token_id)
    after = lora_gradients(model, batch)
    assert len(before) == 2 * 4 * 2 and before.keys() == after.keys()
    for name, gradient in before.items():
        assert gradient.any(), name
        assert torch.equal(gradient, after[name]), name


@pytest.mark.parametrize("model", [torch.bfloat16], indirect=True, ids=["bfloat16"])
def test_it_learns_after_generating(model, batch, processor):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(6):
        if step == 3:
            model.eval()
            model.generate(**processor(PROMPTS), max_new_tokens=2, do_sample=False, pad_token_id=2)
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[5] < losses[3] < losses[0]
