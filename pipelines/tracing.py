"""`earloom trace`: what was made from a speaker, file, clip or data set, and what a model was made from."""

from __future__ import annotations

import json
import os
import shlex
from typing import Any, Literal, cast

from rich.markup import escape
from rich.tree import Tree

from components.registry.graph import Graph, read_graph
from components.registry.mlflow_registry import find, parse_model
from components.registry.records import Gap, Record, read_part
from components.registry.search import AudioPart, Subject
from components.registry.trace import Trace, backward, forward
from infra import storage

Kind = Literal["speaker", "file", "clip", "dataset"]


def trace(lake: str, kind: str, name: str, every: bool = False, tracking_uri: str | None = None) -> Trace:
    """The answer for `kind` speaker, file, clip, dataset or model; `every` names all source files.

    LookupError if there is no such model.
    """
    graph = read_graph(lake)
    if kind != "model":
        return forward(graph, Subject(cast(Kind, kind), name), every)
    label, url = model_folder(graph, name, tracking_uri)
    record = read_part(storage.join(url, "lineage.json"), Record)
    if record is None or isinstance(record, Gap):
        gap = record or Gap(url, "lineage.json is missing: register the model again")
        return Trace(kind="model", name=label, gaps=(gap,))
    return backward(graph, label, url, record, every)


