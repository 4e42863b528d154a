"""The model card: README.md of a model's folder, for people and, in its front matter, for the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from components.evaluation.metrics import Scores, metric_name, rate_of
from components.schema import AudioManifest

PIPELINE_TAGS = {
    "asr": "automatic-speech-recognition",
    "translate": "automatic-speech-recognition",
    "label": "audio-classification",
}


class CardData(BaseModel):
    """What a card says about a model that the scores and the lineage do not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    architecture: str
    preset: str
    about: str  # one or two sentences
    paper: str = ""  # title or address
    reconstruction: bool = False  # the paper leaves values open that had to be chosen
    licence: str = "other"  # of the weights, SPDX
    languages: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()  # references of the pretrained parts
    parameters: int | None = None
    trainable: int | None = None
    deviations: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    version: str = ""


def model_card(
    data: CardData, audio: Sequence[AudioManifest], scores: Scores | None = None, before: Scores | None = None,
    lineage: dict[str, Any] | None = None,
) -> str:  # fmt: skip
    """Markdown with YAML front matter; the same inputs give the same text."""
    parts = [
        f"---\n{yaml.safe_dump(_front(data, audio, scores), sort_keys=False, allow_unicode=True)}---\n",
        f"# {plain(data.name)}\n\n{plain(data.about)}",
        _what(data),
        f"## Training data\n\n{_training_data(audio)}",
        f"## Results\n\n{_results(scores, before)}",
        f"## How to use\n\n{_use(data)}",
        f"## Limits\n\n{_limits(data, audio, scores)}",
        f"## Deviations from the paper\n\n{_bullets(data.deviations) or 'None are known.'}",
        _origin(lineage),
    ]
    return "\n\n".join(part for part in parts if part).rstrip() + "\n"


def plain(text: str) -> str:
    """Text on one line with nothing that Markdown or HTML would act on."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _front(data: CardData, audio: Sequence[AudioManifest], scores: Scores | None) -> dict[str, Any]:
    kinds = [PIPELINE_TAGS[task.partition(":")[0]] for task in data.tasks if task.partition(":")[0] in PIPELINE_TAGS]
    front: dict[str, Any] = {
        "license": data.licence.lower(),
        "language": list(data.languages) or None,
        "library_name": "transformers",
        "pipeline_tag": kinds[0] if kinds else "audio-text-to-text",
        "tags": ["earloom", "speech", "speech-llm", data.architecture, data.preset],
        "datasets": [manifest.dataset for manifest in audio] or None,
        "base_model": list(data.base_models) or None,
        "metrics": sorted({metric_name(result.metric) for result in scores.tasks.values()}) if scores else None,
    }
    return {key: value for key, value in front.items() if value is not None}


def _what(data: CardData) -> str:
    rows = [
        ("Architecture", f"`{data.architecture}`, preset `{data.preset}`"),
        ("Paper", plain(data.paper) if data.paper else "–"),
    ]
    if data.parameters is not None:
        learned = f", {data.trainable:,} of them trained" if data.trainable is not None else ""
        rows.append(("Parameters", f"{data.parameters:,}{learned}"))
    rows += [
        ("Tasks", ", ".join(f"`{task}`" for task in data.tasks) or "–"),
        ("Languages", ", ".join(data.languages) or "–"),
    ]
    rows.append(("Pretrained parts", ", ".join(f"`{name}`" for name in data.base_models) or "none"))
    text = "## What it is\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)
    if data.reconstruction:
        text += (
            "\n\n**A reconstruction:** the paper does not publish every value; those that were chosen are listed below."
        )
    return text


def _training_data(audio: Sequence[AudioManifest]) -> str:
    if not audio:
        return "Not stated."
    lines = ["| data set | version | clips | hours | licences | sources |", "|---|---|---:|---:|---|---|"]
    for manifest in audio:
        licences = (
            ", ".join(f"{plain(name)} ({count})" for name, count in sorted(manifest.licences.items())) or "not stated"
        )
        sources = "; ".join(plain(source) for source in manifest.sources[:3]) + (
            " …" if len(manifest.sources) > 3 else ""
        )
        hours = f"{manifest.seconds / 3600:.2f}"
        cells = [plain(manifest.dataset), f"`{manifest.version}`", f"{manifest.samples:,}", hours]
        cells += [licences, sources or "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\nThe licences of the data may bind what is made from them; see each source."


def _results(scores: Scores | None, before: Scores | None) -> str:
    if scores is None:
        return "Not evaluated."
    lines = [
        "| task | split | clips | metric | value | 95 % interval | before training |",
        "|---|---|---:|---|---:|---|---:|",
    ]
    for task, result in scores.tasks.items():
        old_task = before.tasks.get(task) if before else None
        for split, rates in result.by_split.items():
            old = rate_of(old_task.by_split[split], result.metric) if old_task and split in old_task.by_split else None
            interval = f"{_percent(rates.interval[0])} – {_percent(rates.interval[1])}" if rates.interval else "–"
            cells = [
                plain(task),
                split,
                str(rates.n),
                metric_name(result.metric).upper() if result.metric != "exact" else "accuracy",
            ]
            lines.append(
                "| " + " | ".join([*cells, _percent(rate_of(rates, result.metric)), interval, _percent(old)]) + " |"
            )
    return "\n".join(lines) + f"\n\nNormalisation before comparing: {scores.normalisation}"


def _use(data: CardData) -> str:
    version = f"/{data.version}" if data.version else ""
    return f"```sh\nearloom listen {data.name}{version} recording.wav\n```"


def _limits(data: CardData, audio: Sequence[AudioManifest], scores: Scores | None) -> str:
    """The caller's, and those that the numbers say by themselves."""
    found = list(data.limits)
    seconds = sum(manifest.seconds for manifest in audio)
    if audio and seconds < 10 * 3600:
        found.append(
            f"Trained on {seconds / 3600:.2f} hours of audio: expect it to work on voices and words like those only."
        )
    for task, result in (scores.tasks if scores else {}).items():
        rates = result.by_split[result.main_split]
        if rates.n < 30:
            found.append(f"{task} was measured on {rates.n} clip{'s' if rates.n != 1 else ''} only.")
        if result.metric == "exact" and len(result.confusion or {}) > 1 and rates.exact <= rates.majority:
            found.append(f"{task} is no better than always answering “{rates.majority_answer}”.")
    return _bullets(found) or "None were stated."


def _origin(lineage: dict[str, Any] | None) -> str:
    if not lineage:
        return ""
    made = lineage.get("code", {})
    code = str(made.get("commit") or made.get("digest", ""))[:16]
    return (
        "## Origin\n\n"
        f"Lineage `{str(lineage.get('digest', ''))[:16]}`, code `{code}`; "
        "the whole of it is in `lineage.json`, the resolved recipe in `recipe.yaml`."
    )


def _bullets(texts: Sequence[str]) -> str:
    return "\n".join(f"- {plain(text)}" for text in texts)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
