"""Arrow files message by message, as `datasets` writes them, with the place of each value in the file.

Format: https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format. An uncompressed file holds the
audio as it is, so that a worker later reads a recording by its offset alone.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from components.audio.inside import MAX_BYTES

CONTINUES = 0xFFFFFFFF  # before the length of each message
FILE_MAGIC = b"ARROW1\0\0"  # before the stream in the file format
MAX_HEADER = 16 << 20  # bytes of a message's header
UNPACK = "write it with Dataset.save_to_disk"


class BadArrow(ValueError):
    """A file that cannot be read further."""


class Batch(NamedTuple):
    """A record batch, and where it was read from: memory at `address` is the file at `offset`."""

    values: pa.RecordBatch
    address: int
    offset: int
    size: int  # bytes of the whole message


def batches(file: BinaryIO, size: int) -> Iterator[pa.Schema | Batch]:
    """The schema of an Arrow stream of `size` bytes, then its record batches. Raises BadArrow."""
    file.seek(0)
    at = len(FILE_MAGIC) if file.read(len(FILE_MAGIC)) == FILE_MAGIC else 0
    schema: pa.Schema | None = None
    while True:
        file.seek(at)
        prefix = file.read(8)
        if len(prefix) < 8:
            raise BadArrow(f"it breaks off after {at:,} bytes" if at else "this is no Arrow file")
        marker, length = struct.unpack("<Ii", prefix)
        if marker == CONTINUES and length == 0:
            return
        if marker != CONTINUES or not 0 < length <= MAX_HEADER:
            raise BadArrow(f"it is damaged at byte {at:,}" if at else "this is no Arrow file")
        header = file.read(length)
        body = _body(header)
        if body > MAX_BYTES:
            raise BadArrow(f"a record batch has {body >> 20} MiB, at most {MAX_BYTES >> 20} are read: {UNPACK}")
        if not 0 <= body <= size - at - 8 - length:
            raise BadArrow(f"it breaks off in what begins at byte {at:,}")
        buffer = pa.py_buffer(prefix + header + file.read(body))
        message = pa.ipc.read_message(buffer)
        if message.type == "schema":
            schema = pa.ipc.read_schema(message)
            yield schema
        elif message.type == "record batch" and schema is not None:
            values = pa.ipc.read_record_batch(message, schema)
            if values.num_rows > size:
                raise BadArrow(f"it declares {values.num_rows:,} rows in {size:,} bytes")
            values.validate(full=True)
            yield Batch(values, buffer.address, at, buffer.size)
        else:
            raise BadArrow(f"it holds a message of type {message.type!r}, which datasets never writes: {UNPACK}")
        at += 8 + length + body


def places(batch: Batch, values: pa.Array[Any]) -> list[tuple[int, int] | None]:
    """Offset in the file and size of each value of a binary array of the batch; None for a null. Raises BadArrow."""
    import numpy as np

    kind = np.int64 if pa.types.is_large_binary(values.type) else np.int32
    _, bounds, data = values.buffers()
    if bounds is None or len(values) == 0:
        return [None] * len(values)
    ends = np.frombuffer(memoryview(bounds), dtype=kind)[values.offset :][: len(values) + 1].tolist()
    start = data.address - batch.address if data is not None and ends[-1] else 0
    if not 0 <= start <= batch.size - ends[-1]:
        raise BadArrow(f"its audio is not stored as it is: {UNPACK}")
    spans = zip(values.is_valid().to_pylist(), ends, ends[1:], strict=False)
    return [(batch.offset + start + begin, end - begin) if valid else None for valid, begin, end in spans]


def _body(header: bytes) -> int:
    """Bytes of the body of a message. Raises BadArrow for a compressed one, whose real size nobody can know before."""
    try:
        message = struct.unpack_from("<I", header)[0]
        kind, batch, body = (_field(header, message, number) for number in (1, 2, 3))
        if kind and header[kind] == 3 and batch:  # a record batch
            table = batch + struct.unpack_from("<I", header, batch)[0]
            if _field(header, table, 3):
                raise BadArrow(f"it is compressed: {UNPACK}")
        return int(struct.unpack_from("<q", header, body)[0]) if body else 0
    except (struct.error, IndexError) as error:
        raise BadArrow("the header of a message is damaged") from error


def _field(data: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffer's table lies, or 0 if it is absent (https://flatbuffers.dev/internals)."""
    fields = table - struct.unpack_from("<i", data, table)[0]
    entry = 4 + 2 * number
    if entry >= struct.unpack_from("<H", data, fields)[0]:
        return 0
    place = struct.unpack_from("<H", data, fields + entry)[0]
    return table + int(place) if place else 0
