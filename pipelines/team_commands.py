"""Commands of a team: `up`, `down`, `status`. Nothing heavy is imported before one runs."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.lake_commands import Json, Lake


def add(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(epilog="Example: earloom up --lake ./lake")(up)
    app.command(epilog='Example: earloom status --json. For a shell: eval "$(earloom status --env)"')(status)
    app.command(epilog="Example: earloom down")(down)


def up(
    lake: Lake = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; one that others reach needs --auth. Default: 127.0.0.1.")
    ] = None,
    prefect_port: Annotated[int | None, typer.Option(help="Default: 4200.", min=1, max=65535)] = None,
    mlflow_port: Annotated[int | None, typer.Option(help="Default: 5000.", min=1, max=65535)] = None,
    auth: Annotated[
        bool, typer.Option("--auth", help="Ask for a password: $EARLOOM_AUTH (user:password), or a new one.")
    ] = False,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="A name by which others reach this machine; may be repeated.")
    ] = None,
) -> None:
    """Start what a team needs on this machine: Prefect server, MLflow server and a worker. What runs is left alone.

    They go on when the shell is closed, until `earloom down`. MLflow shows the models of the lake that is named with
    --lake or $EARLOOM_LAKE; without one it keeps a registry of its own.
    """
    from pipelines import team

    team.up(lake, host, prefect_port, mlflow_port, auth, tuple(name or ()))


def status(
    as_json: Json = False,
    env: Annotated[
        bool, typer.Option("--env", help="Print what a shell needs, passwords too, for eval; nothing else.")
    ] = False,
) -> None:
    """How the services of `earloom up` are, and the last flow runs. Ends with 1 if one does not run or not answer."""
    from pipelines import team

    if env:
        team.print_environment()
    elif not team.status(as_json):
        raise typer.Exit(1)


def down(
    seconds: Annotated[float, typer.Option(min=0.0, help="What each may take to end before it is killed.")] = 15.0,
    purge: Annotated[bool, typer.Option("--purge", help="Also delete their databases, logs and passwords.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before --purge.")] = False,
) -> None:
    """End what `earloom up` started: worker and its flow runs first, then the servers. What they know stays."""
    from pipelines import team

    if purge and not yes:
        typer.confirm(f"Delete all that Prefect and MLflow know, in {team.folder()}?", abort=True)
    team.down(seconds, purge)
