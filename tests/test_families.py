"""Which families of language models train and answer: the table of docs/language-models.md, row by row.

Each family is a random model of two narrow layers in transformers' own form. An accepted one is trained for a step of
stage I and one of stages II and III, and answers; its logits and its answer must be those that the model itself gives.
A refused one is told by its configuration alone: there are no weights and no tokenizer in its folder.
"""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import SoundwaveForConditionalGeneration, freeze_all_but
from soundwave.model.packed import reason_against_packing
from soundwave.model.processing import SoundwaveProcessor
from soundwave.training.stages import TRAINED

PAGE = Path(__file__).resolve().parents[1] / "docs" / "language-models.md"
VOCAB = 272  # 256 bytes, three special tokens and a few that the tokenizer does not use
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
    "max_position_embeddings": 512,
}  # fmt: skip
SCALED = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SWITCH = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HEAD_DIM = {"head_dim": 8}
# Name in the table -> transformers' name of the configuration without "Config", settings beside `SIZES`.
FAMILIES = {
    "Llama 2, 3, 3.1 (head of its own)": ("Llama", {"tie_word_embeddings": False}),
    "Llama 3.2, SmolLM2 (tied head)": ("Llama", {"tie_word_embeddings": True}),
    "Llama 3.1 with its rope scaling": ("Llama", {"rope_parameters": SCALED}),
    "Qwen 2, Qwen 2.5": ("Qwen2", {}),
    "Qwen 3": ("Qwen3", HEAD_DIM),
    "Qwen 3, mixture of experts": ("Qwen3Moe", SWITCH | HEAD_DIM),
    "Mistral": ("Mistral", {}),
    "Ministral 3": ("Ministral3", HEAD_DIM),
    "Mixtral": ("Mixtral", EXPERTS),
    "SmolLM3": ("SmolLM3", {}),
    "Gemma": ("Gemma", HEAD_DIM),
    "Gemma 3, text": ("Gemma3Text", HEAD_DIM),
    "OLMo 2": ("Olmo2", {}),
    "OLMo 3": ("Olmo3", {}),
    "GLM-4": ("Glm4", HEAD_DIM),
    "gpt-oss": ("GptOss", EXPERTS | HEAD_DIM),
    "Helium": ("Helium", HEAD_DIM),
    "Arcee": ("Arcee", {}),
    "Apertus": ("Apertus", {}),
    "Nemotron": ("Nemotron", {}),
    "EXAONE 4": ("Exaone4", {}),
    "ERNIE 4.5": ("Ernie4_5", {}),
    "Seed-OSS": ("SeedOss", HEAD_DIM | {"attention_dropout": 0.0, "residual_dropout": 0.0}),
    "Hunyuan, dense": ("HunYuanDenseV1", HEAD_DIM),
    "StarCoder 2": ("Starcoder2", {}),
    "StableLM": ("StableLm", {}),
    "Granite": ("Granite", {"logits_scaling": 8.0}),
    "Granite, mixture of experts": ("GraniteMoe", {"logits_scaling": 8.0} | EXPERTS),
    "Command R (Cohere)": ("Cohere", {}),
    "Command R7B (Cohere 2)": ("Cohere2", {}),
    "Gemma 2": ("Gemma2", HEAD_DIM),
    "Phi-1, Phi-2": ("Phi", {}),
    "Phi-3, Phi-4": ("Phi3", {}),
    "Llama 4, text": ("Llama4Text", {"intermediate_size_mlp": 48, "num_local_experts": 2} | HEAD_DIM),
    "GPT-2": ("GPT2", {}),
    "GPT-NeoX, Pythia": ("GPTNeoX", {}),
    "OPT": ("OPT", {}),
    "BLOOM": ("Bloom", {}),
    "Mamba 2": ("Mamba2", {"expand": 2, "num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8}),
}  # fmt: skip


def settings_of(family: str) -> dict:
    """`SIZES` with a family's own settings; where heads cannot share keys, they do not."""
    name, own = FAMILIES[family]
    left_out = {"GPTNeoX": ["num_key_value_heads"], "Mamba2": ["num_attention_heads", "num_key_value_heads"]}
    return {key: value for key, value in SIZES.items() if key not in left_out.get(name, [])} | own


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> str:
    """Folder of a random Whisper of one narrow layer."""
    folder = tmp_path_factory.mktemp("families") / "whisper"
    config = WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=20, max_source_positions=100, pad_token_id=0,
        bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return str(folder)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Each byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(
        models.BPE({"<pad>": 0, "<end>": 1, "<user>": 2} | {x: i + 3 for i, x in enumerate(alphabet)}, [])
    )
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.add_special_tokens(["<pad>", "<end>", "<user>"])
    template = "{% for message in messages %}<user>{{ message['content'] }}<end>{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", chat_template=template
    )  # fmt: skip


def row_of(family: str, whisper: str, folder: Path) -> str:
    """The row of the table: what happens with a random model of the family."""
    name, _ = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**settings_of(family))
    config.save_pretrained(folder)
    try:
        SoundwaveConfig.from_backbones(whisper, str(folder), lora_rank=2)
        refused = None
    except ValueError as error:
        refused = str(error)
    if refused is None or "tokenizer" in refused:
        packed = train_and_answer(config, whisper, folder)
        return f"| {family} | `{config.model_type}` | yes | {packed} |"
    assert str(folder) in refused and "\n" not in refused
    reason = re.sub(r"^.*? is an? \S+ model, ", "", refused.replace(str(folder), "it"))
    reason = reason.partition(":")[0].replace("it has no such module", "it has no module of this name")
    return f"| {family} | `{config.model_type}` | no | {reason} |"


