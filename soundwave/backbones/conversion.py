"""Convert the weights of the embedded backbones into Hugging Face folders.

    convert_whisper    CTranslate2's model.bin (format 6, fp16) -> WhisperForConditionalGeneration in fp16
    convert_smollm2    GGUF (Q4_1) -> LlamaForCausalLM in bf16

Both raise an error unless each tensor of the source is used and each tensor of the target is filled.
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

CHAT_TEMPLATE = (  # SmolLM2's own template adds a system prompt of 16 tokens to every sample
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# Whisper: CTranslate2's model.bin -> WhisperForConditionalGeneration


def _read_ctranslate2(path: Path) -> dict[str, torch.Tensor]:
    """Read CTranslate2's format 6 as {name: tensor}. Scalars are 0-d. Aliases of tied weights are not read.

    Raises:
        ValueError: the file has another format.
    """
    dtypes = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    with path.open("rb") as file:

        def unpack(layout: str) -> tuple:
            return struct.unpack("<" + layout, file.read(struct.calcsize("<" + layout)))

        def string() -> str:
            return file.read(unpack("H")[0]).rstrip(b"\0").decode()

        (version,), spec, (revision,) = unpack("I"), string(), unpack("I")
        if (version, spec, revision) != (6, "WhisperSpec", 3):
            raise ValueError(f"{path}: format {version}, {spec} {revision}; wanted format 6, WhisperSpec 3")
        tensors = {}
        for _ in range(unpack("I")[0]):
            name, (rank,) = string(), unpack("B")
            shape, (dtype,), (size,) = unpack(f"{rank}I"), unpack("B"), unpack("I")
            array = np.frombuffer(file.read(size), dtypes[dtype]).reshape(shape)
            tensors[name] = torch.from_numpy(array.copy())
    return tensors


def _whisper_state_dict(
    tensors: dict[str, torch.Tensor], config: transformers.WhisperConfig
) -> dict[str, torch.Tensor]:
    """Map every CTranslate2 tensor to its name in `WhisperForConditionalGeneration`.

    CTranslate2 stacks self-attention q, k, v and cross-attention k, v row-wise in one linear layer each, with zeros for
    the bias that Whisper's keys do not have.

    Raises:
        ValueError: a tensor is left over, keys have a bias, or a setting differs.
    """
    left = dict(tensors)
    state = {}

    def move(source: str, target: str) -> None:
        for theirs, ours in (("weight", "weight"), ("gamma", "weight"), ("bias", "bias"), ("beta", "bias")):
            if f"{source}/{theirs}" in left:
                state[f"{target}.{ours}"] = left.pop(f"{source}/{theirs}")

    def split(source: str, target: str, names: tuple[str, ...]) -> None:
        weights, biases = (left.pop(f"{source}/{part}").chunk(len(names)) for part in ("weight", "bias"))
        for name, weight, bias in zip(names, weights, biases, strict=True):
            state[f"{target}.{name}.weight"] = weight.clone()
            if name != "k_proj":
                state[f"{target}.{name}.bias"] = bias.clone()
            elif bias.any():
                raise ValueError(f"{source}: keys have a bias, which Whisper does not have")

    for stack, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        for index in range(layers):
            theirs, ours = f"{stack}/layer_{index}", f"model.{stack}.layers.{index}"
            split(f"{theirs}/self_attention/linear_0", f"{ours}.self_attn", ("q_proj", "k_proj", "v_proj"))
            move(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            move(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            if stack == "decoder":
                split(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn", ("q_proj",))
                split(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn", ("k_proj", "v_proj"))
                move(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
                move(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
            move(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            move(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            move(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
        move(f"{stack}/layer_norm", f"model.{stack}.layer_norm")
        state[f"model.{stack}.embed_positions.weight"] = left.pop(f"{stack}/position_encodings/encodings")
    for convolution in ("conv1", "conv2"):
        move(f"encoder/{convolution}", f"model.encoder.{convolution}")
    move("decoder/embeddings", "model.decoder.embed_tokens")
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]

    settings = {
        "encoder/num_heads": config.encoder_attention_heads,
        "decoder/num_heads": config.decoder_attention_heads,
        "decoder/pre_norm": 1,
        "decoder/activation": 3,  # GELU
        "decoder/alibi": 0,
        "decoder/scale_embeddings": 0,
        "decoder/start_from_zero_embedding": 0,
        "decoder/alignment_layer": -1,
        "decoder/alignment_heads": 1,
    }
    found = {name: left.pop(name).item() for name in settings}
    if found != settings or left:
        raise ValueError(f"not the expected Whisper: settings {found}, wanted {settings}; unused {sorted(left)}")
    return state


def convert_whisper(source: Path, target: Path) -> None:
    """Convert Whisper tiny.en from `source` (model.bin, config.json, tokenizer.json) to `target`."""
    settings = json.loads((source / "config.json").read_text())
    special: dict[str, Any] = {
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "pad_token_id": 50256,
        "decoder_start_token_id": 50257,
    }
    config = transformers.WhisperConfig(  # tiny.en
        vocab_size=51864,
        num_mel_bins=80,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        **special,
    )
    model = transformers.WhisperForConditionalGeneration(config).half()
    model.load_state_dict(_whisper_state_dict(_read_ctranslate2(source / "model.bin"), config), strict=True)
    model.generation_config = transformers.GenerationConfig(
        **(special | {"bos_token_id": 50257}),
        is_multilingual=False,
        max_length=448,
        no_timestamps_token_id=50362,
        prev_sot_token_id=50360,
        max_initial_timestamp_index=50,
        return_timestamps=False,
        alignment_heads=settings["alignment_heads"],
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
    )
    model.save_pretrained(target)
    end = "<|endoftext|>"
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"),
        bos_token=end,
        eos_token=end,
        unk_token=end,
        pad_token=end,
    ).save_pretrained(target)
    transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(target)


# SmolLM2: GGUF -> LlamaForCausalLM


def convert_smollm2(source: Path, target: Path) -> None:
    """Convert SmolLM2 from the one GGUF file in `source` to `target`, with our chat template and padding token."""
    (file,) = source.glob("*.gguf")
    # By default the GGUF blocks would be kept where a kernel for them is installed.
    unpacked = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file.name, dtype=torch.float32, quantization_config=unpacked
    ).to(torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file.name)
    tokenizer.pad_token = "<|endoftext|>"  # the file has <|im_end|>, which ends an answer and must be learned
    tokenizer.chat_template = CHAT_TEMPLATE
    # With the file's quantisation setting every later load would look for GGUF blocks.
    config = transformers.LlamaConfig(
        **{
            key: value
            for key, value in model.config.to_dict().items()
            if key not in ("quantization_config", "_name_or_path")
        }
        | {"pad_token_id": tokenizer.pad_token_id}
    )
    dense = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    dense.load_state_dict(model.state_dict(), strict=True)
    dense.generation_config = transformers.GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    dense.save_pretrained(target)
    tokenizer.save_pretrained(target)
