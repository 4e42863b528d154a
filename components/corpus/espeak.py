"""eSpeak NG as a pure function: a list of utterances in, the same samples out on every call.

The library keeps state between utterances that no parameter resets (phase of the flutter, echo, noise), so the
same sentence differs from one call to the next. Each list is therefore spoken in order by a fresh child process,
which also keeps a crash of the C library out of the caller. The library and its data come from the wheel
`espeakng-loader`; its C interface is documented in eSpeak NG's `speak_lib.h`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

SAMPLE_RATE = 22_050  # hertz; all that eSpeak NG's own synthesiser gives
INSTALL = "pip install 'espeakng-loader>=0.2,<0.3'"
LOUDNESS = 80  # of 100, at which some voices clip

# From speak_lib.h: espeak_AUDIO_OUTPUT, espeakINITIALIZE_DONT_EXIT, espeakCHARS_UTF8 and espeak_PARAMETER.
SYNCHRONOUS = 2
DO_NOT_EXIT = 0x8000
UTF8 = 1
RATE, VOLUME, PITCH, RANGE, WORD_GAP = 1, 2, 3, 4, 7


@dataclass(frozen=True)
class Utterance:
    """What is said and how: `voice` is a file of the data folder, with a variant after `+` (`gmw/en-US+f2`)."""

    text: str
    voice: str
    speed: int = 175  # words a minute, 80 to 450
    pitch: int = 50  # 0 to 100
    pitch_range: int = 50  # 0 (monotone) to 100


def speak(utterances: Sequence[Utterance]) -> Generator[npt.NDArray[np.int16], None, None]:
    """Yields the samples of each utterance in order, mono at SAMPLE_RATE.

    The result depends on the whole list and nothing else. Raises RuntimeError with the remedy if the library is
    missing, does not know a voice, or crashes.
    """
    if importlib.util.find_spec("espeakng_loader") is None:
        raise RuntimeError(f"eSpeak NG is not installed, and the corpus is spoken with it: {INSTALL}")
    lines = "".join(json.dumps(asdict(utterance)) + "\n" for utterance in utterances)
    with tempfile.TemporaryFile() as complaints:
        # -P keeps this file's folder out of the child's module path; the child reads all before it writes.
        child = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints
        )
        try:
            yield from _listen(child, lines.encode(), len(utterances), complaints)
        finally:
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None and not stream.closed:
                    _close(stream)


def _listen(
    child: subprocess.Popen[bytes], lines: bytes, count: int, complaints: IO[bytes]
) -> Iterator[npt.NDArray[np.int16]]:
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(lines)
        child.stdin.close()
    except BrokenPipeError:  # it ended before it had read everything; its own words say why
        raise _failure(child, complaints, "at the start") from None
    for number in range(count):
        header = child.stdout.read(4)
        size = struct.unpack("<I", header)[0] if len(header) == 4 else 0
        data = child.stdout.read(size)
        if size == 0 or len(data) != size:
            raise _failure(child, complaints, f"at utterance {number + 1} of {count}")
        yield np.frombuffer(data, dtype="<i2").astype(np.int16)


def _close(stream: IO[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):  # what a dead child did not read is of no use
        stream.close()


def _failure(child: subprocess.Popen[bytes], complaints: IO[bytes], where: str) -> RuntimeError:
    code = child.wait()
    complaints.seek(0)
    said = complaints.read().decode(errors="replace").strip().splitlines()
    return RuntimeError(f"eSpeak NG stopped {where} (exit {code}): {said[-1] if said else 'it said nothing'}")


class Synthesiser:
    """The library in this process; one a process. `speak` is what callers want."""

    def __init__(self) -> None:
        import espeakng_loader

        try:
            self.library: Any = ctypes.CDLL(espeakng_loader.get_library_path())
        except OSError as error:
            raise RuntimeError(f"{error}; reinstall it: {INSTALL}") from error
        data = Path(espeakng_loader.get_data_path())
        os.chdir(data.parent)  # eSpeak NG cuts paths at 160 bytes, so it is given a short one
        rate = self.library.espeak_Initialize(SYNCHRONOUS, 0, data.name.encode(), DO_NOT_EXIT)
        if rate != SAMPLE_RATE:
            raise RuntimeError(f"eSpeak NG did not start with {data} (rate {rate}); reinstall it: {INSTALL}")
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        self.blocks: list[bytes] = []
        self.callback = kind(self._take)  # the library keeps only the address, so this object must live on
        self.library.espeak_SetSynthCallback(self.callback)

    def _take(self, samples: int | None, count: int, events: int | None) -> int:
        if samples and count > 0:
            self.blocks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def speak(self, utterance: Utterance) -> bytes:
        """Samples of 16 bits; every parameter is set, since choosing a voice resets some of them only."""
        self.blocks.clear()
        if self.library.espeak_SetVoiceByName(utterance.voice.encode()) != 0:
            raise RuntimeError(f"this eSpeak NG has no voice {utterance.voice!r}; install another: {INSTALL}")
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # it starts from the clock otherwise
        parameters = {RATE: utterance.speed, PITCH: utterance.pitch, RANGE: utterance.pitch_range}
        for parameter, value in {VOLUME: LOUDNESS, WORD_GAP: 0, **parameters}.items():
            if self.library.espeak_SetParameter(parameter, value, 0) != 0:
                raise RuntimeError(f"eSpeak NG refused {value} for parameter {parameter} of {utterance}")
        text = utterance.text.encode() + b"\0"
        size = ctypes.c_size_t(len(text))
        if self.library.espeak_Synth(text, size, 0, 1, 0, UTF8, None, None) != 0 or not self.blocks:
            raise RuntimeError(f"eSpeak NG said nothing for {utterance}")
        return b"".join(self.blocks)


def main() -> None:
    """The child: JSON lines in, for each its size in bytes (little-endian, 32 bits) and its samples out."""
    lines = sys.stdin.buffer.readlines()
    try:
        synthesiser = Synthesiser()
        for line in lines:
            data = synthesiser.speak(Utterance(**json.loads(line)))
            sys.stdout.buffer.write(struct.pack("<I", len(data)) + data)
        sys.stdout.buffer.flush()
    except RuntimeError as error:
        sys.stdout.buffer.flush()
        sys.exit(str(error))


if __name__ == "__main__":
    main()
