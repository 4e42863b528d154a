"""The Whisper-tiny encoder (7.8 M, 8 s windows, BSD-2) of Smart Turn v3.2, from `pipecat-ai==1.14.0`.

The ONNX file is quantised to 8 bits with QuantizeLinear / DequantizeLinear pairs, and the matrix products have lost
their names: each is named after the bias that is added to its result, and the one without a bias is the key
projection of the layer whose query projection reads the same input.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from models.weights.files import Source, write_json
from models.weights.graph import Graph, Node
from models.weights.onnx import read_onnx

NAME = "whisper-tiny-smart-turn"
VERSION = 1
WHEELS = ("pipecat-ai==1.14.0",)
SOURCES = {
    "model.onnx": Source(
        "pipecat",
        "audio/turn/smart_turn/data/smart-turn-v3.2-cpu.onnx",
        "2bb026316b14a660486a75b1733cd3fbab8c2fd0314dc9af7be49f8cca967e4f",
    ),
}
PREFIX = "inner.encoder."

CONFIG = {
    "architectures": ["WhisperEncoder"],
    "model_type": "whisper",
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "num_mel_bins": 80,
    "max_source_positions": 400,
    "activation_function": "gelu",
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "scale_embedding": False,
    "dtype": "float32",
}
FEATURES = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 80,
    "sampling_rate": 16000,
    "hop_length": 160,
    "n_fft": 400,
    "chunk_length": 8,
    "do_normalize": True,
    "return_attention_mask": False,
}


def convert(sources: dict[str, Path], folder: Path) -> None:
    """Writes config, the encoder's weights (float32, bare names) and the front end's settings into `folder`."""
    weights = encoder_weights(read_onnx(sources["model.onnx"]))
    save_file({name: weights[name] for name in sorted(weights)}, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "preprocessor_config.json", FEATURES)


def encoder_weights(graph: Graph) -> dict[str, NDArray[np.float32]]:
    """Parameters of transformers' WhisperEncoder."""
    values = constants(graph)
    products = name_products(graph, values)
    found = {f"{path}.weight": np.ascontiguousarray(values[constant].T) for path, constant in products.items()}
    for node in graph.nodes:
        if node.op == "Conv":
            path = node.inputs[2].removesuffix(".bias")
            found[f"{path}.weight"], found[f"{path}.bias"] = values[node.inputs[1]], values[node.inputs[2]]
    for name, value in values.items():
        if name.startswith(PREFIX) and name.endswith((".weight", ".bias")):
            found[name] = value
    return {name.removeprefix(PREFIX): value for name, value in found.items() if name.startswith(PREFIX)}


def constants(graph: Graph) -> dict[str, NDArray[np.float32]]:
    """Constants in float32, and under the names of their results those that are dequantised."""
    found = {name: value.astype(np.float32) for name, value in graph.constants.items() if value.dtype == np.float32}
    for node in graph.nodes:
        if node.op == "DequantizeLinear" and node.inputs[0] in graph.constants:
            quantised, scale, zero = (graph.constants[name].astype(np.float32) for name in node.inputs)
            axis = -1 if node.inputs[0].startswith("val_") else 0  # a product's weight is (in, out), others (out, ...)
            shape = [1] * quantised.ndim
            shape[axis] = -1
            found[node.outputs[0]] = (quantised - zero.reshape(shape)) * scale.reshape(shape)
    return found


def name_products(graph: Graph, values: dict[str, NDArray[np.float32]]) -> dict[str, str]:
    """Path of a linear layer → name of the constant in its matrix product."""
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    named: dict[str, str] = {}
    reads: dict[str, str] = {}
    nameless: list[Node] = []
    for node in graph.nodes:
        if node.op != "MatMul" or node.inputs[1] not in values:
            continue
        bias = added_bias(node.outputs[0], readers)
        if bias is None:
            nameless.append(node)
        else:
            named[bias.removesuffix(".bias")] = node.inputs[1]
            reads[bias.removesuffix(".bias")] = node.inputs[0]
    for node in nameless:
        query = next(
            (path for path, source in reads.items() if source == node.inputs[0] and path.endswith(".q_proj")), None
        )
        if query is not None:
            named[query.replace(".q_proj", ".k_proj")] = node.inputs[1]
    return named


def added_bias(name: str, readers: dict[str, list[Node]]) -> str | None:
    """The bias that is added to a result, looking through quantisation; None if there is none."""
    for node in readers.get(name, []):
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            return added_bias(node.outputs[0], readers)
        if node.op == "Add":
            return next((other for other in node.inputs if other.endswith(".bias")), None)
    return None
