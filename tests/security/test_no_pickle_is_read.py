"""Nothing that the chain reads is unpickled: from raw audio to the answer of the registered model, in one process.

The stages' own functions and those of their workers run here, without Ray and Prefect: between its own processes Ray
sends pickles (cloudpickle) over a socket that only they reach, which is no reading of files and is not judged here.
While they run, every way to unpickle raises. What calls it by another name, or from C, is caught by the audit event
`pickle.find_class`, which Python raises whenever a pickle names a class or function, so before it could run any.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pandas  # noqa: F401  # pyarrow imports it in the middle; it makes an Unpickler of its own then
import pytest
import torch
from safetensors.torch import save_file

from infra.environment import prepare
from tests.direct import in_this_process, without_ray

prepare()
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
WORDS = {"per_shard": 16, "eval_clips": 4, "baseline_clips": 1, "cpus": 1, "dataset": "spoken"}
_watching: list[str] | None = None


class Unpickled(AssertionError):
    """Something was about to be unpickled."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching is not None and event == "pickle.find_class":
        _watching.append(f"{arguments[0]}.{arguments[1]}")
        raise Unpickled(_watching[-1])


sys.addaudithook(_audit)  # cannot be taken away again; it does nothing while nobody watches


@contextmanager
def no_pickle(patched: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Within it whoever unpickles gets `Unpickled`; gives what was tried, in case somebody swallowed that."""
    global _watching
    tried: list[str] = []

    def refuse(name: str) -> Callable[..., Any]:
        def called(*_: Any, **__: Any) -> Any:
            tried.append(name)
            raise Unpickled(name)

        return called

    for module in (pickle, sys.modules["_pickle"], cloudpickle, cloudpickle.cloudpickle):
        for name in ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"):
            if hasattr(module, name):
                patched.setattr(module, name, refuse(f"{module.__name__}.{name}"))
    load, npload = torch.load, np.load

    def only_weights(*args: Any, **named: Any) -> Any:
        return load(*args, **named) if named.get("weights_only") is True else refuse("torch.load")()

    def only_arrays(*args: Any, **named: Any) -> Any:
        return refuse("numpy.load")() if named.get("allow_pickle") else npload(*args, **named)

    patched.setattr(torch, "load", only_weights)
    patched.setattr(np, "load", only_arrays)
    _watching = tried
    try:
        yield tried
    finally:
        _watching = None


def test_the_guard_sees_a_pickle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data, loads, unpickler = pickle.dumps(Path("x")), pickle.loads, pickle.Unpickler
    torch.save({"x": Path("x")}, tmp_path / "x.pt")
    with monkeypatch.context() as patched, no_pickle(patched) as tried:
        for attempt in (
            lambda: pickle.loads(data),  # noqa: S301
            lambda: loads(data),  # a name that was taken before
            lambda: unpickler(io.BytesIO(data)).load(),
            lambda: cloudpickle.loads(data),
            lambda: torch.load(tmp_path / "x.pt"),
            lambda: np.load(tmp_path / "x.pt", allow_pickle=True),
        ):
            with pytest.raises(Unpickled):
                attempt()
    assert len(tried) == 6
    assert loads(data) == Path("x")


def test_the_chain_and_the_answer_of_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from components.corpus.speak import speak_corpus
    from pipelines import cache, evaluate, ingest, register, train
    from pipelines.listening import listen
    from pipelines.locate import Workspace
    from pipelines.overrides import run_config

    data = tmp_path / "spoken"
    speak_corpus(data, 40)
    steps = {f"recipe.stages.{stage}.max_steps": 2 for stage in ("adaptor", "lora")}
    given = {"arch": "funasr_llm", "data": str(data), "lake": str(tmp_path / "lake"), "preset": "tiny"}
    config = run_config(given | WORDS | steps)
    with monkeypatch.context() as patched, without_ray(in_this_process), no_pickle(patched) as tried:
        work = Workspace(config)
        for stage in (
            ingest.ingest_audio,
            cache.cache_features,
            train.train_stages,
            evaluate.evaluate_model,
            register.register_model,
        ):
            stage.fn(work)
        clip = sorted((data / "audio").glob("test-*"))[0]
        said = listen("funasr_llm-spoken@candidate", str(clip), None, work.tracking_uri)
        again = {stage.fn(Workspace(config)).state for stage in (ingest.ingest_audio, cache.cache_features)}
    assert tried == []
    assert isinstance(said, str)
    assert again == {"up to date"}


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_an_official_checkpoint(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from models.architectures import load
    from pipelines.importing import import_checkpoint

    sizes = {"linear1.weight": (48, 64), "linear1.bias": (48,), "linear2.weight": (32, 48), "linear2.bias": (32,)}
    tensors = {f"audio_adaptor.{name}": torch.full(size, 0.25) for name, size in sizes.items()}
    official = tmp_path / f"model.{kind}"
    save_file(tensors, official) if kind == "safetensors" else torch.save({"state_dict": tensors}, official)
    with monkeypatch.context() as patched, no_pickle(patched) as tried:
        import_checkpoint("funasr_llm", str(official), str(tmp_path / "out"), preset="tiny")
        model = load("funasr_llm").from_pretrained(tmp_path / "out")
    assert tried == []
    assert bool((model.connector.linear2.weight == 0.25).all())


class _Runs:
    """What a hostile checkpoint holds: a call that is made when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (self.mark,)  # type: ignore[return-value]


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.importing import import_checkpoint

    mark = tmp_path / "ran"
    torch.save({"state_dict": {"audio_adaptor.linear1.bias": torch.zeros(48)}, "x": _Runs(mark)}, tmp_path / "model.pt")
    with monkeypatch.context() as patched, no_pickle(patched) as tried, pytest.raises(ValueError, match="not opened"):
        import_checkpoint("funasr_llm", str(tmp_path / "model.pt"), str(tmp_path / "out"), preset="tiny")
    assert tried == []
    assert not mark.exists()
    torch.load(tmp_path / "model.pt", weights_only=False)  # what would have happened
    assert mark.exists()
