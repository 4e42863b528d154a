"""Deployments of the chain and its stages: what infra/prefect declares, brought to a Prefect server and kept there.

Everything is compared with what the server has before it is written, so to deploy twice changes nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from infra import running
from infra.environment import home
from infra.secrets import redacted
from pipelines.slots import TRAINING

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

POOLS: dict[str, str] = {"process": "earloom", "kubernetes": "earloom-kubernetes"}  # as prefect.yaml names them
STAGES = ("chain", "ingest", "cache", "train", "evaluate", "register")
SLUG = "earloom"  # of the schedule that is ours; those that a person made in the UI are left alone
COMPARED = (
    "version",
    "description",
    "tags",
    "entrypoint",
    "parameters",
    "job_variables",
    "pull_steps",
    "work_pool_name",
    "work_queue_name",
    "parameter_openapi_schema",
    "enforce_parameter_schema",
    "concurrency_limit",
    "concurrency_options",
)


class Change(NamedTuple):
    """One line of what a deployment did: `how` is new, same, or the names of what changed."""

    what: str
    name: str
    how: str
    note: str = ""


class Target(NamedTuple):
    """Where runs go, as `earloom deploy` was told."""

    kind: str = "process"  # or kubernetes
    pool: str | None = None
    image: str | None = None  # Kubernetes only
    directory: str | None = None  # process only: where flow runs work; default: `default_directory`
    trainings: int = 1  # at a time: how many machines or GPUs there are for them


class Plan(NamedTuple):
    """A schedule with the settings that its runs have; `name` is the deployment's."""

    name: str
    stage: str
    parameters: dict[str, Any]
    schedule: dict[str, Any] | None = None


# ---- what is wanted -----------------------------------------------------------------------------------------------


def declared(target: Target, plan: Plan | None = None) -> list[dict[str, Any]]:
    """Deployments for a pool as infra/prefect/prefect.yaml has them, or the one of a plan; raises ValueError."""
    if target.kind not in POOLS:
        raise ValueError(f"no work pool type {target.kind!r}; there are: {', '.join(POOLS)}")
    if target.image and target.kind == "process":
        raise ValueError("--image is for --type kubernetes: a process runs what is installed where its worker runs")
    known = _read("prefect.yaml")
    ours = [each for each in known["deployments"] if each["work_pool"]["name"] == POOLS[target.kind]]
    if plan is not None:
        ours = [each for each in ours if _stage_of(each) == plan.stage]
        if not ours:
            raise ValueError(f"no stage {plan.stage!r}; there are: {', '.join(STAGES)}")
        ours = [ours[0] | {"name": plan.name, "parameters": plan.parameters}]
    return [_complete(each, target) for each in ours]


def check() -> list[str]:
    """Read prefect.yaml and automations.yaml as Prefect does; returns the full names. Raises ValueError."""
    from prefect.client.schemas.actions import DeploymentCreate
    from prefect.flows import Flow

    names = []
    for kind in POOLS:
        for each in declared(Target(kind=kind)):
            flow = flow_of(each["entrypoint"])
            if not isinstance(flow, Flow):
                raise ValueError(f"prefect.yaml: {each['entrypoint']} of {each['name']} is no Prefect flow")
            DeploymentCreate(flow_id="0" * 32, **each)
            names.append(f"{flow.name}/{each['name']}")
    if len(set(names)) < len(names) or len(names) != len(_read("prefect.yaml")["deployments"]):
        raise ValueError(f"prefect.yaml: each deployment needs a name of its own and one of the pools {POOLS}")
    automations()
    return names


def automations() -> list[Any]:
    """The automations as Prefect's own models, which refuse what the server would not understand."""
    from prefect.events.schemas.automations import AutomationCore

    return [AutomationCore.model_validate(each) for each in _read("automations.yaml")["automations"]]


def default_directory() -> str:
    """Where flow runs work if nothing is said: the checkout, else `EARLOOM_HOME`. A relative lake lies below it."""
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        return str(checkout)
    return str(home())


