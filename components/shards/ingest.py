"""From one group of recordings to one shard: the same bytes on every run, and a reason for each file left out.

A pure function that an actor runs. The tar goes to its place first and the part's record last, so that a run that is
killed anywhere leaves either a finished group or one that is made again.
"""

from __future__ import annotations

import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from components.audio.decode import BadAudio, decode
from components.audio.encode import to_flac, to_int16
from components.digest import digest_bytes
from components.schema import SAMPLE_RATE, SCHEMA_VERSION, Clip, Recording, Reject, ShardInfo, Strict
from components.shards.group import PER_SHARD, Keyed, original_name
from components.shards.index import sample_row
from components.shards.parts import INGEST_VERSION, Part, finished_part, group_digest, part_url, shard_name
from components.shards.tar import write_tar
from infra.storage import is_local, join, read_bytes, scratch, shown, size, upload, write_bytes

MAX_BYTES = 1 << 30  # of a file: more is never read into memory
AHEAD = 4  # files that are read while one is decoded

MISSING = "the file is missing; copy it there or remove its row"
FORBIDDEN = "the store refuses to hand out the file; change its permissions"
CHANGED = "the file changed after it was listed; run the ingest stage again"


class GroupReport(Strict):
    """What one call of `ingest_group` did."""

    group: int
    shard: str | None  # None if every recording of the group was set aside
    samples: int
    seconds: float
    bytes: int
    rejected: int
    reused: bool  # an earlier run had finished it


class Sample(NamedTuple):
    """One clip as it is written."""

    clip: Clip
    audio: bytes  # FLAC
    record: bytes  # JSON


def ingest_config(per_shard: int = PER_SHARD) -> dict[str, Any]:
    """What, besides the recordings, decides the bytes of a data set: part of its version and its manifest."""
    return {
        "per_shard": per_shard,
        "sample_rate": SAMPLE_RATE,
        "schema_version": SCHEMA_VERSION,
        "ingest_version": INGEST_VERSION,
    }


def ingest_group(
    group_index: int,
    group: Sequence[Keyed],
    root_url: str,
    data_url: str,
    refused: Mapping[str, str] | None = None,
    before: Callable[[str], None] | None = None,
) -> GroupReport:
    """Read, decode and write one group to `<root>/shard-000000.tar`, then its record to `<root>/parts/`.

    Returns at once if an earlier run finished it. A file that cannot be used becomes a reject; only a store that
    cannot be reached (OSError) stops the group, because its files are not at fault. For a caller that survives a
    crash of the decoder: `before` is told the key of each file before it is decoded, and `refused` (key to reason)
    names files that are set aside unread.
    """
    inputs = group_digest(group, data_url)
    part = finished_part(root_url, group_index, inputs)
    reused = part is not None
    if part is None:
        part = _ingest(group_index, group, root_url, data_url, inputs, refused or {}, before)
    shard = part.shard
    return GroupReport(
        group=group_index,
        shard=shard.name if shard else None,
        samples=len(part.rows),
        seconds=shard.seconds if shard else 0.0,
        bytes=shard.bytes if shard else 0,
        rejected=len(part.rejects),
        reused=reused,
    )


def make_sample(keyed: Keyed, data: bytes, original: str) -> Sample:
    """Decode the bytes of a recording to what a shard keeps; a FLAC that fits already is kept as it is.

    Raises BadAudio.
    """
    samples, marks = decode(data, original)
    whole = to_int16(samples)
    audio = data if not marks and _fits(data, len(whole)) else to_flac(whole)
    clip = Clip(
        **keyed.recording.annotation.model_dump(),
        key=keyed.key,
        seconds=len(whole) / SAMPLE_RATE,
        samples=len(whole),
        audio_digest=digest_bytes(whole.astype(np.dtype("<i2")).tobytes()),
        original=original,
        marks=marks,
    )
    return Sample(clip, audio, clip.model_dump_json().encode())


