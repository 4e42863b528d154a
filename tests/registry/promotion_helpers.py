"""Registered versions made by hand: folders with a manifest and a record of their answers, no real weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from components.digest import digest, digest_file
from components.evaluation.metrics import Hypothesis
from components.registry.evaluation_record import EVALUATION, evaluation_record
from components.registry.mlflow_registry import Registered, register
from components.registry.records import Link

DATA = Link(dataset="talk", version="0123456789ab", digest="a" * 64)
SENTENCE = "turn up the radio"


def answers(wrong: Sequence[int], clips: int = 40, before: str | None = "no") -> list[Hypothesis]:
    """Answers to `clips` clips of four words; those in `wrong` have one word wrong."""
    return [
        Hypothesis(
            key=f"clip-{i:03d}",
            task="asr",
            split="test",
            language="en",
            reference=SENTENCE,
            hypothesis="turn up the sun" if i in wrong else SENTENCE,
            before=before,
        )
        for i in range(clips)
    ]


def model_folder(folder: Path, hypotheses: list[Hypothesis] | None, weights: str = "w", data: Link = DATA) -> str:
    """A folder as `register` of the chain writes it, in short; without hypotheses it was never evaluated."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "earloom"}')
    (folder / "model.safetensors").write_text(weights)
    if hypotheses is not None:
        (folder / EVALUATION).write_text(evaluation_record(data, hypotheses).model_dump_json())
    files = {path.name: digest_file(path) for path in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"architecture": "funasr_llm", "files": files}))
    return str(folder)


def add_version(
    name: str,
    folder: Path,
    uri: str,
    wrong: Sequence[int] = (),
    clips: int = 40,
    before: str | None = "no",
    data: Link = DATA,
) -> Registered:
    """A version with these answers."""
    url = model_folder(folder, answers(wrong, clips, before), str(folder), data)
    identity = digest(json.loads((folder / "manifest.json").read_text()))
    tags = {"architecture": "funasr_llm", "preset": "tiny", "data": f"{data.dataset}/{data.version}"}
    tags |= {"metric": "asr/test/wer", "value": f"{len(wrong) / (4 * clips):.6g}"}
    return register(url, name, {}, tags, "candidate", uri, folder_digest=identity)
