"""Settings: dotted words, YAML files, and the nearest right name for a wrong one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from models.architectures import load
from pipelines.overrides import WrongSetting, changed, parse_words, read_recipe_file, run_config

PRESET = load("funasr_llm").preset("tiny")


def test_words_set_run_and_preset() -> None:
    config = run_config(
        {"arch": "funasr_llm", "data": "d"} | parse_words(["workers=2", "recipe.stages.lora.epochs=0.5", "lora.rank=2"])
    )
    assert config.workers == 2
    preset = changed(PRESET, config.set)
    assert preset.recipe.stages[1].epochs == 0.5
    assert preset.lora is not None
    assert preset.lora.rank == 2


def test_settings_of_the_machines_are_nested_and_checked() -> None:
    config = run_config({"arch": "funasr_llm", "data": "d", "compute.parallel": "fsdp", "compute.micro_tokens": 512})
    assert (config.compute.parallel, config.compute.micro_tokens, config.set) == ("fsdp", 512, {})
    with pytest.raises(WrongSetting, match=r"did you mean 'compute.micro_tokens'"):
        run_config({"arch": "funasr_llm", "data": "d", "compute.micro_token": 512})
    with pytest.raises(WrongSetting, match=r"compute.parallel: .*'ddp' or 'fsdp' \(got 'dp'\)"):
        run_config({"arch": "funasr_llm", "data": "d", "compute.parallel": "dp"})


def test_a_curriculum_can_be_taken_out_or_turned_round_for_all_stages() -> None:
    easy_first = changed(PRESET, {"recipe.stages.lora.curriculum.order": "text"})
    none = run_config({"arch": "funasr_llm", "data": "d"} | parse_words(["curriculum=none"]))
    assert {s.curriculum.order for s in changed(easy_first, none.set).recipe.stages} == {"random"}
    turned = run_config(
        {"arch": "funasr_llm", "data": "d"} | parse_words(["curriculum.reverse=true", "curriculum.pacing=root"])
    )
    stages = changed(easy_first, turned.set).recipe.stages
    assert [(s.curriculum.order, s.curriculum.reverse, s.curriculum.pacing) for s in stages] == [
        ("duration", True, "root"),
        ("text", True, "root"),
    ]


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("recipe.stages.lora.epoch", "did you mean 'recipe.stages.lora.epochs'"),
        ("recipe.stages.lore.epochs", "did you mean 'recipe.stages.lora.epochs'"),
        ("wrokers", "did you mean 'workers'"),
        ("lora.rnak", "did you mean 'lora.rank'"),
        ("zzz", "valid here"),
    ],
)
def test_wrong_keys_get_the_nearest_right_one(key: str, near: str) -> None:
    with pytest.raises(WrongSetting, match=near):
        changed(PRESET, {key: 1}, ["workers"])


def test_wrong_values_say_what_was_given() -> None:
    with pytest.raises(WrongSetting, match=r"recipe.stages.0.epochs: .*greater than 0 \(got -1\)"):
        changed(PRESET, {"recipe.stages.adaptor.epochs": -1})
    with pytest.raises(WrongSetting, match=r"workers: .*got 'many'"):
        run_config({"arch": "funasr_llm", "data": "d", "workers": "many"})
    with pytest.raises(WrongSetting, match="not of the form key=value"):
        parse_words(["workers"])


def test_what_recipe_show_prints_can_be_read_back(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(PRESET.model_dump(mode="json")))
    assert changed(PRESET, read_recipe_file(str(file))) == PRESET
    file.write_text("recipe:\n  stages:\n  - name: only\n    train: [connector]\n")
    shorter = changed(PRESET, read_recipe_file(str(file)))
    assert [stage.name for stage in shorter.recipe.stages] == ["only"]


def test_a_file_that_is_not_settings_is_named(tmp_path: Path) -> None:
    file = tmp_path / "list.yaml"
    file.write_text("- a\n- b\n")
    with pytest.raises(WrongSetting, match="must hold settings"):
        read_recipe_file(str(file))
    with pytest.raises(WrongSetting, match=r"nowhere\.yaml cannot be read"):
        read_recipe_file(str(tmp_path / "nowhere.yaml"))


def test_a_wrong_name_is_said_before_any_architecture_is_imported() -> None:
    program = """
import sys
from pipelines.overrides import run_config

def refusal(**settings):
    try:
        run_config({"data": "d", **settings})
    except ValueError as error:
        return str(error)

assert "did you mean 'funasr_llm'" in refusal(arch="funasr")
assert "torch" not in sys.modules
assert "did you mean 'workers'" in refusal(arch="funasr_llm", wrokers=2)
assert not {"prefect", "ray", "models.architectures.funasr_llm"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
