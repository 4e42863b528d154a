"""Commands about registered models: `models`, `promote`, `rollback`, `export`. Heavy imports wait until one runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from components.registry.names import CHAMPION
from pipelines.lake_commands import Json, Lake, lake_url

if TYPE_CHECKING:
    from pipelines.promoting import Outcome

Uri = Annotated[str | None, typer.Option("--tracking-uri", help="MLflow server; default: the lake's own registry.")]
Alias = Annotated[str, typer.Option("--to", help="The alias that is moved.")]
Why = Annotated[str, typer.Option("--why", help="The reason, for those who ask later.")]


def add(app: typer.Typer) -> None:
    """Register the commands, each with an example."""
    app.command(epilog="Example: earloom models funasr_llm-demo")(models)
    app.command(epilog='Example: earloom promote funasr_llm-demo@candidate --margin 0.01 --why "more speakers"')(
        promote
    )
    app.command(epilog='Example: earloom rollback funasr_llm-demo --why "worse on long calls"')(rollback)
    app.command(epilog="Example: earloom export funasr_llm-demo@champion --to folder my-model/")(export)


def models(
    name: Annotated[str | None, typer.Argument(help="One model; default: all.")] = None,
    lake: Lake = None,
    tracking_uri: Uri = None,
    as_json: Json = False,
) -> None:
    """The registered versions: aliases, architecture, what they score, on which data, since when."""
    from pipelines import promoting

    rows = promoting.rows(name, _registry(lake, tracking_uri))
    if as_json:
        typer.echo(promoting.as_json(rows))
        return
    from rich.markup import escape
    from rich.table import Table

    from pipelines.progress import console

    table = Table("model", "version", "aliases", "architecture", "metric", "data", "registered", box=None)
    for row in rows:
        value = "–" if row["value"] is None else f"{row['metric']} {row['value']:.2%}"
        aliases = " ".join(f"@{alias}" for alias in row["aliases"])
        cells = [row["name"], row["version"], aliases, row["architecture"] or "–", value, row["data"] or "–"]
        table.add_row(*map(escape, cells), row["registered"][:16].replace("T", " "))
    console.print(table)


def promote(
    model: Annotated[str, typer.Argument(help="NAME (its newest version), NAME/version or NAME@alias.")],
    alias: Alias = CHAMPION,
    metric: Annotated[
        str | None, typer.Option(help="task/split/wer, cer, accuracy or choice. Default: what the model is judged by.")
    ] = None,
    margin: Annotated[float, typer.Option(help="By how much it has to be better; 0.005 is half a point.")] = 0.005,
    relative: Annotated[
        bool, typer.Option("--relative", help="The margin is a share of the present holder's rate.")
    ] = False,
    why: Why = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would happen.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also without being better or comparable; needs --why.")
    ] = False,
    lake: Lake = None,
    tracking_uri: Uri = None,
) -> None:
    """Give a version the alias @champion, if it beats the one that holds it by a margin.

    Both must have answered the same clips of the same version of the data. If it falls short, says by how much and ends
    with 1. The first champion has to beat its own untrained self. Who, when and why become tags of both versions.
    """
    from pipelines import promoting
    from pipelines.progress import console

    gate = promoting.Gate(metric, margin, relative, why, force)
    try:
        done = promoting.promote(model, alias, gate, _registry(lake, tracking_uri), dry_run)
    except promoting.FallsShort as short:
        console.print(f"[red]not promoted[/]  {short.verdict.said()}", soft_wrap=True)
        console.print(f"  {short.verdict.certainty()}", soft_wrap=True)
        raise typer.Exit(1) from None
    _say(done, alias, dry_run)


def _say(done: Outcome, alias: str, dry_run: bool) -> None:
    from rich.markup import escape

    from pipelines.progress import console

    name = f"[bold]{done.entry.name} version {done.entry.version}[/bold]"
    if done.verdict is None and not done.doubt:
        console.print(f"{name} is @{alias} already, nothing was changed")
        return
    if dry_run:
        console.print(f"{name} would become @{alias}; nothing was changed")
    else:
        before = f", in the place of version {done.move.before}" if done.move and done.move.before else ""
        console.print(f"{name} is @{alias}{before}")
    if done.doubt:
        console.print(f"  [yellow]forced[/]  {escape(done.doubt)}", soft_wrap=True)
    elif done.verdict:
        console.print(f"  {done.verdict.said()}", soft_wrap=True)
    if done.verdict:
        console.print(f"  {done.verdict.certainty()}", soft_wrap=True)


def rollback(
    name: Annotated[str, typer.Argument(help="NAME of a registered model.")],
    alias: Alias = CHAMPION,
    why: Why = "",
    lake: Lake = None,
    tracking_uri: Uri = None,
) -> None:
    """Give an alias back to the version that held it before; again, to the one before that."""
    from pipelines import promoting
    from pipelines.progress import console

    move, gone = promoting.rollback(name, alias, why, _registry(lake, tracking_uri))
    for version in gone:
        console.print(f"[yellow]passed over[/]  version {version}, which is no longer registered")
    console.print(f"[bold]{name} version {move.to}[/bold] is @{alias} again, in the place of version {move.before}")


def export(
    model: Annotated[str, typer.Argument(help="NAME, NAME@alias or NAME/version of a registered model.")],
    destination: Annotated[
        str, typer.Argument(metavar="DEST", help="A folder (path or URL), or OWNER/NAME on the hub.")
    ],
    to: Annotated[str, typer.Option("--to", help="folder, or hub: huggingface.co or $HF_ENDPOINT.")] = "folder",
    licence: Annotated[
        str | None, typer.Option("--licence", help="SPDX name for the card. Default: other, as LICENSES.md says.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="hub: a public repository; default: private.")] = False,
    revision: Annotated[str | None, typer.Option(help="hub: another branch than main.")] = None,
    message: Annotated[str | None, typer.Option(help="hub: the commit message.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier export left there.")] = False,
    lake: Lake = None,
    tracking_uri: Uri = None,
) -> None:
    """A clean copy of a model for others: weights, card, licences of data and weights, and nothing of this machine.

    Checked against the digests that were registered; safetensors only. The hub's token comes from $HF_TOKEN or
    `hf auth login`.
    """
    from pipelines.exporting import Wishes, export_model, show_export

    wishes = Wishes(licence, overwrite, public, revision, message)
    show_export(export_model(model, to, destination, lake_url(lake), _registry(lake, tracking_uri), wishes))


def _registry(lake: str | None, tracking_uri: str | None) -> str:
    from pipelines.promoting import registry_uri

    return registry_uri(lake_url(lake), tracking_uri)
