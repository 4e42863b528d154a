"""Files that others publish: read without running what is in them, or refused by name."""

from __future__ import annotations

import json
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.statefiles import read_state


class Trap:
    """Unpickled by a careless reader, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    torch.save({"model": {"ln_audio.bias": torch.ones(24), "x": trap}}, tmp_path / "trap.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(trap, protocol=2))
    with pytest.raises(
        ValueError, match=r"trap\.pth holds more than tensors and plain values .*eval.* state dict alone"
    ):
        read_state(tmp_path / "trap.pth", ("model",))
    with pytest.raises(ValueError, match=r"plain\.pkl"):
        read_state(tmp_path / "plain.pkl")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("file", ["empty.pth", "garbage.bin", "cut.pth", "cut.safetensors"])
def test_damaged_files_are_named(tmp_path: Path, file: str) -> None:
    path = tmp_path / file
    state = {"a": torch.ones(100)}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({"model": state}, path)
    kept = {"empty": b"", "garbage": b"\x00garbage" * 9, "cut": path.read_bytes()[:-200]}[path.stem]
    path.write_bytes(kept)
    with pytest.raises(ValueError, match=rf"{path.name} is .*get it again"):
        read_state(path, ("model",))


def test_another_kind_of_file_is_told_from_the_official_one(tmp_path: Path) -> None:
    state = {"a": torch.ones(2)}
    torch.save({"weights": state, "epoch": 1}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"has no 'model' with tensors, it holds 'weights', 'epoch'; is it the"):
        read_state(tmp_path / "other.pth", ("model",))
    with pytest.raises(ValueError, match=r"holds 'weights', 'epoch' where tensors should be"):
        read_state(tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="a list where tensors should be"):
        read_state(tmp_path / "list.pth")
    torch.save(state, tmp_path / "bare.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for file in ("bare.pth", "old.pth"):
        assert read_state(tmp_path / file, ("model",))["a"].tolist() == [1, 1]
    with pytest.raises(FileNotFoundError, match=r"there is no .*gone\.pth; download"):
        read_state(tmp_path / "gone.pth")


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_shards_are_read_by_their_index(tmp_path: Path, end: str) -> None:
    parts = [{"a": torch.randn(2, 3), "b": torch.randn(4)}, {"c": torch.randn(5)}]
    whole = parts[0] | parts[1]
    stem = "model" if end == "safetensors" else "pytorch_model"
    index = tmp_path / f"{stem}.{end}.index.json"
    files = [f"{stem}-0000{i}-of-00002.{end}" for i in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        save_file(part, tmp_path / file) if end == "safetensors" else torch.save(part, tmp_path / file)
    index.write_text(json.dumps({"weight_map": {n: f for f, p in zip(files, parts, strict=True) for n in p}}))
    read = read_state(tmp_path, ("model",))
    assert read.keys() == whole.keys() and all(torch.equal(read[name], whole[name]) for name in whole)
    assert all(value.is_meta for value in read_state(tmp_path, device="meta").values())
    (tmp_path / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {files[1]}"):
        read_state(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": f"../{files[0]}"}}))
    with pytest.raises(ValueError, match="outside its folder"):
        read_state(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="is no index of shards"):
        read_state(tmp_path)


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has none of .*adapter_model\.safetensors.*give the file itself"):
        read_state(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert read_state(tmp_path)["a"].tolist() == [0]
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert read_state(tmp_path)["a"].tolist() == [1]


def test_what_training_leaves_beside_the_tensors_is_no_obstacle(tmp_path: Path) -> None:
    """fairseq's arguments, an optimiser's state, plain values between the tensors."""
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 3e-5, "betas": (0.9, 0.999)}]}
    torch.save(
        {"args": Namespace(lr=1), "optimizer": optimizer, "net": {"model": {"a": torch.ones(2).half(), "version": 3}}},
        tmp_path / "fairseq.pt",
    )
    for device in ("cpu", "meta"):
        state = read_state(tmp_path / "fairseq.pt", ("net", "model"), device)  # type: ignore[arg-type]
        assert {name: (value.shape, value.dtype, value.device.type) for name, value in state.items()} == {
            "a": ((2,), torch.float16, device)
        }
