"""What a run shows on its page in Prefect: tables, curves, links to Ray, MLflow and the report. One place for all.

A server that does not answer must not stop the work: what cannot be shown is noted in the log. Progress, which is
shown while the work goes on, is in `progress`.
"""

from __future__ import annotations

import base64
import functools
import logging
import re
import sys
from collections.abc import Callable, Sequence
from html import unescape
from typing import TYPE_CHECKING, Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from components.evaluation.metrics import Hypothesis, Scores, flat, main_metric
from components.schema import StageReport
from infra.secrets import redacted
from pipelines.config import RunConfig

if TYPE_CHECKING:
    from pipelines.locate import Workspace

ANSWERS = 10
# A picture inside of Markdown has no style of its page: the report's light colours, on white.
STYLE = """<style>
:root { --c0: #2563b8; --c1: #d9772b; --c2: #1f8f74; --c3: #a8488f; --c4: #b8921b; --c5: #6a58c4; --c6: #c5434b;
  --c7: #64798a; }
text { font: 12px system-ui, sans-serif; fill: #5d6470; } text.stage { fill: #1d2026; font-weight: 550; }
.grid { stroke: #e4e1dc; } .axis { stroke: #5d6470; stroke-opacity: .5; }
line.stage { stroke: #5d6470; stroke-dasharray: 3 4; stroke-opacity: .7; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.faint { stroke-width: 1; stroke-opacity: .38; } .area { fill-opacity: .82; }
</style><rect width="100%" height="100%" fill="#fff"/>"""


def _quietly(show: Callable[..., None]) -> Callable[..., None]:
    """Only inside of a flow run, and a failure is a line in the log."""

    @functools.wraps(show)
    def shown(*arguments: Any, **named: Any) -> None:
        from prefect.context import FlowRunContext
        from prefect.exceptions import PrefectException

        if FlowRunContext.get() is None:
            return
        try:
            show(*arguments, **named)
        except (OSError, RuntimeError, ValueError, LookupError, PrefectException) as error:
            logging.getLogger(__name__).warning("%s: not shown in Prefect: %s", show.__name__, error)

    return shown


@_quietly
def show_stages(reports: Sequence[StageReport], key: str = "stages") -> None:
    """What was done, what was there already, how long it took: a line a stage."""
    table = [
        {
            "stage": report.stage,
            "state": report.state,
            "done": f"{report.done} {report.unit}",
            "there already": report.reused,
            "seconds": round(report.seconds, 1),
            "result": report.note,
            "where": redacted(report.url),
        }
        for report in reports
    ]
    create_table_artifact(key=key, table=table, description=_in_a_line(reports))


@_quietly
def show_training(work: Workspace, reports: Sequence[StageReport]) -> None:
    """The stages as a table, and their curves as pictures."""
    from components.training.history import read_metrics

    show_stages(reports, "training-stages")
    lines = [line for _, url in work.stages for line in read_metrics(url)]
    if lines:
        create_markdown_artifact(key="curves", markdown=curves_page(lines), description="Loss and mixture over steps")


@_quietly
def show_scores(scores: Scores, before: Scores | None, answers: Sequence[Hypothesis]) -> None:
    """Every metric, before and after training; and what the model said to some clips."""
    from components.evaluation.examples import choose

    name, value, _ = main_metric(scores)
    was = flat(before) if before else {}
    table = [{"metric": key, "untrained": was.get(key, ""), "trained": number} for key, number in flat(scores).items()]
    create_table_artifact(key="metrics", table=table, description=f"{name} {value:.1%}")
    rows = [{"clip": one.key, "said": one.reference, "heard": one.hypothesis} for one in choose(answers, ANSWERS)]
    create_table_artifact(key="answers", table=rows, description="The model's answers to some of the clips")


