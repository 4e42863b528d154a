"""The card of an exported model: its own, with the front matter that the Hugging Face hub reads, and licences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from components.registry.card import PIPELINE_TAGS, plain
from components.registry.evaluation_record import Evaluation
from components.registry.licences import LICENSES, Share, hub_name, warnings

GENERAL = "audio-text-to-text"
METRICS = {"wer": "WER", "cer": "CER", "accuracy": "Accuracy", "choice": "Accuracy of the likeliest label"}


def export_card(
    readme: str,
    name: str,
    data: Sequence[Share],
    weights: Sequence[str],
    evaluation: Evaluation | None,
    licence: str | None = None,
) -> str:
    """The card's text; `readme` is that of the registered model, which may be empty."""
    front, body = split_front(readme)
    said = _front(front, name, data, weights, evaluation, licence)
    body = body.strip() or f"# {plain(name)}"
    body = _section(body, "Training data", _training_data(data))
    body = _section(body, "How to use", HOW.format(name=name))
    body = _section(body, "Licences", _licences(data, weights))
    return f"---\n{yaml.safe_dump(said, sort_keys=False, allow_unicode=True)}---\n\n{body.rstrip()}\n"


def split_front(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and body of a card."""
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    front = yaml.safe_load(found[1]) if found else {}
    return (front if isinstance(front, dict) else {}), text[found.end() :] if found else text


def _front(
    front: Mapping[str, Any],
    name: str,
    data: Sequence[Share],
    weights: Sequence[str],
    evaluation: Evaluation | None,
    licence: str | None,
) -> dict[str, Any]:
    pipeline = front.get("pipeline_tag", GENERAL)
    said: dict[str, Any] = {
        "license": licence.lower() if licence else "other",
        "license_name": None if licence else "several",
        "license_link": None if licence else LICENSES,
        "language": front.get("language"),
        "library_name": "earloom",
        "pipeline_tag": pipeline,
        "tags": front.get("tags") or ["earloom", "speech", "speech-llm"],
        "datasets": sorted({one.dataset for one in data}) or None,
        "base_model": [found for one in weights if (found := hub_name(one))] or None,
        "metrics": front.get("metrics"),
        "model-index": _index(name, evaluation, pipeline) if evaluation else None,
    }
    return {key: value for key, value in said.items() if value is not None}


def _index(name: str, evaluation: Evaluation, pipeline: str) -> list[dict[str, Any]]:
    """Results as the hub reads them; rates in percent."""
    results = []
    for answers in evaluation.answers:
        kind = answers.task.partition(":")[0]
        wanted = ("accuracy", "choice") if kind == "label" else ("wer", "cer")
        metrics = [
            {
                "type": "accuracy" if one == "choice" else one,
                "name": METRICS[one],
                "value": round(100 * answers.rate(one), 2),
            }
            for one in wanted
            if one in answers.counts
        ]
        if metrics:
            of = evaluation.data
            dataset = {"name": of.dataset, "type": of.dataset, "split": answers.split, "revision": of.version}
            task = {"type": PIPELINE_TAGS.get(kind, pipeline), "name": answers.task}
            results.append({"task": task, "dataset": dataset, "metrics": metrics})
    return [{"name": name, "results": results}]


def _section(body: str, title: str, text: str) -> str:
    """The body with the text under that heading, in the place of what stood there or at the end."""
    new = f"## {title}\n\n{text}\n"
    parts = re.split(r"(?m)^(?=## )", body)
    at = next((i for i, part in enumerate(parts) if part.startswith(f"## {title}\n")), None)
    if at is None:
        return f"{body.rstrip()}\n\n{new}"
    return "".join([*parts[:at], f"{new}\n", *parts[at + 1 :]])


def _training_data(data: Sequence[Share]) -> str:
    versions = {(one.dataset, one.version): (one.of, one.hours) for one in data}
    if not versions:
        return "Not stated."
    lines = ["| data set | version | clips | hours | licences |", "|---|---|---:|---:|---|"]
    for (dataset, version), (clips, hours) in versions.items():
        under = [one for one in data if (one.dataset, one.version) == (dataset, version)]
        named = ", ".join(f"{plain(one.licence)} ({one.share:.0%})" for one in under)
        lines.append(f"| {plain(dataset)} | `{version}` | {clips:,} | {hours:.2f} | {named} |")
    return "\n".join(lines)


def _licences(data: Sequence[Share], weights: Sequence[str]) -> str:
    found = [f"- {plain(text)}" for text in warnings(data, weights)]
    told = ["**Before you use or publish it:**", "", *found, ""] if found else []
    return "\n".join([*told, f"Data, pretrained weights and code, each with its licence: [{LICENSES}]({LICENSES})."])


HOW = """With Earloom (`pip install earloom`), from a folder with these files:

```python
import json
from transformers import AutoTokenizer
from models.architectures import load

folder = "{name}"
model = load(json.load(open(folder + "/manifest.json"))["architecture"]).from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

Without it, the tokenizer and the language model in it open with transformers, peft and safetensors alone:
docs/registry.md of Earloom has the lines. `manifest.json` has the sha256 of every file."""
