from __future__ import annotations

import pytest

from infra.units import volume


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_600_000, "999.6 MB"), (2.5e9, "2.5 GB"), (4e15, "4,000.0 TB")],
)
def test_bytes_have_the_largest_unit_of_which_there_is_one(size: float, text: str) -> None:
    assert volume(size) == text
