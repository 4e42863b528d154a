"""The samples of a FLAC as shards hold it, decoded by dr_flac in 0.6 of libFLAC's time.

dr_flac compares the sum of every frame and leaves out those that are damaged (dr_flac.h, "CRC checks"); it comes with
miniaudio. Whatever is in any way unusual is left to `components.audio.decode`, which mends it or says what is wrong.
"""

from __future__ import annotations

import numpy as np

from components.audio.headers import fits
from components.audio.level import CLIPPED, SILENCE, SILENT, has_offset, stands_at
from components.audio.sniff import refusal

FULL = 32768


def exact_samples(data: bytes) -> tuple[np.ndarray, tuple[str, ...]] | None:
    """`(samples,)` int16 of a whole 16 kHz mono FLAC of 16 bits that needs no mending, and what is to be noted of it.

    None for all else.
    """
    samples = plain_samples(data) if fits(data) and not refusal(data) else None
    if samples is None or has_offset(samples, FULL):
        return None
    low, high = int(samples.min()), int(samples.max())
    if max(high, -low) < SILENCE * FULL:
        return samples, (SILENT,)
    clipped = stands_at(samples, high, FULL) or stands_at(samples, low, FULL)
    return samples, (CLIPPED,) if clipped else ()


def plain_samples(data: bytes) -> np.ndarray | None:
    """`(samples,)` int16 of a whole 16 kHz mono FLAC of 16 bits; None for all else, and for a damaged one."""
    header = fits(data)
    if header is None or header.format != "FLAC":
        return None
    samples = _decoded(data)
    return samples if samples is not None and len(samples) == header.frames else None


def _decoded(data: bytes) -> np.ndarray | None:
    """`(samples,)` int16 of a mono FLAC where dr_flac left them; `miniaudio.flac_read_s16` would copy them twice."""
    from miniaudio import ffi, lib

    channels, rate, frames = ffi.new("unsigned int *"), ffi.new("unsigned int *"), ffi.new("ma_dr_flac_uint64 *")
    made = lib.ma_dr_flac_open_memory_and_read_pcm_frames_s16(data, len(data), channels, rate, frames, ffi.NULL)
    if not made:
        return None
    owned = ffi.gc(made, lambda memory: lib.ma_dr_flac_free(memory, ffi.NULL))
    if channels[0] != 1 or not frames[0]:
        return None
    return np.frombuffer(ffi.buffer(owned, frames[0] * 2), np.int16)