def _ingest(
    group_index: int,
    group: Sequence[Keyed],
    root_url: str,
    data_url: str,
    inputs: str,
    refused: Mapping[str, str],
    before: Callable[[str], None] | None,
) -> Part:
    clips: list[Clip] = []
    rejects: list[Reject] = []

    def members() -> Iterator[tuple[str, bytes]]:
        for keyed, found in _read_ahead(group, refused):
            if before is not None:
                before(keyed.key)
            original = original_name(keyed.recording.url, data_url)
            made = _try_sample(keyed, found, original)
            if isinstance(made, str):
                rejects.append(Reject(original=original, id=keyed.recording.annotation.id, reason=made))
                continue
            yield f"{keyed.key}.flac", made.audio
            yield f"{keyed.key}.json", made.record
            clips.append(made.clip)

    name = shard_name(group_index)
    with tempfile.TemporaryDirectory(dir=scratch(root_url), prefix=f"{name}.") as folder:
        tar = Path(folder, name)
        written = write_tar(tar, members())
        if not clips and rejects and all(reject.reason == FORBIDDEN for reject in rejects):
            raise PermissionError(
                f"the store refuses all {len(rejects)} files of {name}, for example "
                f"{shown(group[0].recording.url)}: check the credentials and run the stage again"
            )
        if clips:
            upload(tar, join(root_url, name))
    shard = (
        ShardInfo(
            name=name,
            sha256=written.sha256,
            bytes=written.bytes,
            samples=len(clips),
            seconds=sum(clip.samples for clip in clips) / SAMPLE_RATE,
        )
        if clips
        else None
    )
    places = zip(clips, written.members[::2], written.members[1::2], strict=True)
    part = Part(
        inputs=inputs,
        shard=shard,
        rejects=tuple(rejects),
        rows=tuple(sample_row(clip, name, audio, record) for clip, audio, record in places),
        sources=Counter(clip.source or "unknown" for clip in clips),
        licences=Counter(clip.licence or "unknown" for clip in clips),
    )
    write_bytes(part_url(root_url, group_index), part.model_dump_json().encode())
    return part


def _read_ahead(group: Sequence[Keyed], refused: Mapping[str, str]) -> Iterator[tuple[Keyed, Future[bytes]]]:
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque[tuple[Keyed, Future[bytes]]] = deque()
        for keyed in group:
            waiting.append((keyed, pool.submit(_read, keyed.recording, refused.get(keyed.key))))
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting


def _read(recording: Recording, refusal: str | None) -> bytes:
    if refusal:
        raise BadAudio(refusal)
    if size(recording.url) > MAX_BYTES:
        raise BadAudio(f"the file is larger than {MAX_BYTES >> 20} MiB; cut it into clips")
    data = read_bytes(recording.url)
    if is_local(recording.url) and digest_bytes(data) != recording.digest:
        raise BadAudio(CHANGED)
    return data


def _try_sample(keyed: Keyed, found: Future[bytes], original: str) -> Sample | str:
    """The sample of a recording, or why it is set aside."""
    try:
        return make_sample(keyed, found.result(), original)
    except BadAudio as error:
        return error.reason
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        if not is_local(keyed.recording.url):
            if not isinstance(error, PermissionError):
                raise
            return FORBIDDEN
        return f"the file cannot be read ({error.strerror or type(error).__name__}); check its permissions and the disk"
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 one file that nobody foresaw must not cost the others
        return f"the file cannot be decoded ({type(error).__name__}: {str(error)[:200]}); convert it to WAV or FLAC"


def _fits(data: bytes, samples: int) -> bool:
    """Whether the bytes are FLAC whose header says 16 kHz, mono, 16 bits and this many samples."""
    if data[:4] != b"fLaC" or data[4] & 0x7F:
        return False
    fields = int.from_bytes(data[18:26], "big")
    rate, channels, bits = fields >> 44, (fields >> 41 & 7) + 1, (fields >> 36 & 31) + 1
    return (rate, channels, bits, fields & (1 << 36) - 1) == (SAMPLE_RATE, 1, 16, samples)
