"""What there is to run: the architectures with their published sizes, and their recipes."""

from __future__ import annotations

import difflib
from typing import cast, get_args

import typer
import yaml
from rich.table import Table

from models.architectures import load, names
from models.contract import SpeechLLM
from models.preset import PresetName
from pipelines.progress import console


def show_architectures() -> None:
    """A table: name, system, what goes in and out, trainable and total parameters of `paper`, stages."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "system", "modalities"):
        table.add_column(column)
    table.add_column("trainable / total (paper)", justify="right")
    table.add_column("stages")
    for name in names():
        architecture = load(name)
        trainable, total = counts(architecture)
        stages = " → ".join(stage.name for stage in architecture.preset("paper").recipe.stages)
        table.add_row(
            name, architecture.title, architecture.modalities, f"{millions(trainable)} / {millions(total)}", stages
        )
    console.print(table)


def counts(architecture: type[SpeechLLM]) -> tuple[int, int]:
    """Parameters that some stage of `paper` trains, and all of them; built on the meta device."""
    preset = architecture.preset("paper")
    model = architecture.on_meta(preset)
    trained = {name for stage in preset.recipe.stages for name in model.freeze(stage.train)}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return sum(sizes[name] for name in trained), sum(sizes.values())


def millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def show_recipe(name: str, preset: str) -> None:
    """Print a preset as YAML that `--recipe` reads."""
    valid = get_args(PresetName)
    if preset not in valid:
        near = difflib.get_close_matches(preset, valid, 1)
        raise ValueError(
            f"no preset {preset!r}; " + (f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(valid)}")
        )
    architecture = load(name)
    chosen = architecture.preset(cast(PresetName, preset))
    typer.echo(f"# {architecture.title}, preset {preset}: {architecture.paper}")
    typer.echo(
        yaml.safe_dump(chosen.model_dump(mode="json", exclude_defaults=False), sort_keys=False, allow_unicode=True)
    )
