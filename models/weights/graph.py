"""The part of a neural network file that weights are read from: constants, and the nodes that use them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

QUANTISED_PRODUCTS = {"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}


@dataclass(frozen=True)
class Node:
    """One operation: inputs and outputs are names of constants or of other nodes' results ("" = left out)."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass
class Graph:
    """Constants by name and all nodes, those of sub-graphs (If, Loop) included."""

    constants: dict[str, Array] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)


def dequantise(graph: Graph, name: str) -> NDArray[np.float32]:
    """`(q - zero point) * scale` of the constant `name`_quantized, with its `name`_scale and `name`_zero_point.

    Source: ONNX operator DequantizeLinear. Raises KeyError if one of the three is missing.
    """
    values = graph.constants[f"{name}_quantized"].astype(np.float32)
    zero = graph.constants[f"{name}_zero_point"].astype(np.float32)
    return (values - zero) * graph.constants[f"{name}_scale"].astype(np.float32)


def quantised_products(graph: Graph) -> dict[str, NDArray[np.float32]]:
    """Weights of the quantised matrix products, `(out, in)` as torch.nn.Linear has them, by the path of their node.

    A node "/layers.0/mlp/fc1/MatMul_quant" gives the key "layers.0.mlp.fc1".
    """
    found: dict[str, NDArray[np.float32]] = {}
    for node in graph.nodes:
        if node.op not in QUANTISED_PRODUCTS:
            continue
        constant = next((name for name in node.inputs if name.endswith("_quantized") and name in graph.constants), None)
        if constant is not None:
            path = node.name.rpartition("/")[0].strip("/").replace("/", ".")
            found[path] = np.ascontiguousarray(dequantise(graph, constant.removesuffix("_quantized")).T)
    return found
