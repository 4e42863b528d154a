"""Corpora as Lhotse and Kaldi describe them: cuts, and directories with `wav.scp`.

Lhotse's cuts: https://lhotse.readthedocs.io/en/latest/cuts.html. Kaldi's data directories:
https://kaldi-asr.org/doc/data_prep.html. Neither may have commands run: those entries are set aside.
"""

from __future__ import annotations

import io
import math
import posixpath
import re
from collections.abc import Iterator
from typing import Any

from components.audio.manifests import MAX_LINE, MAX_LINES, MAX_MANIFEST, TOO_LARGE, TOO_MANY, lines_of
from components.audio.names import LEADS_OUT
from components.audio.rows import BadRow, Found, annotation, gather, rejected, seconds, split_in_name, within
from components.schema import Reject
from infra import storage

WAV_SCP = "wav.scp"
SAME = 1e-3  # seconds by which a cut of the whole recording may differ from it
RESAMPLE = "Resample"  # the one transform that changes nothing here, where all audio becomes 16 kHz


# ---- Lhotse ---------------------------------------------------------------------------------------------------------


def is_cut(fields: dict[str, Any]) -> bool:
    """Whether a row of a JSONL file is a cut of Lhotse."""
    kind = fields.get("type")
    return isinstance(kind, str) and kind.endswith("Cut") and ("start" in fields or "tracks" in fields)


def cut_row(root: str, folder: str, fields: dict[str, Any], place: str, names: frozenset[str]) -> Found:
    """The recording that a MonoCut (or a MultiCut with all channels) names. Raises BadRow."""
    if fields["type"] not in ("MonoCut", "MultiCut"):
        raise BadRow(f"a {str(fields['type'])[:40]} has no file of its own; export it with CutSet.save_audios")
    recording = fields.get("recording")
    if not isinstance(recording, dict):
        raise BadRow("the cut has no recording; export it with its recordings, not with features alone")
    transforms = recording.get("transforms") or []
    if not isinstance(transforms, list) or any(_name(item) != RESAMPLE for item in transforms):
        raise BadRow("the recording is transformed when it is loaded; export the cut with CutSet.save_audios")
    path = within(root, folder, _source(recording, fields.get("channel")), names)
    start = seconds(fields.get("start", 0), "start")
    duration = seconds(fields.get("duration"), "duration")
    whole = start == 0 and math.isclose(duration, seconds(recording.get("duration"), "duration"), abs_tol=SAME)
    if duration == 0:
        raise BadRow("the cut lasts 0 seconds; correct its duration")
    identity = fields.get("id") if isinstance(fields.get("id"), str | int) else f"{recording.get('id')}@{start:.3f}"
    noted = annotation({"id": identity, **_supervised(fields.get("supervisions") or [])}, "")
    return Found(path, noted, place, start=start, duration=None if whole else duration)


def _name(transform: Any) -> Any:
    return transform.get("name") if isinstance(transform, dict) else None


def _source(recording: dict[str, Any], channel: Any) -> str:
    """The file of a recording, as written. Raises BadRow where it is anything else, or only a channel of it is cut."""
    sources = recording.get("sources")
    if not isinstance(sources, list) or not sources or not all(isinstance(item, dict) for item in sources):
        raise BadRow("the recording has no sources; name its file there")
    if len(sources) > 1:
        raise BadRow(f"the recording lies in {len(sources)} files; export the cut with CutSet.save_audios")
    kind, source, channels = (sources[0].get(key) for key in ("type", "source", "channels"))
    if kind not in ("file", "url"):
        what = "a command, which is never run" if kind == "command" else f"of type {str(kind)[:40]!r}, not a file"
        raise BadRow(f"the source of the recording is {what}; export the cut with CutSet.save_audios")
    if not isinstance(source, str) or not source.strip():
        raise BadRow("the source of the recording names no file; correct it")
    if isinstance(channels, list) and len(channels) > 1 and channel != channels:
        raise BadRow(
            f"the cut is channel {str(channel)[:20]} of {len(channels)}; export it with CutSet.save_audios, "
            "so that the channel has a file of its own"
        )
    return source.strip()


def _supervised(supervisions: Any) -> dict[str, Any]:
    """Fields of the supervisions of one cut: texts joined in time order, and the rest where all of them agree."""
    if not isinstance(supervisions, list) or not all(isinstance(item, dict) for item in supervisions):
        raise BadRow("the supervisions are not a list of objects; correct them")
    ordered = sorted(supervisions, key=_begins)
    texts = [item["text"] for item in ordered if item.get("text") is not None]
    if not all(isinstance(text, str) for text in texts):
        raise BadRow("the text of a supervision is not text; correct it")
    fields: dict[str, Any] = {"text": " ".join(text.strip() for text in texts if text.strip()) if texts else None}
    for name in ("language", "speaker", "gender"):
        fields[name] = _common([item.get(name) for item in ordered])
    customs = [item.get("custom") if isinstance(item.get("custom"), dict) else {} for item in ordered]
    labels = {key: _common([custom.get(key) for custom in customs]) for custom in customs[:1] for key in custom}
    fields["labels"] = {key: value for key, value in labels.items() if isinstance(value, str | int | float)}
    return fields


