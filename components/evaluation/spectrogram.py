"""A log-mel spectrogram as a small PNG, by numpy and zlib only."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from components.schema import SAMPLE_RATE

WINDOW = 400  # samples, 25 ms
HOP = 160  # samples, 10 ms
MELS = 96
FLOOR = 70.0  # decibels below the loudest point that are still drawn
QUIET = -30.0  # decibels; a clip whose loudest point is below this is drawn dark, not amplified
MAX_WIDTH = 900  # pixels; longer clips are averaged in time

# Anchors of matplotlib's magma (CC0), evenly spaced; the palette between them is linear.
_MAGMA = (
    (0, 0, 4), (20, 14, 54), (59, 15, 112), (100, 26, 128), (140, 41, 129), (183, 55, 121),
    (222, 73, 104), (247, 112, 92), (254, 159, 109), (254, 207, 146), (252, 253, 191),
)  # fmt: skip


def log_mel(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mono at 16 kHz, `(samples,)` in [-1, 1] → `(MELS, frames)`: decibels below the loudest point, in [-FLOOR, 0]."""
    signal = np.nan_to_num(np.asarray(samples, dtype=np.float32).reshape(-1))
    signal = np.pad(signal, (0, max(0, WINDOW - len(signal))))
    frames = np.lib.stride_tricks.sliding_window_view(signal, WINDOW)[::HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW), n=2 * WINDOW, axis=1)) ** 2
    decibels = 10 * np.log10(power @ mel_filters(2 * WINDOW) + 1e-10)
    loudest = max(float(decibels.max()), QUIET)
    return np.clip(decibels - loudest, -FLOOR, 0).T.astype(np.float32)


def mel_filters(points: int) -> NDArray[np.float64]:
    """Triangles evenly spaced on the mel scale (HTK formula) up to 8 kHz, `(points // 2 + 1, MELS)`."""
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, MELS + 2) / 2595) - 1)  # hertz
    bins = np.linspace(0, SAMPLE_RATE / 2, points // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling))


def mel_height(hertz: float) -> float:
    """Where a frequency lies in the picture: 0 = bottom (0 Hz), 1 = top (8 kHz)."""
    return float(np.log10(1 + hertz / 700) / np.log10(1 + SAMPLE_RATE / 2 / 700))


def spectrogram_png(samples: NDArray[np.float32]) -> bytes:
    """PNG of `log_mel`, low frequencies at the bottom; the same samples give the same bytes."""
    levels = 1 + log_mel(samples) / FLOOR  # 0 quiet .. 1 loud
    if levels.shape[1] > MAX_WIDTH:
        edges = np.linspace(0, levels.shape[1], MAX_WIDTH, endpoint=False).astype(int)
        levels = np.add.reduceat(levels, edges, axis=1) / np.diff(np.append(edges, levels.shape[1]))
    # 64 shades are as good to the eye as 256 and compress to half of the bytes.
    shades = np.round(levels[::-1] * 63).astype(np.uint8) * 4
    return png(shades, palette())


def palette() -> NDArray[np.uint8]:
    """256 colours from black through purple and orange to a light yellow, `(256, 3)`."""
    places = np.linspace(0, 255, len(_MAGMA))
    channels = [np.interp(np.arange(256), places, [colour[i] for colour in _MAGMA]) for i in range(3)]
    return np.round(np.stack(channels, axis=1)).astype(np.uint8)


def png(indices: NDArray[np.uint8], colours: NDArray[np.uint8]) -> bytes:
    """An indexed PNG, `(height, width)` into `(256, 3)`. Source: W3C PNG specification, second edition."""
    height, width = indices.shape
    rows = np.zeros((height, width + 1), dtype=np.uint8)
    rows[:, 0] = 1  # filter "sub": each byte minus its left neighbour
    rows[:, 1] = indices[:, 0]
    rows[:, 2:] = indices[:, 1:] - indices[:, :-1]
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            _chunk(b"PLTE", colours.tobytes()),
            _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
