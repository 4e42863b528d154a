"""The plan of a stage as an artefact of the run: measured and ordered once, then read by every worker and every resume.

<stage>/plan/  samples.parquet, plan.safetensors, plan.html (to look at), plan.json (written last)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from components.batching.loader import StageData, pad_id, renderer, stage_examples
from components.batching.measure import ReadAudio, load_samples, measure, save_samples
from components.batching.plan import Layout, load_plan, plan_stage, save_plan
from components.batching.preview import PlanSummary, plan_page, summarise
from infra import storage
from models import attention
from models.contract import SpeechLLM
from models.recipe import Stage

FOLDER, MARKER, PAGE = "plan", "plan.json", "plan.html"


def chosen_layout(stage: Stage, model: SpeechLLM, measured: Layout | None = None) -> Layout:
    """The form of a stage's batches: what the recipe says, else what was `measured` on this device to be faster, else
    one row without padding wherever the backbone can be told where samples end.

    That is the faster form on CPU as well as on CUDA (tests/benchmarks/README.md); other backbones would compute
    the whole square of a packed row, so they get rows of nearly equal length.
    """
    if stage.layout != "auto":
        return stage.layout
    if measured is not None:
        return measured
    return "packed" if model.llm.config._attn_implementation == attention.NAME else "bucketed"


def publish_plan(
    url: str,
    stage: Stage,
    rows: Sequence[dict[str, Any]],
    model: SpeechLLM,
    tokenizer: PreTrainedTokenizerBase,
    lengths: ReadAudio,
    seed: int,
    layout: Layout,
    read: ReadAudio | None = None,
) -> PlanSummary:
    """Measure and order the samples of a stage, unless that was done before; `url` is the stage's.

    `read` gives what `lengths` leaves out, where examples are chosen by it.
    """
    folder = storage.join(url, FOLDER)
    marker = storage.join(folder, MARKER)
    if storage.exists(marker):
        return PlanSummary.model_validate(storage.read_json(marker))
    examples = stage_examples(stage, rows, model, read or lengths)
    samples = measure(stage, rows, lengths, renderer(model, tokenizer), examples)
    plan = plan_stage(stage, samples, seed, layout)
    summary = summarise(plan, samples, stage)
    save_samples(storage.join(folder, "samples.parquet"), samples)
    save_plan(storage.join(folder, "plan.safetensors"), plan)
    storage.write_text(storage.join(folder, PAGE), plan_page(type(model).title, stage, plan, samples))
    storage.write_json(marker, summary.model_dump(mode="json"))
    return summary


def open_plan(
    url: str,
    stage: Stage,
    rows: Sequence[dict[str, Any]],
    model: SpeechLLM,
    tokenizer: PreTrainedTokenizerBase,
    read: ReadAudio,
) -> StageData:
    """A published plan with what it takes to make its batches. FileNotFoundError if it was not published."""
    folder = storage.join(url, FOLDER)
    samples = load_samples(storage.join(folder, "samples.parquet"))
    plan = load_plan(storage.join(folder, "plan.safetensors"))
    examples = stage_examples(stage, rows, model, read)
    return StageData(stage, rows, samples, plan, read, renderer(model, tokenizer), pad_id(tokenizer), examples)


def held_out_data(
    stage: Stage,
    rows: Sequence[dict[str, Any]],
    model: SpeechLLM,
    tokenizer: PreTrainedTokenizerBase,
    read: ReadAudio,
    layout: Layout,
) -> StageData:
    """Each usable sample of other rows once, in large batches: what a stage that stops on a plateau is judged by."""
    once = stage.model_copy(
        update={
            "epochs": 1.0,
            "max_steps": None,
            "datasets": {},
            "temperature": 1.0,
            "tasks": dict.fromkeys(stage.tasks, 1.0),
        }
    )
    render, examples = renderer(model, tokenizer), stage_examples(stage, rows, model, read)
    samples = measure(once, rows, read, render, examples)
    plan = plan_stage(once, samples, 0, layout)
    return StageData(once, rows, samples, plan, read, render, pad_id(tokenizer), examples)


def lengths_only(frames: dict[str, int]) -> dict[str, torch.Tensor]:
    """Features of the right length without content, `(frames, 0)` per role: what measuring needs of a clip."""
    return {role: torch.empty(count, 0) for role, count in frames.items()}
