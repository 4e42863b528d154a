"""components/seal.py: a changed bit anywhere in a record is seen before it is used."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.schema import Strict
from components.seal import read_sealed, sealed, unsealed
from infra import storage


class Note(Strict):
    name: str
    numbers: tuple[float, ...] = ()
    seal: str = ""


@given(st.text(), st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5), st.sampled_from([None, 2]))
def test_what_was_sealed_comes_back(name: str, numbers: list[float], indent: int | None) -> None:
    back = unsealed(sealed(Note(name=name, numbers=tuple(numbers)), indent), Note, "note")
    assert (back.name, back.numbers, len(back.seal)) == (name, tuple(numbers), 64)


def test_every_flipped_bit_is_seen() -> None:
    data = sealed(Note(name='who "seals" this: "seal":"' + 64 * "0" + '"', numbers=(1.0, 0.30000000000000004)), 2)
    for place in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            with pytest.raises(ValueError, match="note"):
                unsealed(bytes(changed), Note, "note")


def test_what_was_not_sealed_or_is_of_another_form_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    url = str(tmp_path / "note.json")
    storage.write_text(url, '{"name": "x"}')
    with pytest.raises(ValueError, match=r"note\.json has no seal"):
        read_sealed(url, Note)

    class Other(Strict):
        title: str
        seal: str = ""

    storage.write_bytes(url, sealed(Other(title="x")))
    with pytest.raises(ValueError, match="another version"):
        read_sealed(url, Note)
    with pytest.raises(FileNotFoundError):
        read_sealed(url + "x", Note)