def flow_of(entrypoint: str) -> Any:
    module, _, name = entrypoint.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _complete(declaration: dict[str, Any], target: Target) -> dict[str, Any]:
    """A declaration with what depends on the code and on where it runs: the form, directory, image, pool."""
    pool = declaration["work_pool"]
    variables = dict(pool["job_variables"])
    directory = target.directory or default_directory()
    if target.kind == "process":
        variables["working_dir"] = directory
    elif target.image:
        variables["image"] = target.image
    limit = declaration.get("concurrency_limit")
    steps = [{"prefect.deployments.steps.set_working_directory": {"directory": directory}}]
    return {
        "name": declaration["name"],
        "version": version("earloom"),
        "description": declaration["description"],
        "tags": declaration["tags"],
        "entrypoint": declaration["entrypoint"],
        "parameters": declaration.get("parameters", {}),
        "job_variables": variables,
        # Without a step Prefect copies the folder into itself; the image of a Kubernetes job is at its place already.
        "pull_steps": steps if target.kind == "process" else None,
        "work_pool_name": target.pool or pool["name"],
        "work_queue_name": pool["work_queue_name"],
        "parameter_openapi_schema": form(declaration["entrypoint"]),
        "enforce_parameter_schema": True,
        "concurrency_limit": target.trainings if limit else None,
        "concurrency_options": {"collision_strategy": limit["collision_strategy"]} if limit else None,
    }


@lru_cache
def form(entrypoint: str) -> dict[str, Any]:
    """What the UI draws its form from: the schema of the settings, and the architectures to choose from."""
    from prefect.utilities.callables import parameter_schema

    from models.architectures import names

    schema: dict[str, Any] = parameter_schema(flow_of(entrypoint)).model_dump_for_openapi()
    fields = schema["definitions"]["RunConfig"]["properties"]
    fields["arch"]["enum"] = names()
    return schema


def _stage_of(declaration: dict[str, Any]) -> str:
    return str(declaration["entrypoint"].rpartition(".")[2])


