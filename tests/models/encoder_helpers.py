"""What the tests of encoders share: clips, the promises of the base class, and transformers' Kaldi filter banks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.encoders import AudioEncoder


def clips(*lengths: int, seed: int = 7) -> list[Tensor]:
    """Noise of changing loudness, different at each call's position but always the same."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) * 0.05 * (i + 1) for i, n in enumerate(lengths)]


def check_a_padded_batch_equals_each_clip_alone(encoder: AudioEncoder, batch: Sequence[Tensor]) -> None:
    """The first two clips differ, so their frames must."""
    with torch.inference_mode():
        together = encoder(list(batch))
        alone = [encoder([clip])[0] for clip in batch]
    for clip, one, other in zip(batch, together, alone, strict=True):
        assert one.shape == other.shape == (encoder.output_length(len(clip)), encoder.width)
        assert one.dtype == torch.float32
        assert torch.isfinite(one).all()
        assert (one - other).abs().max() < 1e-4
    assert not torch.allclose(together[0][0], together[1][0], atol=1e-2)


def check_what_lies_in_the_padding_does_not_matter(encoder: AudioEncoder, short: int) -> None:
    lengths = torch.tensor([short, 5000])
    silent = torch.nn.utils.rnn.pad_sequence(clips(short, 5000), batch_first=True)
    loud = silent.clone()
    loud[0, short:] = 0.7
    with torch.inference_mode():
        first, second = encoder.encode(silent, lengths), encoder.encode(loud, lengths)
    valid = encoder.frames_of(short)
    assert torch.equal(first[0, :valid], second[0, :valid])
    assert torch.equal(first[1], second[1])


def check_lengths_are_known_without_running(encoder: AudioEncoder, *lengths: int) -> None:
    batch = clips(*lengths)
    with torch.inference_mode():
        sizes = [len(frames) for frames in encoder(batch)]
    assert sizes == [encoder.output_length(len(clip)) for clip in batch]
    assert min(sizes) >= 1


def kaldi_by_transformers(clip: Tensor, window: str) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Log filter banks `(frames, 128)` of a clip in float64, and the filters `(257, 128)` behind them."""
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    bank = {"norm": None, "mel_scale": "kaldi", "triangularize_in_mel_space": True}
    filters = mel_filter_bank(257, 128, 20.0, 8000.0, 16000, **bank)
    found = spectrogram(
        clip.numpy().astype(np.float64),
        window_function(400, window, periodic=False),
        400,
        160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=filters,
        log_mel="log",
        mel_floor=1.1920928955078125e-07,
        remove_dc_offset=True,
    )
    return found.T, filters
