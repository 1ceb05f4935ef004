"""A tiny random checkpoint in the layout of the released one, written from its description."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

D, E, V, HEADS, WINDOW = 32, 24, 300, 4, 3  # widths of Llama and Whisper, vocabulary, heads, seconds of the window
FRAMES = 25 * WINDOW
PLACEHOLDER, PAD, END = V - 1, V - 2, V - 3
LAYER, LBM = "model.asr_transformer_encoder.layers.0.", "model.lbm."
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def whisper_config() -> WhisperConfig:
    return WhisperConfig(
        d_model=E, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=48, num_mel_bins=80,
        max_source_positions=50 * WINDOW, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=48,
        vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=D, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=2,
        vocab_size=V, tie_word_embeddings=False, bos_token_id=0, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip


def random_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(D, HEADS, 2 * D, norm_first=True)
    attention, projector = nn.MultiheadAttention(D, HEADS, batch_first=True), nn.Linear(2 * E, D)
    parts = {
        "model.mm_projector1.": projector, LAYER: layer, "model.out_norm.": nn.LayerNorm(D),
        f"{LBM}encoder_attn.": attention, f"{LBM}atten_layer_norm.": nn.LayerNorm(D),
        "model.audio_tower.": WhisperEncoder(whisper_config()), "": LlamaForCausalLM(llama_config()),
    }  # fmt: skip
    state = {f"{prefix}{name}": x for prefix, part in parts.items() for name, x in part.state_dict().items()}
    for name, x in state.items():  # at their first values norms and biases do nothing, and Llama hardly anything
        state[name] = x + 0.1 * torch.randn_like(x)
    state["model.audio_feature_head.weight"] = 0.5 * torch.randn(V, D)
    # Frames lean towards one direction, and so does the blank: it is the most probable label of a part of them.
    direction = F.normalize(torch.randn(D), dim=0)
    state["model.out_norm.bias"] = 3.0 * direction
    state["model.audio_feature_head.weight"][PLACEHOLDER] = 2.8 * direction
    return {name: x.detach().contiguous() for name, x in state.items()}


def write_shards(folder: Path, state: dict[str, torch.Tensor], count: int = 3) -> None:
    """Write `model.safetensors`, or shards with an index, in which neighbouring names are in different shards."""
    if count == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    places = {name: names[i % count] for i, name in enumerate(sorted(state))}
    for shard in names:
        save_file({name: x for name, x in state.items() if places[name] == shard}, folder / shard, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and Llama's kind of special tokens; the placeholder is the last one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fill = [f"<|reserved_{i}|>" for i in range(V - 6 - len(alphabet))]
    vocabulary = {token: i for i, token in enumerate(["<|begin|>", *alphabet, *fill])}
    words = Tokenizer(models.BPE(vocabulary, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.add_special_tokens(["<|unused|>", "<|start|>", "<|end|>", "<|pad|>", "<audio_patch>"])
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>", chat_template=TEMPLATE
    )
    assert made.convert_tokens_to_ids(["<|end|>", "<|pad|>", "<audio_patch>"]) == [END, PAD, PLACEHOLDER]
    return made


def write_released(folder: Path, state: dict[str, torch.Tensor], shards: int = 3, **changes) -> Path:
    """A checkpoint as the authors' code saves it; `changes` replace values of its `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    values = llama_config().to_dict() | {
        "model_type": "Soundwave", "architectures": ["SoundwaveForCausalLM"], "adapter_size": E,
        "audio_tower": "whisper", "audio_patch_token": PLACEHOLDER, "llm_pad_token_id": PAD,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values | changes))
    tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END, "temperature": 0.7}))
    (folder / "whisper").mkdir(exist_ok=True)
    whisper_config().save_pretrained(folder / "whisper")
    write_shards(folder, state, shards)
    return folder
