"""A model that leaves the machine: complete, checked, loadable, and silent about where it was made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.digest import digest, digest_file
from components.evaluation.metrics import flat, score, score_before
from components.registry.card import CardData, model_card
from components.registry.evaluation_record import EVALUATION, evaluation_record
from components.registry.export import refuse_place
from components.registry.licences import forbids, hub_name, licences_text, shares, warnings
from components.registry.lineage import lineage
from components.registry.mlflow_registry import register
from components.registry.records import Link
from components.registry.scrub import Scrubber, header_of, refuse_private
from components.schema import AudioManifest
from infra import storage
from tests.registry.hub_server import TOKEN, Hub, running
from tests.registry.promotion_helpers import answers

REPOSITORY = Path(__file__).resolve().parents[2]
HOME = "/home/ada-lovelace"
AUDIO = AudioManifest(
    dataset="talk", version="0123456789ab", digest="a" * 64, shards=(), samples=100, seconds=720.0, rejected=0,
    splits={"train": 90, "test": 10}, config={}, sources=(f"{HOME}/secret_project/talk", "a | book"),
    licences={"CC-BY-4.0": 70, "CC BY-NC-ND 4.0": 20, "unknown": 4},
)  # fmt: skip

# ---- licences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("licence", "said"),
    [
        ("CC-BY-4.0", []),
        ("CC0-1.0", []),
        ("MIT", []),
        ("Licence of the band", []),  # no NC, ND or SA inside of words
        ("CC BY-NC-ND 4.0", ["no commercial use", "no derived works"]),
        ("cc-by-sa-4.0", ["derived works under the same licence"]),
        ("for research use only", ["no commercial use"]),
        ("GPL-3.0", ["derived works under the same licence"]),
        ("unknown", ["unknown"]),
        ("", ["unknown"]),
    ],
)
def test_what_a_licence_forbids_is_read_from_its_name(licence: str, said: list[str]) -> None:
    assert forbids(licence) == said


def test_every_clip_is_counted_and_what_is_unknown_or_forbidden_comes_first() -> None:
    data = shares(lineage([AUDIO], [], {}))
    assert {one.licence: (one.clips, one.share) for one in data} == {
        "CC-BY-4.0": (70, 0.7), "CC BY-NC-ND 4.0": (20, 0.2), "unknown": (10, 0.1),  # 4 said so, 6 counted nowhere
    }  # fmt: skip
    weights = ["earloom/smollm2-135m-instruct", "m-a-p/MERT-v1-330M", "somebody/model"]
    said = warnings(data, weights)
    assert said[0] == (
        "the licence of 10 of 100 clips (10.0%) of talk/0123456789ab is unknown: find it out before you publish"
    )
    assert "somebody/model is not known here" in said[1]
    assert any("20 of 100 clips (20.0%)" in text and "no commercial use" in text for text in said)
    assert any("MERT" in text and "no commercial use" in text for text in said)
    text = licences_text(data, weights, {"commit": "c" * 40, "changed": True})
    assert "| talk | `0123456789ab` | CC BY-NC-ND 4.0 | 20 | 20.0% | no commercial use, no derived works |" in text
    assert "has 100 clips, 0.20 hours" in text
    assert f"at `{'c' * 40}`, with changes" in text
    assert hub_name("earloom/smollm2-135m-instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_name("BEATs.pt") is None


# ---- what must not go out -------------------------------------------------------------------------------------------


def test_paths_and_private_stores_become_their_last_name_everywhere() -> None:
    scrubber = Scrubber([HOME, "ada@lab"])
    value = {
        "stages": ["s3://internal-bucket/lake/runs/x/stages/1-adapt-aa", f"file://{HOME}/lake/stages/2-lora-bb/"],
        "weights": {f"{HOME}/BEATs_iter3.pt": "d" * 64, "openai/whisper-large-v2": "e" * 64},
        "note": f"made by ada@lab in {HOME}/lake",
        "sources": ["https://me:tiger@host/data?sig=x", "/data", "~/talks/mine"],
        "kept": ["asr/test/wer", "and/or", "/think", "password: {{ it }}", "https://arxiv.org/abs/1", 3, None, True],
    }
    assert scrubber.value(value) == {
        "stages": ["1-adapt-aa", "2-lora-bb"],
        "weights": {"BEATs_iter3.pt": "d" * 64, "openai/whisper-large-v2": "e" * 64},
        "note": "made by … in lake",
        "sources": ["https://***@host/data?***", "/data", "mine"],
        "kept": ["asr/test/wer", "and/or", "/think", "password: {{ it }}", "https://arxiv.org/abs/1", 3, None, True],
    }
    assert scrubber.prose(f"from `{HOME}/BEATs\\_iter3.pt`") == "from `BEATs\\_iter3.pt`"


def test_what_cannot_be_taken_out_stops_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "chat_template.jinja"
    file.write_text(f"{{# {HOME}/notes #}}")
    with pytest.raises(ValueError, match=r"chat_template\.jinja tells /home/ada-lovelace"):
        refuse_private(tmp_path, [HOME])
    file.write_text(f"{HOME}-2 is another folder")
    refuse_private(tmp_path, [HOME])
    monkeypatch.setenv("MY_SERVICE_TOKEN", "planted-secret-value")
    for text in ("x planted-secret-value y", "hf_" + "a" * 30, "http://me:tiger@host/x"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"tells a (secret|login)") as told:
            refuse_private(tmp_path, [HOME])
        assert "planted" not in str(told.value)


def test_only_safetensors_without_optimizer_states_go_out(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"layer.weight": np.zeros(2)}, tmp_path / "good.safetensors")
    assert "layer.weight" in header_of(tmp_path / "good.safetensors")
    save_file({"exp_avg.layer.weight": np.zeros(2)}, tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match="state of an optimizer"):
        header_of(tmp_path / "state.safetensors")
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04\x95" + b"0" * 50)
    with pytest.raises(ValueError, match="is no safetensors file"):
        header_of(tmp_path / "pickle.safetensors")


def test_a_destination_in_the_lake_or_in_use_is_refused(tmp_path: Path) -> None:
    lake, other = tmp_path / "lake", tmp_path / "other"
    (lake / "runs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(lake)
    for inside in (lake, lake / "runs" / "x", tmp_path, tmp_path / "link" / "x", tmp_path / "other" / ".." / "lake"):
        with pytest.raises(ValueError, match="is in the lake, or around it"):
            refuse_place(str(inside), str(lake), True)
    with pytest.raises(ValueError, match="is in the lake"):
        refuse_place("s3://bucket/lake/out", "s3://bucket/lake", True)
    refuse_place(str(other), str(lake), False)
    other.mkdir()
    refuse_place(str(other), str(lake), False)
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty"):
        refuse_place(str(other), str(lake), False)
    with pytest.raises(ValueError, match="did not export"):
        refuse_place(str(other), str(lake), True)
    (other / "manifest.json").write_text('{"exported": {}}')
    refuse_place(str(other), str(lake), True)
    with pytest.raises(ValueError, match="is a file"):
        refuse_place(str(other / "thesis.txt"), str(lake), True)


# ---- a real model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A lake with a real tiny FunASR-LLM as the chain registers it; returns the lake and the model's folder."""
    from models.architectures import load
    from models.pretrained import load_tokenizer

    lake = tmp_path_factory.mktemp("work") / "lake"
    folder = lake / "runs/funasr_llm/talk-r1/model"
    folder.mkdir(parents=True)
    architecture = load("funasr_llm")
    preset = architecture.preset("tiny")
    tokenizer = load_tokenizer(preset.backbone.tokenizer)
    tokenizer.add_tokens(architecture.added_tokens(preset))
    model = architecture.build(preset, tokenizer, seed=3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for role in preset.encoders:
        storage.write_json(str(folder / f"preprocessor_{role}.json"), model.encoder(role).preprocessing())
    recipe = preset.model_dump(mode="json") | {"note": f"{HOME}/recipes/mine.yaml"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    weights = {f"{HOME}/BEATs_iter3.pt": "d" * 64, "earloom/moonshine-tiny-en": "e" * 64}
    stages = {"stages": [str(lake / "runs/funasr_llm/stages/1-adaptor-aa")]}
    origin = lineage([AUDIO], [], recipe, weights, stages)
    storage.write_json(str(folder / "lineage.json"), origin)
    rows = answers((1,))
    storage.write_json(str(folder / "metrics.json"), flat(score(rows)))
    record = evaluation_record(Link.model_validate(AUDIO.model_dump()), rows)
    (folder / EVALUATION).write_text(record.model_dump_json())
    data = CardData(
        name="talker", architecture="FunASR-LLM", preset="tiny", about=f"Trained in {lake}.", languages=("en",),
        tasks=("asr",), base_models=tuple(weights),
    )  # fmt: skip
    (folder / "README.md").write_text(model_card(data, [AUDIO], score(rows), score_before(rows), origin))
    files = {path.name: digest_file(path) for path in sorted(folder.iterdir())}
    manifest = {"architecture": "funasr_llm", "files": files}
    storage.write_json(str(folder / "manifest.json"), manifest)
    tags = {"architecture": "funasr_llm", "preset": "tiny"}
    uri = f"sqlite:///{lake}/mlflow.db"
    register(str(folder), "talker", {}, tags, "candidate", uri, folder_digest=digest(manifest))
    return lake, str(folder)


def exported(lake: Path, destination: str, **settings: Any) -> Any:
    from pipelines.exporting import Wishes, export_model

    uri = f"sqlite:///{lake}/mlflow.db"
    return export_model("talker@candidate", "folder", destination, str(lake), uri, Wishes(**settings))


@pytest.mark.slow
def test_the_exported_folder_answers_as_the_registered_one_and_tells_nothing(
    made: tuple[Path, str], tmp_path: Path
) -> None:
    import torch
    from huggingface_hub import ModelCard
    from transformers import AutoTokenizer

    from components.curriculum.tasks import question
    from components.evaluation.answer import answer
    from models.architectures import load
    from models.preset import Preset

    lake, source = made
    place = tmp_path / "out" / "talker"
    done = exported(lake, str(place))
    assert {path.name for path in place.parent.iterdir()} == {"talker"}  # nothing unfinished is left beside it
    listed = json.loads((place / "manifest.json").read_text())
    assert listed["files"] == {p.name: digest_file(p) for p in place.iterdir() if p.name != "manifest.json"}
    assert done.exported.files == listed["files"]
    for name in ("model.safetensors", "config.json", "tokenizer.json", EVALUATION):
        assert (place / name).read_bytes() == (Path(source) / name).read_bytes()

    for path in place.iterdir():
        text = path.read_bytes().decode(errors="replace")
        for private in (HOME, str(lake), str(lake.parent), "secret_project", "ada-lovelace"):
            assert private not in text, (path.name, private)
    assert json.loads((place / "lineage.json").read_text())["stages"] == ["1-adaptor-aa"]

    both = [load("funasr_llm").from_pretrained(folder) for folder in (source, place)]
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (source, place)]
    waveform = torch.sin(torch.arange(24_000) / 7)
    decoding = Preset.model_validate(both[0].config.preset).recipe.decoding
    said = [answer(m, t, waveform, question(None), decoding) for m, t in zip(both, tokenizers, strict=True)]
    assert said[0] == said[1]
    heard = [model.listen([waveform])[0].features for model in both]
    ids = torch.arange(20)[None]
    for role, frames in heard[0].items():
        assert torch.equal(frames, heard[1][role])
    logits = [model.llm(input_ids=ids).logits for model in both]
    assert torch.equal(*logits)
    assert torch.equal(plain_language_model(place)(input_ids=ids).logits, logits[0])

    card = ModelCard.load(place / "README.md")
    assert (card.data.license, card.data.license_link, card.data.language) == ("other", "LICENSES.md", ["en"])
    assert card.data.base_model == ["UsefulSensors/moonshine-tiny"]
    assert card.data.pipeline_tag == "automatic-speech-recognition"
    results = {(one.metric_type, one.dataset_split): one.metric_value for one in card.data.eval_results}
    assert results[("wer", "test")] == 0.62  # one word of 160, in percent
    assert "CC BY-NC-ND 4.0 (20%)" in card.text
    assert "is unknown: find it out before you publish" in card.text
    assert "a | book" not in card.text
    assert done.exported.warnings[0].startswith("the licence of 10 of 100 clips")
    assert (place / "LICENSES.md").read_text().count("no commercial use") == 2

    with pytest.raises(ValueError, match="is not empty"):
        exported(lake, str(place))
    (place / "old.txt").write_text("of an earlier export")
    exported(lake, str(place), overwrite=True, licence="CC-BY-NC-4.0")
    assert not (place / "old.txt").exists()
    assert ModelCard.load(place / "README.md").data.license == "cc-by-nc-4.0"


def plain_language_model(folder: Path) -> Any:
    """The language model of an exported folder without any code of ours, as docs/registry.md says."""
    script = (REPOSITORY / "docs" / "registry.md").read_text()
    lines = script.split("<!-- plain: begin -->", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
    assert "earloom" not in lines.replace('"earloom', "")
    space: dict[str, Any] = {"folder": str(folder)}
    exec(compile(lines, "docs/registry.md", "exec"), space)
    return space["language_model"]


@pytest.mark.slow
def test_an_export_to_a_store_and_one_that_fails_leave_nothing_half_done(
    made: tuple[Path, str], tmp_path: Path
) -> None:
    lake, source = made
    place = f"memory://{tmp_path.name}/talker"
    storage.write_text(storage.join(place, "manifest.json"), '{"exported": {}}')
    storage.write_text(storage.join(place, "older.json"), "{}")
    done = exported(lake, place, overwrite=True)
    assert set(storage.find(place)) == {*done.exported.files, "manifest.json"}

    weights = Path(source) / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    try:
        with pytest.raises(ValueError, match=r"model\.safetensors differs"):
            exported(lake, str(tmp_path / "broken"))
    finally:
        weights.write_bytes(kept)
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def hub() -> Any:
    with running() as started:
        yield started


def hub_environment(hub: Hub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    asked = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(REPOSITORY)}
    return kept | asked | ({"HF_TOKEN": token} if token else {})


@pytest.mark.slow
def test_a_model_arrives_on_the_hub_private_and_whole(made: tuple[Path, str], hub: Hub, tmp_path: Path) -> None:
    lake, source = made
    hub.faults = 1
    command = [sys.executable, "-m", "pipelines.cli", "export", "talker@candidate", "--to", "hub", "ada/talker"]
    command += ["--lake", str(lake), "--message", "the first one"]
    done = subprocess.run(command, env=hub_environment(hub, tmp_path), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert "private" in done.stdout
    assert "is unknown: find it out" in done.stdout
    repository = hub.repositories["ada/talker"]
    assert repository["private"] is True
    assert repository["commits"] == ["the first one"]
    files = repository["branches"]["main"]
    manifest = json.loads(files["manifest.json"])
    import hashlib

    assert {name: hashlib.sha256(files[name]).hexdigest() for name in manifest["files"]} == manifest["files"]
    assert set(files) == {*manifest["files"], "manifest.json"}
    assert files["model.safetensors"] == (Path(source) / "model.safetensors").read_bytes()
    assert hub.faults == 0


@pytest.mark.slow
def test_the_hub_is_not_overwritten_and_not_made_public_by_mistake(
    made: tuple[Path, str], hub: Hub, tmp_path: Path
) -> None:
    """Uploads in one process; what each says is printed."""
    hub.add("ada/open", private=False)
    hub.add("ada/full", private=True, files={"theirs.bin": b"x", "README.md": b"old", ".gitattributes": b""})
    small = tmp_path / "small"
    small.mkdir()
    (small / "config.json").write_text("{}")
    (small / "README.md").write_text("---\nlicense: mit\n---\n# x")
    script = f"""
from pathlib import Path
from components.registry import hub
hub.WAITS = (0.01, 0.01)
def go(*words, **settings):
    try:
        print("ok", hub.upload(Path({str(small)!r}), *words, **settings).public)
    except Exception as error:
        print(type(error).__name__, error)
go("ada/open")
go("ada/open", public=True)
go("ada/full")
go("ada/full", overwrite=True)
go("ada/branch", revision="v2")
go("no-owner")
import os
os.environ["HF_TOKEN"] = "hf_" + "wrong" * 6
go("ada/other")
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
go("ada/other")
import socket, time
silent = socket.create_server(("127.0.0.1", 0))
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{{silent.getsockname()[1]}}"
hub.SILENCE, began = 0.3, time.monotonic()
go("ada/other")
print(time.monotonic() - began)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=hub_environment(hub, tmp_path), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "ada/open is public already: say --public" in lines[0]
    assert lines[1] == "ok True"
    assert "ada/full holds files already (theirs.bin)" in lines[2]
    assert lines[3] == "ok False"
    assert set(hub.repositories["ada/full"]["branches"]["main"]) == {"config.json", "README.md", ".gitattributes"}
    assert lines[4] == "ok False"
    assert set(hub.repositories["ada/branch"]["branches"]["v2"]) == {"config.json", "README.md"}
    assert hub.repositories["ada/branch"]["branches"]["main"] == {}
    assert "name it OWNER/NAME" in lines[5]
    assert lines[6].startswith("PermissionError the hub refuses ada/other (401)")
    assert lines[7].startswith("OSError the hub cannot be reached for ada/other")
    assert lines[8].startswith("OSError the hub cannot be reached for ada/other")  # it takes the call, and says nothing
    assert 0.9 < float(lines[9]) < 10
    assert "hf_" not in done.stdout + done.stderr
