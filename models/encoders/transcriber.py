"""A speech recogniser as an encoder whose frames are the bytes of what it heard: transcripts in the feature cache.

LTU-AS (arXiv 2309.14405) gives its language model Whisper's transcript as text beside the audio tokens. Bytes 1 to 255
are exact in bfloat16, which caches hold.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from models.encoders.base import SAMPLE_RATE, AudioEncoder, EncoderSpec
from models.encoders.recogniser import Recogniser

BYTES_PER_SECOND, BYTES_MORE = 24, 16
INVENTED = (
    "thanks for watching",
    "thank you for watching",
    "thank you so much for watching",
    "please subscribe to my channel",
    "subtitles by the amara.org community",
)
SILENCE = re.compile("|".join(rf"\b{re.escape(phrase)}\b[.!?…]*" for phrase in INVENTED), re.IGNORECASE)


def transcript_of(frames: Tensor) -> str:
    """The text that the frames of a `TranscriberEncoder` hold, `(frames, 1)`. Raises ValueError if they hold none."""
    values = frames[:, 0].tolist()
    text = values[: values.index(0)] if 0 in values else values
    if any(not 1 <= value <= 255 or value != int(value) for value in text):
        raise ValueError("these frames are not the bytes of a transcript: were they made by encoder 'transcriber'?")
    return bytes(int(value) for value in text).decode()


def without_hallucinations(text: str) -> str:
    """A transcript without what Whisper is known to write where nobody speaks.

    LTU-AS takes "thanks for watching" out of its transcripts; the other phrases of `INVENTED` are of the same kind.
    """
    return re.sub(r"\s+", " ", SILENCE.sub(" ", text)).strip()


def as_bytes(text: str, size: int) -> bytes:
    """UTF-8 of a text in at most `size` bytes, cut between characters and without zero bytes."""
    return text.replace("\0", "").encode()[:size].decode(errors="ignore").encode()


class TranscriberEncoder(AudioEncoder):
    """Greedy transcripts by the recogniser that `spec.config` describes (`Recogniser`), zeros behind their end.

    Room for 24 bytes a second and 16 more; what is longer is cut. There is nothing to train: no gradient passes.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.recogniser = Recogniser(spec)
        self.width = 1
        self.frame_rate = float(BYTES_PER_SECOND)
        self.eval()

    def frames_of(self, samples: int) -> int:
        return math.ceil(BYTES_PER_SECOND * samples / SAMPLE_RATE) + BYTES_MORE

    def seconds_of(self, samples: int) -> float:
        return self.recogniser.seconds_of(samples)

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        sizes = [self.frames_of(int(n)) for n in lengths]
        frames = torch.zeros(len(sizes), max(sizes), 1)
        for row, text, size in zip(frames, self.transcribe(waveforms, lengths), sizes, strict=True):
            data = as_bytes(text, size)
            row[: len(data), 0] = torch.tensor(list(data), dtype=torch.float32)
        return frames.to(waveforms.device)

    @torch.inference_mode()
    def transcribe(self, waveforms: Tensor, lengths: Tensor) -> list[str]:
        """Transcripts, `(batch, samples)` and `(batch,)` → one text a clip."""
        frames, valid = self.recogniser.listen(waveforms, lengths)
        ids = self.recogniser.decode(frames, valid, [self.recogniser.limit(int(n)) for n in lengths])
        return [self.recogniser.text(row) for row in ids]

    def preprocessing(self) -> dict[str, Any]:
        found = super().preprocessing() | self.recogniser.decoding() | self.recogniser.wording()
        return found | {"bytes": [BYTES_PER_SECOND, BYTES_MORE]}
