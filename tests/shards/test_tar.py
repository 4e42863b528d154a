"""components/shards/tar.py: headers by hand are those of the standard library."""

from __future__ import annotations

import tarfile

from hypothesis import given
from hypothesis import strategies as st

from components.shards.tar import header

NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=40
)


@given(NAMES, st.integers(0, 8**11 - 1))
def test_a_header_is_that_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    try:
        expected = info.tobuf(tarfile.USTAR_FORMAT)
    except ValueError:
        return
    assert header(name, size) == expected
