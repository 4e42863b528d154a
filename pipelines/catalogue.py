"""What there is to run: the architectures with their published sizes, and their recipes."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import NamedTuple, cast, get_args

import typer
import yaml
from rich.table import Table

from models.architectures import load, names
from models.contract import SpeechLLM
from models.encoders.base import SAMPLE_RATE
from models.preset import Preset, PresetName
from pipelines.progress import console
from pipelines.systems import SYSTEMS, System

BEGIN, END = "<!-- systems: begin -->", "<!-- systems: end -->"  # the table stands between these in a document
COLUMNS: tuple[str, ...] = ("system", "what it is", "arXiv", "state", "in → out", "encoder", "connector")
COLUMNS += ("audio tokens / s", "backbone", "trained / total", "stages", "importer")
LONG_CLIP = 30  # seconds; most encoders have a window of that length


class Published(NamedTuple):
    """Sizes of a `paper` preset, from the very modules that would be trained, on the meta device."""

    trained: int
    total: int
    tokens: str


def show_architectures() -> None:
    """A table: name, system, what goes in and out, trainable and total parameters of `paper`, stages."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "system", "modalities"):
        table.add_column(column)
    table.add_column("trainable / total (paper)", justify="right")
    table.add_column("stages")
    for name in names():
        architecture = load(name)
        size = published(architecture)
        table.add_row(
            name, architecture.title, architecture.modalities, _parameters(size), _stages(architecture.preset("paper"))
        )
    console.print(table)


def published(architecture: type[SpeechLLM]) -> Published:
    """What the `paper` preset has: parameters that some stage trains, all of them, tokens that a clip takes."""
    preset = architecture.preset("paper")
    model = architecture.on_meta(preset)
    trained = {name for stage in preset.recipe.stages for name in model.trained_by(stage.train)}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return Published(sum(sizes[name] for name in trained), sum(sizes.values()), token_rate(model))


def token_rate(model: SpeechLLM) -> str:
    """Positions that audio takes: a second of a clip of 30 s, or a clip where the length does not matter.

    "≤": the most, where what is said decides.
    """
    if not model.spliced:
        return "none"
    short, long = (_tokens(model, seconds) for seconds in (1, LONG_CLIP))
    most = "" if model.exact_tokens and model.cached == "features" else "≤ "
    return f"{most}{long} / clip" if short == long else f"{most}{long / LONG_CLIP:.3g}"


def _tokens(model: SpeechLLM, seconds: int) -> int:
    frames = {role: model.encoder(role).output_length(seconds * SAMPLE_RATE) for role in model.encoders}
    return model.audio_tokens({"units": next(iter(frames.values()))} if model.cached == "units" else frames)


def short_number(count: int) -> str:
    """Three digits: 33.3 M, 7.36 B, 134 M."""
    size, unit = (count / 1e9, "B") if count >= 999.5e6 else (count / 1e6, "M")
    return f"{size:#.3g}".rstrip(".") + f" {unit}"


def _parameters(size: Published) -> str:
    return f"{short_number(size.trained)} / {short_number(size.total)}"


def _stages(preset: Preset) -> str:
    return " → ".join(stage.name for stage in preset.recipe.stages)


# ---- the list as Markdown ----------------------------------------------------------------------------------------


def markdown() -> str:
    """The systems of the list as a table, one row each, in the list's order; an own architecture is not in it."""
    running = {number: name for name in names() if (number := arxiv(load(name)))}
    rows = [_running(row, running[row.arxiv]) if row.arxiv in running else _planned(row) for row in SYSTEMS]
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def arxiv(architecture: type[SpeechLLM]) -> str | None:
    """The number of the list's paper that the architecture cites; None if it is not on the list."""
    cited = re.findall(r"arXiv[: ]\s*(\d{4}\.\d{5})", architecture.paper)
    return next((system.arxiv for system in SYSTEMS if system.arxiv in cited), None)


def write_markdown(path: Path) -> None:
    """Put the table into a document, between its two marks. Raises ValueError if they are not there."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no {BEGIN} followed by {END}; put both where the table belongs")
    path.write_text(f"{before}{BEGIN}\n\n{markdown()}\n\n{END}{after}", encoding="utf-8")


def _running(system: System, name: str) -> tuple[str, ...]:
    architecture = load(name)
    preset, size = architecture.preset("paper"), published(architecture)
    return (
        f"{system.name} (`{name}`)",
        architecture.summary or system.what,
        system.arxiv,
        "runs",
        architecture.modalities,
        architecture.encoder_name,
        architecture.connector_name,
        size.tokens,
        _backbone(preset),
        _parameters(size),
        _stages(preset),
        "yes" if architecture.checkpoint else "no",
    )


def _planned(system: System) -> tuple[str, ...]:
    return (system.name, system.what, system.arxiv, "planned", *[""] * (len(COLUMNS) - 4))


def _backbone(preset: Preset) -> str:
    weights = preset.backbone.weights
    return weights.rpartition("/")[2] if weights else f"{preset.backbone.config['model_type']}, from scratch"


# ---- recipes -----------------------------------------------------------------------------------------------------


def show_recipe(name: str, preset: str) -> None:
    """Print a preset as YAML that `--recipe` reads."""
    architecture = load(name)
    chosen = architecture.preset(preset_name(preset))
    typer.echo(f"# {architecture.title}, preset {preset}: {architecture.paper}")
    typer.echo(
        yaml.safe_dump(chosen.model_dump(mode="json", exclude_defaults=False), sort_keys=False, allow_unicode=True)
    )


def preset_name(given: str) -> PresetName:
    """A preset's name as given by a person. Raises ValueError with the nearest one if there is none."""
    valid = get_args(PresetName)
    if given not in valid:
        near = difflib.get_close_matches(given, valid, 1)
        raise ValueError(
            f"no preset {given!r}; " + (f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(valid)}")
        )
    return cast(PresetName, given)
