"""From one group of recordings to one shard: the same bytes on every run, and a reason for each file left out.

A pure function that an actor runs. The tar goes to its place first and the part's record last, so that a run that is
killed anywhere leaves either a finished group or one that is made again.
"""

from __future__ import annotations

import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

from components.audio.decode import BadAudio
from components.audio.fingerprint import VERSION as FINGERPRINT_VERSION
from components.audio.identity import has_digest
from components.audio.inside import read_inside
from components.audio.media import BadMedia, check_media, check_size
from components.digest import digest_bytes
from components.schema import SAMPLE_RATE, SCHEMA_VERSION, Media, Recording, Reject, ShardInfo, Strict
from components.seal import sealed
from components.shards.group import PER_SHARD, Keyed, original_name
from components.shards.index import Beside, SampleRow, sample_row
from components.shards.parts import (
    INGEST_VERSION,
    Part,
    digest_of_rows,
    finished_part,
    group_digest,
    part_url,
    shard_name,
)
from components.shards.reuse import remember, taken_over
from components.shards.samples import DEFAULTS, Aside, MediaMember, Sample, make_samples
from components.shards.settings import Ingest
from components.shards.tar import write_tar
from infra.storage import announce, is_local, join, read_bytes, scratch, shown, size, upload, write_bytes

MAX_BYTES = 1 << 30  # of a file: more is never read into memory
AHEAD = 4  # files that are on their way while one is decoded

MISSING = "the file is missing; copy it there or remove its row"
FORBIDDEN = "the store refuses to hand out the file; change its permissions"
CHANGED = "the file changed after it was listed; run the ingest stage again"

Reading = Callable[[], bytes]  # what a file holds, once it is there; raises what reading it raised
Files = tuple[tuple[Media, Reading], ...]
Clips = Iterator[Sample | Aside]


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
        write_bytes(part_url(root_url, group_index), sealed(part))
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
        for keyed, found, beside in _read_ahead(group, refused, settings.trust):
            if before is not None:
                before(keyed.key)
            original = original_name(keyed.recording.url, data_url)
            for item in _try_samples(keyed, found, beside, original, settings):
                if isinstance(item, Aside):
                    rejects.append(Reject(original=original, id=item.id, reason=item.reason, step=item.step))
                    continue
                yield f"{item.clip.key}.{item.suffix}", item.audio
                yield f"{item.clip.key}.json", item.record
                yield from ((f"{item.clip.key}.{one.suffix}", one.data) for one in item.media)
                media = tuple(one._replace(data=b"") for one in item.media)
                made.append(item._replace(audio=b"", record=b"", media=media))

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
    places = iter(written.members)
    rows = tuple(_row(sample, name, places) for sample in made)
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
    return Part(
        inputs=inputs,
        shard=shard,
        rejects=tuple(rejects),
        rows=rows,
        rows_digest=digest_of_rows(rows),
        sources=Counter(clip.source or "unknown" for clip in clips),
        licences=Counter(clip.licence or "unknown" for clip in clips),
    )


def _row(sample: Sample, shard: str, places: Iterator[tuple[int, int]]) -> SampleRow:
    """The row of a sample; `places` are (offset, size) of its members, and of those that follow."""
    audio, record = next(places), next(places)
    media: dict[str, Beside] = {}
    for one in sample.media:
        offset, length = next(places)
        media[one.kind] = Beside(suffix=one.suffix, offset=offset, size=length, digest=one.digest)
    return sample_row(sample.clip, shard, audio, record, sample.source_digest, sample.fingerprint, media)


def _read_ahead(
    group: Sequence[Keyed], refused: Mapping[str, str], trust: bool
) -> Iterator[tuple[Keyed, Reading, Files]]:
    """Each recording with its bytes, some files ahead; neighbours that lie in one file share one reading of it."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque[tuple[Keyed, Reading, Files]] = deque()
        last: tuple[Any, Reading] | None = None
        beside: tuple[Any, Files] = ((), ())
        for keyed in group:
            refusal = refused.get(keyed.key)
            media = () if refusal else keyed.recording.media
            file = (keyed.recording.url, keyed.recording.inside, keyed.recording.digest, refusal)
            if last is None or last[0] != file:
                last = (file, _soon(pool, keyed.recording, partial(_read, keyed.recording, refusal, trust)))
            if beside[0] != media:
                beside = (media, tuple((one, _soon(pool, one, partial(_read_media, one))) for one in media))
            waiting.append((keyed, last[1], beside[1]))
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting


def _soon(pool: ThreadPoolExecutor, place: Recording | Media, read: Reading) -> Reading:
    """`read`, begun already: by the disk for a file of this machine, whose cores have other work, else by a thread."""
    if not is_local(place.url):
        return pool.submit(read).result
    if place.inside is None:  # of a tar not all is wanted
        announce(place.url)
    return cache(read)


def _read(recording: Recording, refusal: str | None, trust: bool) -> bytes:
    if refusal:
        raise BadAudio(refusal)
    if recording.inside is None and size(recording.url) > MAX_BYTES:
        raise BadAudio(f"the file is larger than {MAX_BYTES >> 20} MiB; cut it into clips")
    return _bytes_of(recording, trust)


def _read_media(one: Media) -> bytes:
    check_size(one.kind, size(one.url) if one.inside is None else int(one.inside.split()[-1]))
    return _bytes_of(one)


def _bytes_of(place: Recording | Media, trust: bool = False) -> bytes:
    data = read_bytes(place.url) if place.inside is None else read_inside(place.url, place.inside)
    if is_local(place.url) and not has_digest(data, place.digest, trust):
        raise BadAudio(CHANGED)
    return data


def _got(read: Reading, identity: str, url: str) -> bytes | Aside:
    """What was read, or why it could not be; raises where the store itself cannot be reached."""
    try:
        return read()
    except BadAudio as error:
        return Aside(identity, "media" if isinstance(error, BadMedia) else "read", error.reason)
    except FileNotFoundError:
        return Aside(identity, "read", MISSING)
    except OSError as error:
        return Aside(identity, "read", _unreadable(url, error))


def _member(one: Media, read: Reading, identity: str) -> MediaMember | Aside:
    """A picture or a video as it goes into the shard, or why its recording is set aside."""
    data = _got(read, identity, one.url)
    if isinstance(data, Aside):
        return data
    try:
        return MediaMember(one.kind, check_media(one.kind, data), digest_bytes(data), data)
    except BadMedia as error:
        return Aside(identity, "media", error.reason)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 as below
        reason = f"it cannot be read ({type(error).__name__}: {str(error)[:200]}); write it anew"
        return Aside(identity, "media", reason)


def _try_samples(keyed: Keyed, found: Reading, beside: Files, original: str, settings: Ingest) -> Clips:
    """The samples of a recording, or why it is set aside."""
    identity = keyed.recording.annotation.id
    data = _got(found, identity, keyed.recording.url)
    if isinstance(data, Aside):
        yield data
        return
    media: list[MediaMember] = []
    for one, read in beside:
        member = _member(one, read, identity)
        if isinstance(member, Aside):
            yield member._replace(reason=f"its {one.kind}: {member.reason}")
            return
        media.append(member)
    try:
        yield from list(make_samples(keyed, data, original, settings, tuple(media)))
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