def _begins(supervision: dict[str, Any]) -> float:
    """Where a supervision begins in its cut; before 0 where the cut begins in the middle of it."""
    start = supervision.get("start", 0.0)
    return float(start) if isinstance(start, int | float) and abs(start) < MAX_MANIFEST else 0.0


def _common(values: list[Any]) -> Any:
    return values[0] if values and all(value == values[0] for value in values) else None


# ---- Kaldi ----------------------------------------------------------------------------------------------------------


def kaldi(root: str, folder: str, names: frozenset[str]) -> tuple[list[Found], list[Reject]]:
    """Utterances of the data directory `folder` (relative to `root`), by its `segments` or else one a file."""
    return gather(_utterances(root, folder, names), posixpath.join(folder, WAV_SCP))


def _utterances(root: str, folder: str, names: frozenset[str]) -> Iterator[Found | Reject]:
    tables: dict[str, dict[str, str]] = {}
    for name in (WAV_SCP, "segments", "text", "utt2spk", "spk2gender", "utt2lang"):
        tables[name] = {}
        for place, key, value, fault in _pairs(root, posixpath.join(folder, name)):
            if fault or key in tables[name]:
                reason = fault or f"{name} has a line for {key} already; remove one of the two"
                yield rejected(place, reason, key)
            else:
                tables[name][key] = value
    files, segments = tables[WAV_SCP], tables["segments"]
    split = split_in_name(folder)
    for key in segments or files:
        place = f"{posixpath.join(folder, 'segments' if segments else WAV_SCP)}: {key}"
        try:
            source, start, duration = _segment(key, segments, files)
            path = within(root, folder, _plain_path(files[source]), names)
            speaker = tables["utt2spk"].get(key)
            gender = tables["spk2gender"].get(speaker) if speaker else None
            fields = {"id": key, "speaker": speaker, "gender": gender, "split": split}
            fields |= {"text": tables["text"].get(key), "language": tables["utt2lang"].get(key)}
            yield Found(path, annotation(fields, key), place, start=start, duration=duration)
        except BadRow as error:
            yield rejected(place, str(error), key)
    for key in tables["text"].keys() - (segments or files).keys():
        yield rejected(f"{posixpath.join(folder, 'text')}: {key}", "the utterance has a text but no audio; add it", key)


def _segment(key: str, segments: dict[str, str], files: dict[str, str]) -> tuple[str, float, float | None]:
    """The recording of an utterance, its start and its duration in seconds; an end of -1 is that of the recording."""
    if not segments:
        return key, 0.0, None
    parts = segments[key].split()
    if len(parts) not in (3, 4):  # the fourth is a channel, which Kaldi no longer reads
        raise BadRow("the segment is not: utterance, recording, start, end; correct its line")
    if parts[0] not in files:
        raise BadRow(f"{WAV_SCP} has no recording {parts[0][:80]}; add it or remove the segment")
    start = seconds(parts[1], "start")
    if parts[2] in ("-1", "-1.0"):
        return parts[0], start, None
    end = seconds(parts[2], "end")
    if end <= start:
        raise BadRow("the segment ends before it begins; correct its line")
    return parts[0], start, round(end - start, 6)


def _plain_path(entry: str) -> str:
    """The file of an entry of wav.scp. Raises BadRow for commands, which are never run, and for places in archives."""
    if entry.endswith("|") or entry.startswith("|"):
        raise BadRow("the entry is a command, which is never run; write its output to a file and name that")
    if entry == "-" or re.search(r":\d+$|\[[\d:,]*\]$", entry):
        raise BadRow("the entry is a place in an archive or a stream; write it to a file of its own and name that")
    return entry


def _pairs(root: str, name: str) -> Iterator[tuple[str, str, str, str]]:
    """Of each line: place, first word, the rest, and what is wrong with it. None of a file that is not there.

    Raises FileNotFoundError if it is `wav.scp` that is not there.
    """
    url = storage.join(root, name)
    if posixpath.basename(name) != WAV_SCP and not storage.exists(url):
        return
    if storage.leads_out(root, name, last=True):
        yield name, "", "", LEADS_OUT
        return
    if storage.size(url) > MAX_MANIFEST:
        yield name, "", "", TOO_LARGE
        return
    for number, line in enumerate(lines_of(io.BytesIO(storage.read_bytes(url))), start=1):
        place = f"{name}:{number}"
        if number > MAX_LINES:
            yield place, "", "", TOO_MANY
            return
        try:
            words = line[:MAX_LINE].decode("utf-8-sig" if number == 1 else "utf-8").split(None, 1)
        except UnicodeDecodeError:
            yield place, "", "", "the line is not UTF-8 text; save the file as UTF-8"
            continue
        key, value = (*words, "", "")[:2]
        if len(line) > MAX_LINE or (not value.strip() and key and posixpath.basename(name) != "text"):
            fault = "too long" if len(line) > MAX_LINE else "only a name, with nothing behind it"
            yield place, key[:80], "", f"the line is {fault}; correct it or remove it"
        elif key:
            yield place, key, value.strip(), ""
