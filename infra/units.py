"""Amounts as people read them."""

from __future__ import annotations

UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3}


def volume(size: float) -> str:
    """Bytes in the largest decimal unit of which there is at least one: 12,345,678 is `12.3 MB`."""
    for unit, factor in UNITS.items():
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size:.0f} B"
