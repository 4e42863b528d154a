"""Official weights into a transformers folder of ours: `earloom import-checkpoint`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import AutoConfig

from models.architectures import load, names
from models.checkpoints import Checkpoint, Report, import_into
from models.contract import SpeechLLM
from models.preset import Preset
from models.pretrained import PREFIX, load_tokenizer, resolve
from models.statefiles import read_state, state_files
from models.weights.files import file_sha256, write_json
from pipelines.catalogue import preset_name
from pipelines.overrides import changed, parse_words
from pipelines.progress import console

ORIGIN = "import.json"  # where a folder's weights came from


def import_checkpoint(
    name: str,
    file: str,
    to: str | None = None,
    preset: str = "paper",
    backbone: str | None = None,
    settings: list[str] | None = None,
    check: bool = False,
) -> None:
    """Read an official file into the model of a preset and write that as a folder; with `check` only compare.

    Raises ValueError or FileNotFoundError, with what to do, if something is not there or does not fit.
    """
    architecture = load(name)
    checkpoint = importer(name)
    path = Path(file).expanduser()
    chosen = chosen_preset(architecture, preset, backbone, settings or [])
    if check:
        compare(architecture, checkpoint, path, chosen)
        return
    folder = Path(to or f"{name}-imported").expanduser()
    if folder.exists():
        raise ValueError(f"{folder} is there already; give another place with --to")
    read_state(path, checkpoint.nested, "meta")  # a wrong file is found before the pretrained parts are loaded
    model, report = convert(architecture, checkpoint, path, chosen, folder)
    _show(report)
    total = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"\nfolder  {folder}, {total:,} parameters with the pretrained parts", soft_wrap=True)
    console.print(f"use     load({name!r}).from_pretrained({str(folder)!r}), from models.architectures", soft_wrap=True)


def importer(name: str) -> Checkpoint:
    """How the architecture's official file is read. ValueError if nobody has said it."""
    found = load(name).checkpoint
    if found is None:
        known = [other for other in names() if load(other).checkpoint]
        raise ValueError(f"{name} has no importer: no `checkpoint` in its file; these have one: {', '.join(known)}")
    return found


def chosen_preset(architecture: type[SpeechLLM], preset: str, backbone: str | None, settings: list[str]) -> Preset:
    """The preset with another backbone, whose own sizes then count, and with single settings changed."""
    chosen = architecture.preset(preset_name(preset))
    if backbone is not None:
        new = chosen.backbone.model_copy(update={"weights": backbone, "tokenizer": backbone, "config": {}})
        chosen = chosen.model_copy(update={"backbone": new})
    return changed(chosen, parse_words(settings))


def compare(architecture: type[SpeechLLM], checkpoint: Checkpoint, path: Path, preset: Preset) -> None:
    """Say how a file's names and shapes meet ours; no pretrained part is loaded and no memory taken.

    Raises ValueError with the names if they do not fit.
    """
    backbone = preset.backbone
    if backbone.weights and "model_type" not in backbone.config:
        sized = backbone.model_copy(update={"config": _sizes(architecture, preset)})
        preset = preset.model_copy(update={"backbone": sized})
    report = import_into(architecture.on_meta(preset), checkpoint, path, strict=False)
    _show(report)
    if not report.fits:
        raise ValueError(f"{path} does not fit {architecture.title} ({checkpoint.file}):\n{report.problems()}")
    console.print(f"\n{path} fits; without --check it is imported", soft_wrap=True)


def _sizes(architecture: type[SpeechLLM], preset: Preset) -> dict[str, Any]:
    """The backbone's own configuration, of its folder or hub id; of the latter nothing else is downloaded."""
    reference = str(preset.backbone.weights)
    local = reference.startswith(PREFIX) or Path(reference).expanduser().is_dir()
    try:
        config = AutoConfig.from_pretrained(resolve(reference) if local else reference)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"cannot read the sizes of the backbone {reference!r} ({type(error).__name__}): check the name and the "
            "connection, or give a folder with its config.json"
        ) from error
    return architecture.make_config(preset, config).llm | preset.backbone.config


def convert(
    architecture: type[SpeechLLM], checkpoint: Checkpoint, path: Path, preset: Preset, folder: Path
) -> tuple[SpeechLLM, Report]:
    """Build the model with its pretrained parts, fill it from the file, write it with its tokenizer and origin.

    The folder is there only when it is whole.
    """
    tokenizer = load_tokenizer(preset.backbone.tokenizer)
    tokenizer.add_tokens(architecture.added_tokens(preset))
    model = architecture.build(preset, tokenizer, seed=preset.recipe.seed)
    report = import_into(model, checkpoint, path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / folder.name
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        files = {file.name: file_sha256(file) for file in state_files(path)}
        origin = {"checkpoint": checkpoint.file, "files": files, "loaded": len(report.loaded)}
        write_json(made / ORIGIN, origin | {"parameters": report.parameters, "ignored": list(report.ignored)})
        made.rename(folder)
    return model, report


def _show(report: Report) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensors")
    table.add_column("number", justify="right")
    table.add_column("parameters", justify="right")
    table.add_row("loaded", f"{len(report.loaded):,}", f"{report.parameters:,}")
    rows = {"ignored on purpose": report.ignored, "missing": report.missing, "unexpected": report.unexpected}
    for what, listed in (rows | {"of another shape": report.wrong}).items():
        style = "red" if listed and what != "ignored on purpose" else None
        table.add_row(what, f"{len(listed):,}", style=style)
    console.print(table)
