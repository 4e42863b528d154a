"""`earloom export`: a registered model as a folder for others, or as a repository of the Hugging Face hub."""

from __future__ import annotations

from typing import NamedTuple

from rich.markup import escape

from components.registry import export, hub
from components.registry.mlflow_registry import find_entry
from components.registry.model_folder import checked
from infra import storage
from infra.names import absolute
from pipelines.progress import console

TARGETS = ("folder", "hub")


class Wishes(NamedTuple):
    """How it is to be exported; the last three are for the hub."""

    licence: str | None = None
    overwrite: bool = False
    public: bool = False
    revision: str | None = None
    message: str | None = None


class Outcome(NamedTuple):
    """What was exported, and where it is."""

    model: str
    exported: export.Exported
    uploaded: hub.Uploaded | None


def export_model(model: str, to: str, destination: str, lake: str, tracking_uri: str, wishes: Wishes) -> Outcome:
    """A checked, clean copy of `NAME[@alias|/version]`. Nothing is left at the destination if it fails."""
    if to not in TARGETS:
        raise ValueError(f"--to {to}: a model goes to {' or '.join(TARGETS)}")
    if to == "folder" and (wishes.public or wishes.revision or wishes.message):
        raise ValueError("--public, --revision and --message are for --to hub")
    place = absolute(destination) if to == "folder" else ""
    if place:
        export.refuse_place(place, lake, wishes.overwrite)
    else:
        hub.check_repository(destination)
    entry = find_entry(model, tracking_uri)
    folder = checked(entry)
    with export.scratch(place or "hub://") as into:
        made = export.build(entry, folder, into, lake, wishes.licence)
        uploaded = None
        if place:
            export.refuse_place(place, lake, wishes.overwrite)  # building takes a while, and others work there too
            export.publish(into, place, made.files)
        else:
            uploaded = hub.upload(into, destination, wishes.public, wishes.revision, wishes.message, wishes.overwrite)
    where = uploaded.url if uploaded else place
    return Outcome(f"{entry.name} version {entry.version}", made._replace(place=where), uploaded)


def show_export(done: Outcome) -> None:
    """What was made, and, loud, what stands in the way of publishing it."""
    made = done.exported
    console.print(
        f"[bold]{done.model}[/bold] → {escape(storage.shown(made.place))}, {len(made.files)} files", soft_wrap=True
    )
    if done.uploaded:
        seen = "public" if done.uploaded.public else "private"
        console.print(f"  {seen}, commit {done.uploaded.commit[:12]}")
    for text in made.warnings:
        console.print(f"  [bold yellow]licence[/]  {escape(text)}", soft_wrap=True)
    if made.warnings:
        console.print("  LICENSES.md has it all")
