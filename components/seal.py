"""JSON records that know when one of their bits was changed: the sha256 of the file's own text stands in it."""

from __future__ import annotations

import hashlib
import re
from typing import TypeVar

from pydantic import BaseModel

from infra.storage import read_bytes, shown

Record = TypeVar("Record", bound=BaseModel)
OPEN = "0" * 64  # what stands in the place of the seal while the text is digested
SEAL = re.compile(rb'"seal":\s?"([0-9a-f]{64})"')


def sealed(record: BaseModel, indent: int | None = None) -> bytes:
    """The JSON of a record that has a field `seal`, sealed."""
    data = record.model_copy(update={"seal": OPEN}).model_dump_json(indent=indent).encode() + b"\n"
    begin, end = list(SEAL.finditer(data))[-1].span(1)  # the last: an earlier one would be in somebody's text
    return data[:begin] + hashlib.sha256(data).hexdigest().encode() + data[end:]


def unsealed(data: bytes, kind: type[Record], name: str) -> Record:
    """The record in sealed JSON. ValueError if anything in it was changed, or it is of another form."""
    places = list(SEAL.finditer(data))
    if not places:
        raise ValueError(f"{name} has no seal: it is damaged or of another version of this code")
    begin, end = places[-1].span(1)
    if hashlib.sha256(data[:begin] + OPEN.encode() + data[end:]).hexdigest().encode() != places[-1].group(1):
        raise ValueError(f"{name} is damaged: its seal is not that of its text")
    try:
        return kind.model_validate_json(data)
    except ValueError as error:
        raise ValueError(f"{name} is of another version of this code ({error})") from error


def read_sealed(url: str, kind: type[Record]) -> Record:
    """The record at a URL. ValueError as above, FileNotFoundError."""
    return unsealed(read_bytes(url), kind, shown(url))
