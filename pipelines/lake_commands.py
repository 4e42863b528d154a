"""Commands about a lake as it is: `trace`, `cache list`, `cache prune`. Nothing heavy is imported before one runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from collections.abc import Callable

Lake = Annotated[
    str | None, typer.Option("--lake", help="Where artefacts live; a path or URL. Default: $EARLOOM_LAKE or ./lake.")
]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]
STAGE = "stage"


class StageOrCommand(TyperGroup):
    """`earloom cache --arch …` runs the stage; where the first word is the name of another command, that one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else [STAGE, *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return "" if name == STAGE else name, command, rest  # the stage is called `earloom cache`, in its help too


def add_caches(app: typer.Typer, stage: Callable[..., None], about: str, example: str) -> None:
    """Register `cache`: the stage, with its help and an example, and the commands about caches."""
    caches = typer.Typer(cls=StageOrCommand)
    more = "Also: `earloom cache list` and `earloom cache prune`, about all caches of a lake."
    caches.command(STAGE, hidden=True, help=f"{about}\n\n{more}", epilog=f"Example: {example}")(stage)
    caches.command("list", epilog="Example: earloom cache list --lake s3://bucket/lake")(caches_list)
    prune = "Example: earloom cache prune --unreachable --older-than 30d --yes"
    caches.command("prune", epilog=prune)(caches_prune)
    app.add_typer(caches, name="cache", help=about)


def trace(
    speaker: Annotated[str | None, typer.Option(help="What was made from this speaker's clips?")] = None,
    file: Annotated[str | None, typer.Option(help="… from this source file?")] = None,
    clip: Annotated[str | None, typer.Option(help="… from the clip with this id or key?")] = None,
    model: Annotated[str | None, typer.Option(help="What was NAME, NAME@alias or NAME/version made from?")] = None,
    dataset: Annotated[str | None, typer.Option(help="Versions of a data set, and what was made from them.")] = None,
    lake: Lake = None,
    as_json: Json = False,
    every: Annotated[bool, typer.Option("--all", help="Name all source files.")] = False,
    tracking_uri: Annotated[
        str | None, typer.Option(help="Ask this MLflow server for --model, not the lake's records.")
    ] = None,
) -> None:
    """What is affected if a speaker, file or clip has to go; what a model was made from.

    Reads indexes, manifests and lineage. Ends with 1 if the origin of something is not known, and says of what.
    """
    given = {"speaker": speaker, "file": file, "clip": clip, "model": model, "dataset": dataset}
    asked = [(kind, name) for kind, name in given.items() if name]
    if len(asked) != 1:
        raise ValueError("say what to trace, one of --speaker, --file, --clip, --model and --dataset")
    from pipelines import tracing

    place = lake_url(lake)
    found = tracing.trace(place, *asked[0], every, tracking_uri)
    if as_json:
        typer.echo(tracing.as_json(found, place))
    else:
        tracing.show(found, place)
    if found.gaps:
        raise typer.Exit(1)


def caches_list(lake: Lake = None, as_json: Json = False) -> None:
    """Every feature cache: encoder, data, size, age, and whether audio, stages and runs lead to it."""
    from pipelines.caches import show_caches

    show_caches(lake_url(lake), as_json)


def caches_prune(
    lake: Lake = None,
    older_than: Annotated[str | None, typer.Option(help="Only those last changed before this: 12h, 30d.")] = None,
    larger_than: Annotated[
        str | None, typer.Option(help="Only until all caches together are under this: 500MB, 10GB.")
    ] = None,
    unreachable: Annotated[bool, typer.Option("--unreachable", help="Only those whose audio is gone.")] = False,
    even_reachable: Annotated[
        bool, typer.Option("--even-reachable", help="Also what stages and runs name, or changed within the last hour.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without it, only say what would go.")] = False,
) -> None:
    """Remove feature caches, unreachable and oldest first. Each limit narrows the choice; one is needed.

    What a stage or run was made from, and what changed within the last hour, is kept. A cache can be made again.
    """
    from pipelines.caches import prune

    prune(lake_url(lake), older_than, larger_than, unreachable, even_reachable, yes)


def lake_url(given: str | None) -> str:
    """The lake that a command was given, else that of the environment; a local path is absolute."""
    from infra.environment import default_lake
    from infra.names import absolute

    return absolute(given or default_lake())
