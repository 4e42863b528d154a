"""`earloom deploy`: the chain and its stages as deployments of a Prefect server, with pool, limits and automations."""

from __future__ import annotations

from typing import Annotated, Any

import typer

EXAMPLE = "Example: earloom deploy --name nightly --arch salmonn --data s3://bucket/speech --schedule '0 3 * * *'"


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog=EXAMPLE)(deploy)


def deploy(
    arch: Annotated[str | None, typer.Option("--arch", help="A deployment with these settings filled in.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="… and this data.")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="… and a YAML file with settings.")] = None,
    lake: Annotated[str | None, typer.Option("--lake", help="… and this lake. Default: the worker's.")] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="… and these settings.", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="Its name. Default: <arch>-<data>.")] = None,
    stage: Annotated[str, typer.Option(help="chain, or one stage.")] = "chain",
    schedule: Annotated[str | None, typer.Option(help="When it runs: cron, as '0 3 * * *', or every 6h.")] = None,
    timezone: Annotated[str, typer.Option(help="Of the schedule, as Europe/Berlin.")] = "UTC",
    kind: Annotated[str, typer.Option("--type", help="process or kubernetes.")] = "process",
    pool: Annotated[str | None, typer.Option(help="Work pool. Default: earloom, or earloom-kubernetes.")] = None,
    image: Annotated[str | None, typer.Option(help="Image of Kubernetes jobs.")] = None,
    directory: Annotated[
        str | None, typer.Option(help="Where processes work, a relative lake below it. Default: the checkout.")
    ] = None,
    trainings: Annotated[int, typer.Option(min=1, help="How many trainings may run at a time.")] = 1,
    check: Annotated[
        bool, typer.Option("--check", help="Check the files, show what there would be, change nothing.")
    ] = False,
) -> None:
    """Create or update the deployments of the chain and of every stage on a Prefect server; twice changes nothing.

    A person starts them from the Prefect UI, with a form. With --arch and --data it is one deployment whose form is
    filled in, and with --schedule one that runs by itself.
    """
    from pipelines import deployments
    from pipelines.progress import console

    target = deployments.Target(kind, pool, image, directory, trainings)
    given = [word for word in (arch, data, recipe, lake, *(settings or [])) if word]
    plan = _plan(name, stage, schedule, timezone, _parameters(arch, data, recipe, lake, settings)) if given else None
    if plan is None and (schedule or name):
        raise ValueError("a schedule needs to know what to run: say --arch and --data as well")
    if check:
        names = deployments.check()
        console.print(f"{len(names)} deployments in infra/prefect/prefect.yaml, all in order. There would be:")
        _show([_would_be(each) for each in deployments.declared(target, plan)])
        return
    changes = list(deployments.deploy(target, plan))
    _show(changes)
    different = sum(change.how != "same" for change in changes)
    console.print(f"{different} changed" if different else "all as it was", style="bold")


def _plan(name: str | None, stage: str, schedule: str | None, timezone: str, parameters: dict[str, Any]) -> Any:
    from pipelines.deployments import Plan

    config = parameters["config"]
    source = str(config["data"]).rstrip("/").rpartition("/")[2].partition(".")[0]
    return Plan(
        name or f"{config['arch']}-{config.get('dataset') or source}",
        stage,
        parameters,
        read_schedule(schedule, timezone) if schedule else None,
    )


def _parameters(
    arch: str | None, data: str | None, recipe: str | None, lake: str | None, settings: list[str] | None
) -> dict[str, Any]:
    """What was said and nothing else: what was not said is decided by the worker, not by this machine."""
    from pipelines.locate import Workspace
    from pipelines.overrides import parse_words, read_recipe_file, run_config

    words = (read_recipe_file(recipe) if recipe else {}) | parse_words(settings or [])
    said: dict[str, Any] = {key: value for key, value in (("arch", arch), ("data", data), ("lake", lake)) if value}
    config = run_config(words | said)
    _ = Workspace(config).preset  # a wrong setting is said now and not at three in the morning
    values = config.model_dump(mode="json", exclude_defaults=True)
    if lake is None and "lake" not in words:
        values.pop("lake", None)
    return {"config": values}


def read_schedule(text: str, timezone: str) -> dict[str, Any]:
    """`0 3 * * *` → cron; `6h`, `every 90 minutes` → an interval in seconds. ValueError for anything else."""
    import re
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    try:
        ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError):
        raise ValueError(f"no time zone {timezone!r}; name one as Europe/Berlin") from None
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if match := re.fullmatch(r"(?:every\s+)?(\d+)\s*([smhd])\w*", text.strip()):
        seconds = int(match[1]) * units[match[2]]
        if seconds < 60:
            raise ValueError(f"a schedule of {text!r} is too often: at least a minute, as in 6h")
        return {"interval": seconds, "timezone": timezone}
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    try:
        CronSchedule(cron=text, timezone=timezone)
    except ValidationError:
        raise ValueError(f"{text!r} is no schedule: use cron, as '0 3 * * *', or an interval, as 6h") from None
    return {"cron": text, "timezone": timezone}


def _would_be(each: dict[str, Any]) -> Any:
    from pipelines.deployments import Change, flow_of

    limit = f", {each['concurrency_limit']} at a time" if each["concurrency_limit"] else ""
    return Change("deployment", f"{flow_of(each['entrypoint']).name}/{each['name']}", each["work_pool_name"], limit[2:])


def _show(changes: list[Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from pipelines.progress import console

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("what", "name", "state", ""):
        table.add_column(column, overflow="fold")
    for change in changes:
        style = {"same": "dim", "new": "green"}.get(change.how, "yellow")
        table.add_row(change.what, escape(change.name), f"[{style}]{escape(change.how)}[/]", escape(change.note))
    console.print(table)
