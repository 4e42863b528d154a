"""Moonshine tiny-en (27 M, MIT) from the wheels that carry it to a transformers folder.

`moonshine-voice==0.0.73` has the weights, dynamically quantised to 8 bits, as ONNX-runtime files;
`useful-moonshine-onnx` has the tokenizer. Source of the sizes: arXiv 2410.15608 and the graphs themselves.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from models.weights.files import Source, write_json
from models.weights.graph import dequantise, quantised_products
from models.weights.ort import read_ort

NAME = "moonshine-tiny-en"
VERSION = 1
WHEELS = ("moonshine-voice==0.0.73", "useful-moonshine-onnx==20251121")
SOURCES = {
    "encoder_model.ort": Source(
        "moonshine_voice",
        "assets/tiny-en/encoder_model.ort",
        "94e90a4654fc45cdfedb77c4c08e1739f48862998e58fada384b25118134f221",
    ),
    "decoder_model_merged.ort": Source(
        "moonshine_voice",
        "assets/tiny-en/decoder_model_merged.ort",
        "cf524c4862d36e9e5ab032eddc73637efd822d70e868ac575cf1a46e1e4708a0",
    ),
    "tokenizer.json": Source(
        "moonshine_onnx",
        "assets/tokenizer.json",
        "b68b995a58b3373db6c4f46864a9db50cd1333d086150ffa2c1096581ede9c10",
    ),
}

CONFIG = {
    "architectures": ["MoonshineForConditionalGeneration"],
    "model_type": "moonshine",
    "vocab_size": 32768,
    "hidden_size": 288,
    "intermediate_size": 1152,
    "encoder_num_hidden_layers": 6,
    "decoder_num_hidden_layers": 6,
    "encoder_num_attention_heads": 8,
    "decoder_num_attention_heads": 8,
    "encoder_num_key_value_heads": 8,
    "decoder_num_key_value_heads": 8,
    "encoder_hidden_act": "gelu",
    "decoder_hidden_act": "silu",
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.9},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "decoder_start_token_id": 1,
    "is_encoder_decoder": True,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "decoder_start_token_id": 1}
FEATURES = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "sampling_rate": 16000,
    "padding_value": 0.0,
    "do_normalize": False,
    "return_attention_mask": True,
}
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "</s>",
    "model_max_length": 512,
}


def convert(sources: dict[str, Path], folder: Path) -> None:
    """Writes config, weights (float32 safetensors), tokenizer and feature extractor files into `folder`."""
    weights = encoder_weights(sources["encoder_model.ort"]) | decoder_weights(sources["decoder_model_merged.ort"])
    save_file({name: weights[name] for name in sorted(weights)}, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", GENERATION)
    write_json(folder / "preprocessor_config.json", FEATURES)
    write_json(folder / "tokenizer_config.json", TOKENIZER)
    shutil.copyfile(sources["tokenizer.json"], folder / "tokenizer.json")


def encoder_weights(path: Path) -> dict[str, NDArray[np.float32]]:
    """Parameters `model.encoder.*` from the encoder's graph."""
    graph = read_ort(path)
    found = {f"{name}.weight": value for name, value in quantised_products(graph).items()}
    for name, value in graph.constants.items():
        plain = name.removesuffix("_add_tensor")
        if value.dtype == np.float32 and plain.endswith((".weight", ".bias")):
            found[plain] = value.astype(np.float32)
    affine = {node.name: node.inputs[1] for node in graph.nodes if node.name in ("/groupnorm/Mul", "/groupnorm/Add")}
    found["groupnorm.weight"] = graph.constants[affine["/groupnorm/Mul"]].ravel().astype(np.float32)
    found["groupnorm.bias"] = graph.constants[affine["/groupnorm/Add"]].ravel().astype(np.float32)
    return {f"model.encoder.{name}": np.ascontiguousarray(value) for name, value in found.items()}


def decoder_weights(path: Path) -> dict[str, NDArray[np.float32]]:
    """Parameters `model.decoder.*`; the output projection is tied to the embedding and left out."""
    graph = read_ort(path)
    found = {f"{name}.weight": value for name, value in quantised_products(graph).items() if name != "proj_out"}
    for name, value in graph.constants.items():
        plain = name.removesuffix("_merged_0")
        if value.dtype == np.float32 and plain.startswith("model.") and plain.endswith((".weight", ".bias")):
            found[plain] = value.astype(np.float32)
    found["model.decoder.embed_tokens.weight"] = dequantise(graph, "model.decoder.embed_tokens.weight_merged_0")
    return found