def train_and_answer(config, whisper: str, folder: Path) -> str:
    """Train a step of each stage and answer; the logits and the answer are the model's own -> how it is trained."""
    torch.manual_seed(0)
    own = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in own.parameters():  # some families begin with zeros, which all give the same answer
            parameter.add_(torch.randn_like(parameter) * 0.05)
    own.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    config = SoundwaveConfig.from_backbones(
        whisper, str(folder), lora_rank=2, adapter_dropout=0.0, spec_augment_time_masks=0, spec_augment_mel_masks=0
    )
    processor = SoundwaveProcessor.from_backbones(whisper, str(folder))
    clips = [torch.randn(80, 40), torch.randn(80, 60)]
    features = processor.pad_features(clips)

    model = SoundwaveForConditionalGeneration.from_backbones(config, language_model=False).train()
    assert torch.equal(model.head_weight, own.get_output_embeddings().weight)
    freeze_all_but(model, TRAINED[1])
    model(**features, ctc_labels=torch.tensor([[5, 6], [7, -100]])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    model = SoundwaveForConditionalGeneration.from_backbones(config).train()
    freeze_all_but(model, TRAINED[2])
    ids = torch.tensor([[2, config.audio_placeholder_id, 20, 21, 22, 1], [2, config.audio_placeholder_id, 30, 1, 0, 0]])
    mask, labels = (ids != 0).long(), ids.where(ids > 3, -100)
    labels[:, 1] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, **features}
    out = model(**batch, ctc_labels=torch.tensor([[5, 6], [7, -100]]))
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    adapted = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert adapted and all(gradient.any() for gradient in adapted)
    # The frames have no model of their own to compare with: the loss while training must be that of the logits.
    model.eval()
    with torch.no_grad():
        logits = model(**batch).logits
        embeddings, mask, spliced, _ = spliced_of(model, batch)
        own_logits = own(inputs_embeds=embeddings, attention_mask=mask).logits
        wanted = torch.nn.functional.cross_entropy(own_logits[:, :-1].flatten(0, 1), spliced[:, 1:].flatten())
    inside = mask.bool()
    close(logits[inside], own_logits[inside])
    close(out.lm_loss, wanted)

    freeze_all_but(model, TRAINED[3])
    model.zero_grad()
    model.train()(**batch).lm_loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    model.eval()
    prompt = torch.tensor([[2, 40, 41, 42, 1]])
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    answer = model.generate(prompt, **settings)
    assert torch.equal(answer, own.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[:, 5:])
    assert model.generate(ids[:1, :4], input_features=clips[0][None], **settings).shape[0] == 1
    reason = reason_against_packing(model.language_model)
    return f"on padded sequences: {reason}" if reason else "on packed sequences"


def spliced_of(model, batch):
    """Embeddings, mask and labels after the splice, of which `labels` are those of each token."""
    hidden, lengths, ctc = model.align(batch["input_features"], batch["feature_lengths"])
    return model._splice(batch["input_ids"], batch["attention_mask"], hidden, lengths, ctc, batch["labels"], "right")


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal within the rounding of float32 over sums of some hundred terms."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_says_what_happens_with_a_family(family, whisper, tmp_path):
    row = row_of(family, whisper, tmp_path)
    assert row in PAGE.read_text(encoding="utf-8").splitlines(), f"docs/language-models.md lacks this row:\n{row}"


def test_the_table_has_no_other_families():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ") and "`" in line]
    assert [row.split("|")[1].strip() for row in rows] == list(FAMILIES)
