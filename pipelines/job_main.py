"""Inside a Ray job: run one stage with the settings that lie in the lake, and leave there what came of it.

    python -m pipelines.job_main train s3://bucket/lake/jobs/earloom-train-0123456789abcdef-1

The entry point names only that folder, for the dashboard shows it to everybody.
"""

from __future__ import annotations

import sys
from typing import Any

SETTINGS, RESULTS, SHOWN = "settings.json", "results.json", "shown.json"


def main(stage: str, folder: str) -> int:
    """Exit status of the job: 0, or 1 with the reason in `results.json` and on the last line of the log."""
    from infra.environment import prepare

    prepare()
    from infra import storage

    results = storage.join(folder, RESULTS)
    try:
        storage.remove_tree(results)  # of a job with this id on a cluster that is gone
        settings = _settings(folder)
        storage.write_json(results, _run(stage, settings))
    except (ValueError, LookupError, OSError, RuntimeError) as error:
        from infra.stores import shown

        reason = shown(str(error.args[0] if isinstance(error, LookupError) and error.args else error))
        print(f"error: {reason}", file=sys.stderr, flush=True)
        try:
            storage.write_json(results, {"error": reason})
        except OSError as second:
            print(f"error: {second}", file=sys.stderr, flush=True)
        return 1
    return 0


def _settings(folder: str) -> dict[str, Any]:
    from infra import storage

    url = storage.join(folder, SETTINGS)
    if not storage.exists(url):
        raise RuntimeError(
            f"there is no {url} where the job runs: the lake has to be where every node reaches it, as "
            "s3://bucket/lake or a folder that all of them share"
        )
    found: dict[str, Any] = storage.read_json(url)
    return found


def _run(stage: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The stage's reports, and what tells later whether they still hold: the data's version, the artefacts' digests."""
    from pipelines import server

    server.wake()
    import importlib

    from infra import cluster, storage
    from pipelines.config import RunConfig
    from pipelines.workspace import shared

    config = RunConfig.model_validate(settings)
    flow = getattr(importlib.import_module(f"pipelines.{stage}"), stage)
    with shared(config) as work:
        try:
            with server.reached():
                made = flow(config)
        finally:
            cluster.disconnect()
        reports = made if isinstance(made, list) else [made]
        return {
            "reports": [report.model_dump(mode="json") for report in reports],
            "version": work.version,
            "artefacts": {url: storage.fingerprint(url) for url in artefacts(stage, work)},
            # Where features are computed is part of it, and only this process knows.
            "base": work.base_digest if stage in ("train", "evaluate", "register") else None,
        }


def artefacts(stage: str, work: Any) -> list[str]:
    """URLs of the files that say a stage is complete."""
    from infra import storage
    from pipelines.evaluate import SCORES
    from pipelines.register import REGISTERED

    if stage == "ingest":
        roots = [work.audio_root]
    elif stage == "cache":
        roots = list(dict.fromkeys([*work.feature_roots.values(), *work.model_inputs.values()])) if work.cached else []
    elif stage == "train":
        roots = [url for _, url in work.stages]
    else:
        name = f"evaluation/{SCORES}" if stage == "evaluate" else REGISTERED
        return [storage.join(work.run_root, name)]
    return [storage.join(root, "manifest.json") for root in roots]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