@_quietly
def show_model(work: Workspace, registered: dict[str, Any]) -> None:
    """The version that was registered, with its page in MLflow where a server has one."""
    name, version = registered["name"], registered["version"]
    page = model_page(work.tracking_uri, name, version)
    if page:
        create_link_artifact(
            key="model", link=page, link_text=f"{name} version {version} in MLflow", description="MLflow"
        )
        return
    about = f"**{name}** version {version} `@{registered['alias']}`\n\n- folder: `{redacted(registered['folder'])}`"
    about += f"\n- registry: `{redacted(work.tracking_uri)}` (no server, so it has no page)"
    create_markdown_artifact(
        key="model", markdown=f"{about}\n\n    earloom listen {name}@{registered['alias']} FILE.wav"
    )


@_quietly
def show_run(work: Workspace, report: str) -> None:
    """What a run of the chain ended with: a link to the report, and a page with the metric, places and curves."""
    from components.training.history import read_metrics
    from pipelines.evaluate import read_scores

    link = report if "://" in report else f"file://{report}"
    create_link_artifact(
        key="report", link=redacted(link), link_text=f"Report of {work.model_name}", description="The report, a page"
    )
    scores, before = read_scores(work)
    name, value, _ = main_metric(scores)
    was = f"untrained {main_metric(before)[1]:.1%} → " if before else ""
    page = [f"**{work.model_name}** · {name} {was}**{value:.1%}**", f"- report: `{redacted(report)}`"]
    page += [f"- run: `{redacted(work.run_root)}`", f"- registry: `{redacted(work.tracking_uri)}`", ""]
    page.append(curves_page([line for _, url in work.stages for line in read_metrics(url)]))
    create_markdown_artifact(key="run", markdown="\n".join([page[0], "", *page[1:]]), description=f"{name} {value:.1%}")


@_quietly
def show_ray(config: RunConfig) -> None:
    """The dashboard of the cluster that does the work; a Ray that was started for this run has none."""
    page = dashboard(config.ray_address)
    if page:
        create_link_artifact(key="ray", link=page, link_text="Ray dashboard")


def dashboard(address: str | None) -> str | None:
    """URL of Ray's dashboard: of a job address the address itself, else what the connected cluster says."""
    if address and address.startswith(("http://", "https://")):
        return redacted(address)
    if "ray" not in sys.modules:
        return None
    import ray

    if not ray.is_initialized():
        return None
    client = getattr(ray, "_private", None)
    found = client.worker.get_dashboard_url() if client else None
    return f"http://{found}" if found else None


def model_page(tracking_uri: str, name: str, version: str) -> str | None:
    """URL of a version's page, where the registry is an MLflow server."""
    if not tracking_uri.startswith(("http://", "https://")):
        return None
    return f"{redacted(tracking_uri.rstrip('/'))}/#/models/{name}/versions/{version}"


def curves_page(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown with the loss of each stage and the mixture over steps, as pictures inside of the text."""
    from components.evaluation import curves

    stages = curves.by_stage(lines)
    charts = {"Loss": curves.loss_charts(stages, per_row=1), "Mixture of tasks": curves.mixture_chart(stages)}
    parts = []
    for title, page in charts.items():
        for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
            words = re.search(r'aria-label="([^"]*)"', svg)
            said = unescape(words[1]) if words else title
            heading = said.partition(". ")[0] if title == "Loss" else title
            parts.append(f"#### {heading}\n\n![{said}]({picture(svg)})\n\n{said}")
    return "\n\n".join(parts)


def picture(svg: str) -> str:
    """A chart of the report as a data URI that an image can show: self-contained, without its hovering strips."""
    plain = re.sub(r'<rect class="hit".*?</rect>', "", svg, flags=re.DOTALL)
    head, _, rest = plain.partition(">")
    size = re.search(r'viewBox="0 0 (\S+) (\S+)"', head)
    wide = f' width="{size[1]}" height="{size[2]}"' if size else ""
    whole = f'{head} xmlns="http://www.w3.org/2000/svg"{wide}>{STYLE}{rest}'
    return "data:image/svg+xml;base64," + base64.b64encode(whole.encode()).decode()


def _in_a_line(reports: Sequence[StageReport]) -> str:
    spent = sum(report.seconds for report in reports)
    return ", ".join(f"{report.stage}: {report.state}" for report in reports) + f" ({spent:.0f} s)"
