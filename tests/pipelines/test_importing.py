"""`earloom import-checkpoint`: official weights become a folder that loads, or nothing is written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer
from typer.testing import CliRunner

from models.architectures import load
from models.pretrained import load_llm, load_tokenizer
from models.sizes import TINY_LLAMA
from pipelines.cli import app
from pipelines.importing import import_checkpoint


def adaptor(llm: int = 32) -> dict[str, Tensor]:
    """FunASR's adaptor at the tiny preset's sizes: 32 x 2 → 48 → the backbone's width."""
    sizes = {"linear1.weight": (48, 64), "linear1.bias": (48,), "linear2.weight": (llm, 48), "linear2.bias": (llm,)}
    generator = torch.Generator().manual_seed(1)
    return {f"audio_adaptor.{name}": torch.randn(size, generator=generator) for name, size in sizes.items()}


@pytest.fixture
def official(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    torch.save({"state_dict": adaptor(), "epoch": 15}, path)
    return path


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another language model, 48 wide, with a tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("llm48")
    load_llm(None, TINY_LLAMA | {"hidden_size": 48, "intermediate_size": 96}).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


def test_the_folder_holds_the_official_weights(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out" / "mine"
    import_checkpoint("funasr_llm", str(official), str(folder), preset="tiny")
    architecture = load("funasr_llm")
    model = architecture.from_pretrained(folder)
    assert torch.equal(model.connector.linear2.weight, adaptor()["audio_adaptor.linear2.weight"])
    fresh = architecture.build(architecture.preset("tiny"), load_tokenizer("bytes")).state_dict()
    same = [name for name, value in model.state_dict().items() if torch.equal(value, fresh[name])]
    assert set(fresh) - set(same) == {f"connector.linear{i}.{end}" for i in (1, 2) for end in ("weight", "bias")}
    assert AutoTokenizer.from_pretrained(folder)("hey")["input_ids"] == load_tokenizer("bytes")("hey")["input_ids"]
    origin = json.loads((folder / "import.json").read_text())
    assert origin["files"] == {"model.pt": hashlib.sha256(official.read_bytes()).hexdigest()}
    assert (origin["loaded"], origin["parameters"]) == (4, 4_688)
    printed = " ".join(capsys.readouterr().out.split())
    assert "loaded 4 4,688" in printed and "missing 0 unexpected 0 of another shape 0" in printed
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]  # nothing half made is left
    with pytest.raises(ValueError, match="mine is there already; give another place with --to"):
        import_checkpoint("funasr_llm", str(official), str(folder), preset="tiny")


def test_check_writes_nothing_and_builds_nothing(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["import-checkpoint", "funasr_llm", str(official), "--preset", "tiny", "--check"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert list(tmp_path.iterdir()) == [official]
    torch.save({"state_dict": adaptor() | {"audio_adaptor.linear2.bias": torch.ones(5)}}, official)
    with pytest.raises(ValueError, match=r"1 of another shape: connector\.linear2\.bias") as refused:
        import_checkpoint("funasr_llm", str(official), preset="tiny", check=True)
    assert "does not fit FunASR-LLM" in str(refused.value)


def test_published_sizes_are_compared_without_the_pretrained_parts(tmp_path: Path) -> None:
    shapes = {"linear1.weight": (2048, 6400), "linear1.bias": (2048,), "linear2.weight": (4096, 2048)}
    state = {f"audio_adaptor.{name}": torch.zeros(1).expand(size) for name, size in shapes.items()}
    torch.save({"state_dict": state | {"audio_adaptor.linear2.bias": torch.zeros(4096)}}, tmp_path / "model.pt")
    import_checkpoint("funasr_llm", str(tmp_path / "model.pt"), check=True)


@pytest.mark.parametrize("check", [True, False])
def test_another_backbone_brings_its_own_sizes(official: Path, backbone: Path, tmp_path: Path, check: bool) -> None:
    to = tmp_path / "wide"
    given = {"to": str(to), "preset": "tiny", "backbone": str(backbone), "check": check}
    with pytest.raises(ValueError, match=r"connector\.linear2\.weight \(32, 48\) for ours of \(48, 48\)"):
        import_checkpoint("funasr_llm", str(official), **given)  # type: ignore[arg-type]
    assert not to.exists()
    torch.save({"state_dict": adaptor(48)}, official)
    import_checkpoint("funasr_llm", str(official), **given)  # type: ignore[arg-type]
    assert to.exists() != check
    if not check:
        model = load("funasr_llm").from_pretrained(to)
        assert model.llm.config.hidden_size == 48
        assert torch.equal(model.connector.linear2.bias, adaptor(48)["audio_adaptor.linear2.bias"])


def test_settings_change_the_preset(official: Path) -> None:
    with pytest.raises(ValueError, match=r"connector\.linear1\.weight \(48, 64\) for ours of \(48, 96\)"):
        import_checkpoint("funasr_llm", str(official), preset="tiny", settings=["connector.stack=3"], check=True)
    with pytest.raises(ValueError, match=r"no setting 'lora\.rnk'; did you mean 'lora\.rank'"):
        import_checkpoint("funasr_llm", str(official), preset="tiny", settings=["lora.rnk=3"], check=True)


def test_what_is_not_there_is_said_before_anything_is_loaded(official: Path, tmp_path: Path) -> None:
    to = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"speechgpt has no importer.*funasr_llm, .*salmonn"):
        import_checkpoint("speechgpt", str(official), to)
    with pytest.raises(ValueError, match="did you mean 'salmonn'"):
        import_checkpoint("salmon", str(official), to)
    with pytest.raises(ValueError, match="no preset 'papr'; did you mean 'paper'"):
        import_checkpoint("salmonn", str(official), to, preset="papr")
    with pytest.raises(FileNotFoundError, match=r"there is no .*gone\.pth; download the official checkpoint"):
        import_checkpoint("salmonn", str(tmp_path / "gone.pth"), to)
    with pytest.raises(FileNotFoundError, match="cannot read the sizes of the backbone 'nobody/nothing'"):
        import_checkpoint("salmonn", str(official), backbone="nobody/nothing", check=True)


def test_help_has_an_example() -> None:
    done = CliRunner().invoke(app, ["import-checkpoint", "--help"])
    assert "Example: earloom import-checkpoint salmonn salmonn_v1.pth --check" in " ".join(done.output.split())