def model_folder(graph: Graph, model: str, tracking_uri: str | None = None) -> tuple[str, str]:
    """`NAME[@alias|/version]` → `NAME/version` and its folder; LookupError says what there is.

    What the lake recorded when it registered is enough for a version, for the newest, and for the alias of the only
    version. Else, or with `tracking_uri`, the registry is asked: aliases move.
    """
    name, alias, version = parse_model(model)
    runs = [(run.url, run.registered) for run in graph.runs if run.registered and run.registered.name == name]
    known = [(url, made) for url, made in runs if version in (None, made.version)]
    if alias:
        known = [(url, made) for url, made in known if len(runs) == 1 and made.alias == alias]
    known.sort(key=lambda pair: int(pair[1].version))
    newest = [pair for pair in known if pair[1].version == known[-1][1].version]
    if len(newest) == 1 and tracking_uri is None:
        return f"{name}/{newest[0][1].version}", storage.join(newest[0][0], "model")
    uris = [made.tracking_uri for _, made in runs]
    found = find(model, _registry(graph, tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"), uris))
    return f"{name}/{found.version}", found.url


def _registry(graph: Graph, given: str | None, recorded: list[str]) -> str:
    """URI of the registry to ask. LookupError where there is none: an empty one must not be made by looking."""
    local = "" if "://" in graph.lake else os.path.join(os.path.abspath(graph.lake), "mlflow.db")
    uri = given or next(iter(recorded), f"sqlite:///{local}" if local else "")
    file = uri.removeprefix("sqlite:///")
    if not uri or (file != uri and not os.path.exists(file)):
        names = sorted({run.registered.name for run in graph.runs if run.registered})
        raise LookupError(f"no such model in {graph.lake}; there are: {', '.join(names) or 'none yet'}")
    return uri


def remedy(found: Trace, lake: str) -> list[str]:
    """What to do, in order, so that nothing made from the subject is left."""
    if found.kind not in ("speaker", "file", "clip") or not found.audio:
        return []
    at = f" --lake {shlex.quote(lake)}"
    sources = sorted({part.sources[0] for part in found.audio if part.sources}) or ["the source"]
    files = max(part.files for part in found.audio)
    what = f"{_count(files, 'file')} and their rows, which --json --all names"
    ingest = f"earloom ingest --arch … --data {shlex.quote(sources[0])}{at}"
    steps = [f"take {found.kind} {found.name} out of {', '.join(sources)}: {what}"]
    steps.append(f"{ingest}   makes a new version; unchanged shards are kept")
    heard = {(model.arch, model.name) for model in found.models if model.clips}
    judged = {(model.arch, model.name) for model in found.models} - heard
    steps += [f"retrain {name}: earloom run --arch {arch} name={name} …{at}" for arch, name in sorted(heard)]
    steps += [f"evaluate and register {name} again: it was only judged by them" for _, name in sorted(judged)]
    steps += [f"remove {url}" for url in leftovers(found, lake)]
    return [*steps, f"earloom cache prune --unreachable --yes{at}   removes the caches of the removed versions"]


def leftovers(found: Trace, lake: str) -> list[str]:
    """URLs of what holds the subject, caches aside; the reports and answers of a run quote its clips."""
    books = [storage.join(lake, "units", name) for name in found.codebooks]
    books += [storage.join(lake, "projections", name) for name in found.projections]
    stages = [part.url for part in found.stages if part.clips]
    return [*(part.url for part in found.audio), *books, *stages, *(part.url for part in found.runs)]


def as_json(found: Trace, lake: str) -> str:
    """For programs; `remove` lists the folders that hold the subject."""
    told: dict[str, Any] = found.model_dump(mode="json")
    told["gaps"] = [gap._asdict() for gap in found.gaps]
    forward_only = found.kind in ("speaker", "file", "clip")
    told |= {"closed": not found.gaps, "remedy": remedy(found, lake)}
    told["remove"] = [*leftovers(found, lake), *(part.url for part in found.caches)] if forward_only else []
    return json.dumps(told, ensure_ascii=False, indent=2)


# ---- for people -----------------------------------------------------------------------------------------------------


def show(found: Trace, lake: str) -> None:
    """The answer as a tree, gaps last, then what to do."""
    from pipelines.progress import console

    tree = Tree(f"[bold]{found.kind} {escape(found.name)}[/bold]")
    if not any((found.audio, found.caches, found.stages, found.runs, found.models)):
        tree.add("nothing in this lake")
    audio = tree.add(f"audio ({len(found.audio)})") if found.audio else tree
    for part in found.audio:
        _show_audio(audio, part)
    for label, lines in _lines(found).items():
        branch = tree.add(f"{label} ({len(lines)})") if lines else tree
        for line in lines:
            branch.add(line)
    for note in found.notes:
        tree.add(f"[yellow]note[/] {escape(note)}")
    for gap in found.gaps:
        tree.add(f"[red]gap[/] {escape(gap.url)}: {escape(gap.lacks)}")
    console.print(tree, soft_wrap=True)
    steps = remedy(found, lake)
    if steps:
        console.print(f"\n[bold]to remove {found.kind} {escape(found.name)}[/bold]")
    for number, step in enumerate(steps, 1):
        console.print(f"  {number}. {escape(step)}", soft_wrap=True)


def _lines(found: Trace) -> dict[str, list[str]]:
    """What came of the audio, by kind."""
    caches = [f"{escape(one.encoder)}  {escape(one.place)}{_state(one.state)}" for one in found.caches]
    fitted = [f"units/{name}  codebook" for name in found.codebooks]
    fitted += [f"projections/{name}  principal components" for name in found.projections]
    heard = (lambda clips: "") if found.kind == "model" else _heard  # a model has heard all of its audio
    stages = [
        f"{escape(made.arch)}/{escape(made.name)}{heard(made.clips)}{_state('' if made.finished else 'unfinished')}"
        for made in found.stages
    ]
    runs = [f"{escape(made.arch)}/{escape(made.name)}{heard(made.clips)}" for made in found.runs]
    models = [f"[bold]{one.name}/{one.version}[/bold] @{one.alias}{heard(one.clips)}" for one in found.models]
    return {
        "feature caches": caches,
        "fitted on features": fitted,
        "training stages": stages,
        "runs": runs,
        "registered versions": models,
        "pretrained weights": [f"{escape(name)}  {sha[:12]}" for name, sha in found.weights.items()],
    }


def _show_audio(tree: Tree, part: AudioPart) -> None:
    splits = ", ".join(f"{count:,} {name}" for name, count in part.splits.items())
    line = f"{part.dataset}/{part.version}  {_count(part.clips, 'clip')} ({splits or 'none'}), {part.seconds:,.1f} s"
    line += f", {_count(len(part.shards), 'shard')}"
    line += f", {part.dropped} more in shards, dropped from the index" if part.dropped else ""
    branch = tree.add(escape(line) + ("" if part.finished else "  [yellow]unfinished[/]"))
    if part.sources:
        licences = ", ".join(f"{name} ({count:,})" for name, count in part.licences.items()) or "not stated"
        branch.add(escape(f"from {', '.join(part.sources)}; licences of all its clips: {licences}"))
    files = branch.add(_count(part.files, "source file"))
    for file in part.first_files:
        files.add(escape(f"{file.name}  {file.digest[:16]}"))
    if part.files > len(part.first_files):
        files.add(f"and {part.files - len(part.first_files):,} more")


def _heard(clips: int) -> str:
    return f"  trained on {_count(clips, 'clip')}" if clips else "  [dim]not trained on them[/]"


def _state(state: str) -> str:
    return "" if state in ("", "finished") else f"  [yellow]{state}[/]"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
