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
from typing import Any

from components.audio.decode import BadAudio
from components.audio.fingerprint import VERSION as FINGERPRINT_VERSION
from components.audio.inside import read_inside
from components.digest import digest_bytes
from components.schema import SAMPLE_RATE, SCHEMA_VERSION, Recording, Reject, ShardInfo, Strict
from components.seal import sealed
from components.shards.group import PER_SHARD, Keyed, original_name
from components.shards.index import sample_row
from components.shards.parts import INGEST_VERSION, Part, finished_part, group_digest, part_url, shard_name
from components.shards.reuse import remember, taken_over
from components.shards.samples import DEFAULTS, Aside, Sample, make_samples
from components.shards.settings import Ingest
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


def ingest_config(per_shard: int = PER_SHARD, settings: Ingest = DEFAULTS) -> dict[str, Any]:
    """What, besides the recordings, decides the bytes of a data set: part of its version and its manifest."""
    prints = {"fingerprint_version": FINGERPRINT_VERSION} if settings.fingerprints else {}
    return {
        **settings.model_dump(mode="json"),
        **prints,
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
    settings: Ingest = DEFAULTS,
    refused: Mapping[str, str] | None = None,
    before: Callable[[str], None] | None = None,
) -> GroupReport:
    """Read, decode and write one group to `<root>/shard-000000.tar`, then its record to `<root>/parts/`.

    Returns at once if an earlier run finished it, in this version of the data set or another. A file that cannot be
    used becomes a reject; only a store that cannot be reached (OSError) stops the group, because its files are not at
    fault. For a caller that survives a crash of the decoder: `before` is told the key of each file before it is
    decoded, and `refused` (key to reason) names files that are set aside unread.
    """
    inputs = group_digest(group, data_url, settings)
    part = finished_part(root_url, group_index, inputs) or taken_over(root_url, group_index, inputs)
    reused = part is not None
    if part is None:
        part = _ingest(group_index, group, root_url, data_url, inputs, settings, refused or {}, before)
        if not any(reject.step == "read" for reject in part.rejects):  # what could not be read may be there next time
            remember(root_url, group_index, part)
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


def _ingest(
    group_index: int,
    group: Sequence[Keyed],
    root_url: str,
    data_url: str,
    inputs: str,
    settings: Ingest,
    refused: Mapping[str, str],
    before: Callable[[str], None] | None,
) -> Part:
    made: list[Sample] = []
    rejects: list[Reject] = []

    def members() -> Iterator[tuple[str, bytes]]:
        for keyed, found in _read_ahead(group, refused):
            if before is not None:
                before(keyed.key)
            original = original_name(keyed.recording.url, data_url)
            for item in _try_samples(keyed, found, original, settings):
                if isinstance(item, Aside):
                    rejects.append(Reject(original=original, id=item.id, reason=item.reason, step=item.step))
                    continue
                yield f"{item.clip.key}.{item.suffix}", item.audio
                yield f"{item.clip.key}.json", item.record
                made.append(item._replace(audio=b"", record=b""))

    name = shard_name(group_index)
    with tempfile.TemporaryDirectory(dir=scratch(root_url), prefix=f"{name}.") as folder:
        tar = Path(folder, name)
        written = write_tar(tar, members())
        if not made and rejects and all(reject.reason == FORBIDDEN for reject in rejects):
            raise PermissionError(
                f"the store refuses all {len(rejects)} files of {name}, for example "
                f"{shown(group[0].recording.url)}: check the credentials and run the stage again"
            )
        if made:
            upload(tar, join(root_url, name))
    clips = [sample.clip for sample in made]
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
    places = zip(made, written.members[::2], written.members[1::2], strict=True)
    part = Part(
        inputs=inputs,
        shard=shard,
        rejects=tuple(rejects),
        rows=tuple(
            sample_row(sample.clip, name, audio, record, sample.source_digest, sample.fingerprint)
            for sample, audio, record in places
        ),
        sources=Counter(clip.source or "unknown" for clip in clips),
        licences=Counter(clip.licence or "unknown" for clip in clips),
    )
    write_bytes(part_url(root_url, group_index), sealed(part))
    return part


def _read_ahead(group: Sequence[Keyed], refused: Mapping[str, str]) -> Iterator[tuple[Keyed, Future[bytes]]]:
    """Each recording with its bytes, some files ahead; neighbours that lie in one file share one reading of it."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque[tuple[Keyed, Future[bytes]]] = deque()
        last: tuple[Any, Future[bytes]] | None = None
        for keyed in group:
            refusal = refused.get(keyed.key)
            file = (keyed.recording.url, keyed.recording.inside, keyed.recording.digest, refusal)
            if last is None or last[0] != file:
                last = (file, pool.submit(_read, keyed.recording, refusal))
            waiting.append((keyed, last[1]))
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting


def _read(recording: Recording, refusal: str | None) -> bytes:
    if refusal:
        raise BadAudio(refusal)
    if recording.inside is not None:
        data = read_inside(recording.url, recording.inside)
        if is_local(recording.url) and digest_bytes(data) != recording.digest:
            raise BadAudio(CHANGED)
    else:
        if size(recording.url) > MAX_BYTES:
            raise BadAudio(f"the file is larger than {MAX_BYTES >> 20} MiB; cut it into clips")
        data = read_bytes(recording.url)
        if is_local(recording.url) and digest_bytes(data) != recording.digest:
            raise BadAudio(CHANGED)
    return data


def _try_samples(keyed: Keyed, found: Future[bytes], original: str, settings: Ingest) -> Iterator[Sample | Aside]:
    """The samples of a recording, or why it is set aside."""
    identity = keyed.recording.annotation.id
    try:
        data = found.result()
    except BadAudio as error:
        yield Aside(identity, "read", error.reason)
        return
    except FileNotFoundError:
        yield Aside(identity, "read", MISSING)
        return
    except OSError as error:
        yield Aside(identity, "read", _unreadable(keyed.recording.url, error))
        return
    try:
        yield from list(make_samples(keyed, data, original, settings))
    except BadAudio as error:
        yield Aside(identity, "decode", error.reason)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 one file that nobody foresaw must not cost the others
        reason = f"the file cannot be decoded ({type(error).__name__}: {str(error)[:200]}); convert it to WAV or FLAC"
        yield Aside(identity, "decode", reason)


def _unreadable(url: str, error: OSError) -> str:
    """Why one file cannot be read; raises `error` where the store itself cannot be reached."""
    if not is_local(url):
        if not isinstance(error, PermissionError):
            raise error
        return FORBIDDEN
    return f"the file cannot be read ({error.strerror or type(error).__name__}); check its permissions and the disk"
