"""The bytes of a recording that lies in a container: a tar or an Arrow file by its place, a Parquet file by its row.

`read_inside` is what a worker calls for a recording whose `inside` is not None. Its `start` and `duration`, if it has
them, count in seconds of its decoded audio: `samples[round(start * rate) :][: round(duration * rate)]`, which is empty
for a start beyond the end, and shorter than `duration` where the file ends before; both are faults of the manifest.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from components.audio.decode import BadAudio
from infra import storage

if TYPE_CHECKING:
    import pyarrow as pa

MAX_BYTES = 1 << 30  # of a recording, or of a row group: more is never read into memory
BUFFER = 1 << 20  # bytes that are read of a remote file at a time
KEPT = 2  # row groups that stay in memory, of MAX_BYTES together

CHANGED = "its container is not what it was when it was listed; run the ingest stage again"


class Container:
    """A file to seek in, local or remote; `error` is why the store did not hand it out, if that is what went wrong."""

    def __init__(self, url: str) -> None:
        if storage.is_local(url):
            storage.size(url)  # refuses a pipe, which to open would wait for ever
        self.file: BinaryIO = storage.open_read(url, BUFFER)
        self.size = self.file.seek(0, os.SEEK_END)
        self.file.seek(0)

    @property
    def error(self) -> Exception | None:
        return storage.read_error(self.file)

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def read_inside(url: str, inside: str) -> bytes:
    """The bytes at `inside` of the container: "bytes OFFSET SIZE", or "row NUMBER COLUMN" of a Parquet file.

    Raises BadAudio if there is no such place, FileNotFoundError if there is no container, and OSError if the store
    cannot be reached. A row's neighbours stay in memory, at most two row groups of 1 GiB together, so read in order.
    """
    place = re.fullmatch(r"bytes (\d{1,18}) (\d{1,18})", inside)
    if place:
        return _read_bytes(url, int(place[1]), int(place[2]))
    row = re.fullmatch(r"row (\d{1,18}) (.+)", inside, re.DOTALL)
    if row is None:
        raise BadAudio(f"{inside[:80]!r} is no place in a container; run the ingest stage again")
    value = _read_row(url, int(row[1]), row[2])
    if value is None:
        raise BadAudio(f"row {row[1]} holds no audio; write the table again, or remove the row")
    return value


def _read_bytes(url: str, offset: int, size: int) -> bytes:
    if size > MAX_BYTES:
        raise BadAudio(f"the recording is larger than {MAX_BYTES >> 20} MiB; cut it into clips")
    data = storage.read_range(url, offset, size)
    if len(data) == size:
        return data
    if offset + size > storage.size(url):
        raise BadAudio(CHANGED)
    raise OSError(f"{storage.shown(url)}: {len(data)} of {size} bytes came; run the stage again")


class _Group(NamedTuple):
    first: int  # row of the file
    values: pa.ChunkedArray[Any]
    bytes: int


_groups: OrderedDict[tuple[object, ...], _Group] = OrderedDict()  # by file and column, the latest last
_lock = threading.Lock()  # threads that read neighbours wait for one reading of their row group


def _read_row(url: str, row: int, column: str) -> bytes | None:
    version = os.stat(storage.local_path(url)) if storage.is_local(url) else None
    key = (url, column, version and (version.st_mtime_ns, version.st_size, version.st_ino))
    with _lock:
        group = _groups.pop(key, None)
        if group is None or not group.first <= row < group.first + len(group.values):
            group = None  # freed before the next one is read
            group = _row_group(url, row, column)
        _groups[key] = group
        while len(_groups) > KEPT or (len(_groups) > 1 and sum(one.bytes for one in _groups.values()) > MAX_BYTES):
            _groups.popitem(last=False)
    value = group.values[row - group.first].as_py()
    return value if value is None or isinstance(value, bytes) else None


def _row_group(url: str, row: int, column: str) -> _Group:
    """The row group with `row`, of one column: the bytes in it, if its cells are `{bytes, path}`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with Container(url) as container:
        try:
            file = pq.ParquetFile(container.file)
            first, number = 0, 0
            while number < file.num_row_groups and row >= first + file.metadata.row_group(number).num_rows:
                first, number = first + file.metadata.row_group(number).num_rows, number + 1
            field = file.schema_arrow.field(column)
            if number == file.num_row_groups:
                raise BadAudio(CHANGED)
            wanted = f"{column}.bytes" if pa.types.is_struct(field.type) else column
            check_group(file.metadata.row_group(number))
            values = file.read_row_group(number, columns=[wanted]).column(column)
            values.validate(full=True)
            if pa.types.is_struct(values.type):
                kind = field.type.field("bytes").type
                chunks: list[Any] = values.chunks
                values = pa.chunked_array([chunk.field("bytes") for chunk in chunks], type=kind)
            return _Group(first, values, values.nbytes)
        except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
            if container.error or isinstance(error, BadAudio):
                raise container.error or error from None
            raise BadAudio(f"the table is damaged ({str(error)[:120]}); copy or write it again") from error


def check_group(group: Any) -> None:
    """Raises BadAudio for a row group of a Parquet file that is too large for the memory.

    By its whole size: to ask a damaged file for one column's ends the process (pyarrow 26, RowGroupMetaData.column).
    """
    if not 0 <= group.total_byte_size <= MAX_BYTES:
        size = group.total_byte_size >> 20
        raise BadAudio(f"a row group of the table has {size} MiB; write it with row_group_size=100")
