"""The chain as a whole, on tiny models: real Prefect server, real Ray, real MLflow, audio from eSpeak NG."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import pytest
import soundfile

from components.curriculum.tasks import select
from components.shards.index import read_rows
from models.architectures import names
from pipelines.config import RunConfig
from tests.pipelines.conftest import earloom, hashes, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STAGES = {"ingest", "cache", "evaluate", "register"}
TWO_WORKERS = ("salmonn", "qwen_audio")  # from features, and with an encoder that learns


def config(arch: str, data: Path, lake: Path, **more: Any) -> RunConfig:
    return RunConfig(arch=arch, data=str(data), lake=str(lake), preset="tiny", per_shard=8, **more)


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared") / "lake"


@pytest.fixture
def ray_stays(arch: str) -> Iterator[bool]:
    """Ray and its warm actors go from one architecture to the next, for a start takes ten seconds; the last ends it."""
    stays = arch != names()[-1]
    with patch("infra.cluster.disconnect") if stays else nullcontext():
        yield stays


@pytest.mark.parametrize("arch", names())
def test_chain_ends_registered_reloads_and_answers(
    arch: str, corpus: Path, lake: Path, with_server: str, ray_stays: bool
) -> None:
    """Every architecture; the audio is ingested once, and what was done is not done again."""
    import ray
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    from components.registry.evaluation_record import read_evaluation
    from components.registry.mlflow_registry import find
    from models.contract import SpeechLLM
    from pipelines.chain import chain
    from pipelines.listening import listen
    from pipelines.locate import Workspace
    from pipelines.tracing import trace

    settings = config(arch, corpus, lake, workers=2 if arch in TWO_WORKERS else 1, cpus=2)
    result = chain(settings)
    made = {report.stage: report for report in result.reports}
    assert set(made) >= STAGES
    recipe = Workspace(settings).preset.recipe
    assert [r.stage for r in result.reports if r.stage.startswith("train")] == [
        f"train {stage.name}" for stage in recipe.stages
    ]
    rows = read_rows(Workspace(settings).audio_root)
    taught = {f"train {stage.name}": bool(select(rows, stage.tasks)) for stage in recipe.stages}
    for report in result.reports:
        if report.stage in taught:
            assert (report.done > 0) == taught[report.stage], report

    found = find(f"{arch}-{corpus.name}@candidate", Workspace(settings).tracking_uri)
    folder = Path(found.url)
    assert found.version == "1"
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "recipe.yaml",
        "lineage.json",
        "metrics.json",
        "README.md",
    } <= {p.name for p in folder.iterdir()}
    assert AutoConfig.from_pretrained(folder).architecture == arch
    reloaded = AutoModel.from_pretrained(folder)
    assert isinstance(reloaded, SpeechLLM)
    assert len(AutoTokenizer.from_pretrained(folder)) == len(reloaded.llm.get_input_embeddings().weight)
    lineage = json.loads((folder / "lineage.json").read_text())
    assert (
        lineage["data"][0]["digest"]
        == json.loads((lake / "audio" / corpus.name / Workspace(settings).version / "manifest.json").read_text())[
            "digest"
        ]
    )

    record = read_evaluation(found.url)
    assert record is not None
    assert record.data.digest == lineage["data"][0]["digest"]
    part, metric = record.find(record.main)
    assert part.rate(metric) == pytest.approx(json.loads((folder / "metrics.json").read_text())[record.main])

    origin = trace(str(lake), "model", f"{arch}-{corpus.name}@candidate")
    assert origin.gaps == ()
    assert sum(part.clips for part in origin.audio) == 40

    clip = next((corpus / "audio").iterdir())
    assert isinstance(listen(f"{arch}-{corpus.name}", str(clip), None, Workspace(settings).tracking_uri), str)
    page = Path(result.report_url).read_text()
    assert page.count("<svg") >= 3
    assert "http://" not in page.replace("http://www.w3.org", "")

    again = chain(settings)
    assert {report.state for report in again.reports} == {"up to date"}
    assert ray.is_initialized() == ray_stays


def test_shards_open_with_plain_webdataset(corpus: Path, lake: Path) -> None:
    import webdataset

    root = next((lake / "audio" / corpus.name).glob("*/manifest.json")).parent
    urls = sorted(str(p) for p in root.glob("shard-*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 40
    for sample in samples:
        record = json.loads(sample["json"])
        audio, rate = soundfile.read(__import__("io").BytesIO(sample["flac"]))
        assert (rate, audio.ndim, len(audio)) == (16_000, 1, record["samples"])


def killed_when(process: Any, ready: Any) -> None:
    """kill -9 of the whole process tree as soon as `ready()`; the process must not have ended before."""
    wait_for(process, ready)
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in tree:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait(30)


def test_killed_in_every_stage_the_same_command_ends_with_the_same_bytes(
    corpus: Path, tmp_path: Path, prefect_url: str
) -> None:
    lake, clean = tmp_path / "lake", tmp_path / "clean"
    words = (
        "run",
        "--arch",
        "funasr_llm",
        "--data",
        str(corpus),
        "preset=tiny",
        "per_shard=4",
        "recipe.stages.lora.max_steps=120",
        "recipe.stages.lora.epochs=100",
        "recipe.stages.lora.checkpoint_every=5",
    )
    points = {
        "ingest": lambda: any(lake.glob("audio/*/*/parts/*.json")) and not any(lake.glob("audio/*/*/manifest.json")),
        "cache": lambda: (
            any(lake.glob("features/*/*/*/parts/*.json")) and not any(lake.glob("features/*/*/*/manifest.json"))
        ),
        "train": lambda: any(lake.glob("runs/*/stages/2-*/checkpoints/*/state.json")),
        "evaluate": lambda: any(lake.glob("runs/*/stages/2-*/manifest.json")),
        "register": lambda: any(lake.glob("runs/*/*/evaluation/scores.json")),
    }
    for stage, ready in points.items():
        process = earloom(*words, lake=lake, server=prefect_url)
        killed_when(process, ready)
        assert not any(lake.glob("runs/*/*/registered.json")), stage
    last = earloom(*words, lake=lake, server=prefect_url)
    output, _ = last.communicate(timeout=600)
    assert last.returncode == 0, output
    straight = earloom(*words, lake=clean, server=prefect_url)
    assert straight.wait(600) == 0
    for pattern, count in (
        ("audio/*/*/shard-*.tar", 10),
        ("audio/*/*/samples.parquet", 1),
        ("features/*/*/*/shard-*.tar", 10),
        ("runs/*/stages/*/weights.safetensors", 2),
    ):
        assert hashes(lake, pattern) == hashes(clean, pattern)
        assert len(hashes(lake, pattern)) == count
    assert "resumed" in output or "up to date" in output


def test_bad_files_are_set_aside_or_marked_and_the_run_ends(corpus: Path, tmp_path: Path, prefect_url: str) -> None:
    data = tmp_path / "data"
    shutil.copytree(corpus, data / "good")
    bad = data / "bad"
    bad.mkdir()
    (bad / "empty.wav").write_bytes(b"")
    (bad / "page.flac").write_text("<!DOCTYPE html><html>404</html>")
    soundfile.write(bad / "short.wav", np.zeros(10), 16_000)
    soundfile.write(bad / "silent.wav", np.zeros(32_000), 16_000)
    soundfile.write(bad / "phase.wav", np.outer(np.sin(np.arange(16_000) / 9), [0.5, -0.5]), 16_000)
    lines = [
        json.dumps({"audio": name, "text": "nothing"})
        for name in ("empty.wav", "page.flac", "short.wav", "silent.wav", "phase.wav", "missing.wav")
    ]
    (bad / "manifest.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n")
    process = earloom(
        "ingest", "--arch", "funasr_llm", "--data", str(data), "preset=tiny", lake=tmp_path / "lake", server=prefect_url
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    root = next((tmp_path / "lake" / "audio").glob("*/*/manifest.json")).parent
    rejects = [json.loads(line) for line in (root / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == 5
    assert all(len(reject["reason"]) > 10 for reject in rejects)
    assert json.loads((root / "manifest.json").read_text())["samples"] == 42
    assert "5 set aside" in output


def test_shared_bad_files_never_stop_a_run(shared_data: Path, tmp_path: Path, prefect_url: str) -> None:
    data = tmp_path / "data"
    shutil.copytree(shared_data / "bad", data / "bad")
    shutil.copytree(shared_data / "ljspeech_mini", data / "ljspeech_mini")
    process = earloom(
        "ingest", "--arch", "funasr_llm", "--data", str(data), "preset=tiny", lake=tmp_path / "lake", server=prefect_url
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    root = next((tmp_path / "lake" / "audio").glob("*/*/manifest.json")).parent
    samples = json.loads((root / "manifest.json").read_text())["samples"]
    rejects = len((root / "rejects.jsonl").read_text().splitlines())
    assert samples + rejects == 8 + 31


def test_without_a_server_the_same_command_is_up_to_date(corpus: Path, lake: Path, tmp_path: Path) -> None:
    """The ephemeral API: no server to start first, no traceback at the end."""
    process = earloom(
        "run",
        "--arch",
        "funasr_llm",
        "--data",
        str(corpus),
        "preset=tiny",
        "per_shard=8",
        lake=lake,
        PREFECT_HOME=str(tmp_path / "home"),
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "all up to date" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "--arch", "funasr", "--data", "."), "did you mean 'funasr_llm'"),
        (("run", "--arch", "funasr_llm", "--data", "nowhere"), "nowhere"),
        (("run", "--arch", "funasr_llm", "--data", ".", "wrokers=2"), "did you mean 'workers'"),
        (("listen", "nobody", "x.wav"), "no model named 'nobody'"),
    ],
)
def test_wrong_words_are_one_line_with_a_remedy(
    words: tuple[str, ...], said: str, tmp_path: Path, prefect_url: str
) -> None:
    process = earloom(*words, lake=tmp_path / "lake", server=prefect_url)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said in output
    assert "Traceback" not in output