@lru_cache
def _read(name: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((files("infra") / "prefect" / name).read_text())
    return read


# ---- what the server gets -----------------------------------------------------------------------------------------


def deploy(target: Target, plan: Plan | None = None) -> Iterator[Change]:
    """Bring pool, deployments, limits and automations to the server, one change at a time.

    ValueError for a wrong setting, ConnectionError if there is no server or it refuses.
    """
    wanted = declared(target, plan)
    with _server() as client:
        yield _pool(client, target)
        yield _limit(client, target.trainings)
        for each in wanted:
            yield _deployment(client, each, plan.schedule if plan else None)
        for automation in automations():
            yield _automation(client, automation)


@contextmanager
def _server() -> Iterator[SyncPrefectClient]:
    """A client of the server that is configured, else of the one that `earloom up` started.

    Never of a temporary one, which would forget everything.
    """
    from httpx import HTTPError
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    url = PREFECT_API_URL.value()
    own = {} if url else running.client_environment(home())
    if not (url or own.get("PREFECT_API_URL")):
        raise ConnectionError("no Prefect server is known: start one with `earloom up`, or set PREFECT_API_URL")
    settings = {
        PREFECT_API_URL: own.get("PREFECT_API_URL"),
        PREFECT_API_AUTH_STRING: own.get("PREFECT_API_AUTH_STRING"),
    }
    url = redacted(url or own["PREFECT_API_URL"])
    with (
        temporary_settings({key: value for key, value in settings.items() if value}),
        get_client(sync_client=True) as client,
    ):
        try:
            yield client
        except PrefectHTTPStatusError as error:
            raise ConnectionError(f"the Prefect server at {url} refused: {error.response.text[:500]}") from None
        except HTTPError as error:
            raise ConnectionError(
                f"the Prefect server at {url} does not answer ({type(error).__name__}); is it running? `earloom status`"
            ) from None


def _pool(client: SyncPrefectClient, target: Target) -> Change:
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    name = target.pool or POOLS[target.kind]
    template = _template(client, target.kind)
    note = f"start a worker: prefect worker start --pool {name}"
    try:
        there = client.read_work_pool(name)
    except ObjectNotFound:
        made = WorkPoolCreate(name=name, type=target.kind, base_job_template=template, description="Flows of Earloom")
        client.create_work_pool(made)
        return Change("pool", name, "new", note)
    if there.type != target.kind:
        raise ValueError(f"work pool {name!r} is of type {there.type}, not {target.kind}: name another with --pool")
    if there.base_job_template == template:
        return Change("pool", name, "same", note)
    client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
    return Change("pool", name, "job template", note)


def _template(client: SyncPrefectClient, kind: str) -> dict[str, Any]:
    """The job template of a pool: ours for Kubernetes where it is there, else the one that Prefect's server knows."""
    ours = files("infra") / "kubernetes" / "base" / "job-template.json"
    if kind == "kubernetes" and ours.is_file():
        template: dict[str, Any] = yaml.safe_load(ours.read_text())
        return template
    known = client.request("GET", "/collections/views/{view}", path_params={"view": "aggregate-worker-metadata"}).json()
    for collection in known.values():
        if kind in collection:
            return dict(collection[kind]["default_base_job_configuration"])
    raise LookupError(f"this Prefect server knows no work pools of type {kind!r}")


def _limit(client: SyncPrefectClient, trainings: int) -> Change:
    """How many trainings run at a time, whichever deployment they belong to; each waits for its turn."""
    from prefect.exceptions import ObjectNotFound

    try:
        old = client.read_global_concurrency_limit_by_name(TRAINING).limit
    except ObjectNotFound:
        old = None
    client.upsert_global_concurrency_limit_by_name(TRAINING, trainings)
    how = "new" if old is None else "same" if old == trainings else f"limit {old} → {trainings}"
    return Change("limit", TRAINING, how, f"{trainings} at a time")


def _deployment(client: SyncPrefectClient, wanted: dict[str, Any], schedule: dict[str, Any] | None) -> Change:
    from prefect.client.schemas.actions import DeploymentUpdate
    from prefect.exceptions import ObjectNotFound

    flow = flow_of(wanted["entrypoint"])
    name = f"{flow.name}/{wanted['name']}"
    note = f"waits for {wanted['concurrency_limit']} at a time" if wanted["concurrency_limit"] else ""
    try:
        there = client.read_deployment_by_name(name)
    except ObjectNotFound:
        identity = client.create_deployment(flow_id=client.create_flow_from_name(flow.name), **_typed(wanted))
        changed = ["new"]
    else:
        identity = there.id
        has = there.model_dump(mode="json")
        limit = has.get("global_concurrency_limit")
        has["concurrency_limit"] = limit["limit"] if limit else None
        changed = [key for key in COMPARED if not _same(wanted[key], has.get(key))]
        if changed:
            client.update_deployment(identity, DeploymentUpdate(**{key: wanted[key] for key in changed}))
    if schedule is not None:
        new = _schedule(client, identity, schedule)
        changed += ["schedule"] if new and changed != ["new"] else []
        note = "; ".join([str(schedule.get("cron") or f"every {schedule['interval']} s"), *([note] if note else [])])
    return Change("deployment", name, ", ".join(changed) or "same", note)


def _typed(wanted: dict[str, Any]) -> dict[str, Any]:
    from prefect.client.schemas.objects import ConcurrencyOptions

    options = wanted["concurrency_options"]
    return wanted | {"concurrency_options": ConcurrencyOptions.model_validate(options) if options else None}


def _same(wanted: Any, has: Any) -> bool:
    """Whether the server has what is wanted; it may add keys with nothing in them."""
    if isinstance(wanted, dict) and isinstance(has, dict):
        extra = [key for key in has if key not in wanted and has[key] not in (None, "", [], {})]
        return not extra and all(_same(value, has.get(key)) for key, value in wanted.items())
    if isinstance(wanted, list) and isinstance(has, list):
        if all(isinstance(each, str) for each in [*wanted, *has]):
            return sorted(wanted) == sorted(has)  # sets, such as an automation's events, come in any order
        return len(wanted) == len(has) and all(map(_same, wanted, has))
    return wanted == has or (not wanted and not has)


def _schedule(client: SyncPrefectClient, identity: Any, wanted: dict[str, Any]) -> bool:
    """Make the schedule that is ours this one; returns whether anything changed."""
    from prefect.client.schemas.schedules import construct_schedule

    zone = wanted.get("timezone")
    made: Any = (
        construct_schedule(cron=wanted["cron"], timezone=zone)
        if "cron" in wanted
        else construct_schedule(interval=timedelta(seconds=wanted["interval"]), timezone=zone)
    )
    ours = [each for each in client.read_deployment_schedules(identity) if each.slug == SLUG]
    if ours:
        has = ours[0].schedule.model_dump(mode="json", exclude={"anchor_date"})
        if has == made.model_dump(mode="json", exclude={"anchor_date"}):
            return False
        client.delete_deployment_schedule(identity, ours[0].id)
    client.request(
        "POST",
        "/deployments/{id}/schedules",
        path_params={"id": identity},
        json=[{"schedule": made.model_dump(mode="json"), "active": True, "slug": SLUG}],
    )
    return True


def _automation(client: SyncPrefectClient, wanted: Any) -> Change:
    there = next((each for each in client.read_automations_by_name(wanted.name) if each.name == wanted.name), None)
    if there is None:
        client.create_automation(wanted)
        return Change("automation", wanted.name, "new", wanted.description)
    skipped = {"id", "created", "updated"}
    if _same(wanted.model_dump(mode="json"), there.model_dump(mode="json", exclude=skipped)):
        return Change("automation", wanted.name, "same", wanted.description)
    client.update_automation(there.id, wanted)
    return Change("automation", wanted.name, "changed", wanted.description)
