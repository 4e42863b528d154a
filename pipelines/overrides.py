"""`key=value` words and YAML recipes on top of a preset, with the nearest valid name for a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from infra.secrets import redacted
from models import architectures
from pipelines.config import RunConfig

Model = TypeVar("Model", bound=BaseModel)
EVERY = "*"  # in a dotted key: every item of a list


class WrongSetting(ValueError):
    """A setting that does not exist or cannot have that value; the message is one line for a person."""


def parse_words(words: list[str]) -> dict[str, Any]:
    """`["workers=2", "recipe.stages.lora.epochs=0.5"]` → a dictionary; values are read as YAML."""
    settings = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise WrongSetting(f"{word!r} is not of the form key=value, for example workers=2")
        settings[key] = yaml.safe_load(value)
    return settings


def run_config(settings: dict[str, Any]) -> RunConfig:
    """Settings whose first name is a field of RunConfig set that; the others change the preset.

    `curriculum` and what is below it hold for every stage: `curriculum=none`, `curriculum.reverse=true`.
    """
    own = {key: value for key, value in settings.items() if key in RunConfig.model_fields}
    nested = {key: value for key, value in settings.items() if key.partition(".")[0] in RunConfig.model_fields}
    rest = {_for_all_stages(key): value for key, value in settings.items() if key not in nested}
    try:
        config = RunConfig.model_validate(own | {"set": own.get("set", {}) | rest})
    except ValidationError as error:
        raise WrongSetting(_first_line(error)) from None
    architectures.check(config.arch)
    if rest:
        _check_first_names(rest)
    return changed(config, {key: value for key, value in nested.items() if key not in own})


def _check_first_names(keys: Iterable[str]) -> None:
    """What can be said of changes of a preset before the architecture, which is seconds away, is imported."""
    from models.preset import Preset

    for key in keys:
        name = key.partition(".")[0]
        if name not in Preset.model_fields:
            raise WrongSetting(_unknown(key, name, [*Preset.model_fields, *RunConfig.model_fields]))


def _for_all_stages(key: str) -> str:
    return f"recipe.stages.{EVERY}.{key}" if key.partition(".")[0] == "curriculum" else key


def changed(model: Model, changes: dict[str, Any], also: list[str] | None = None) -> Model:
    """A copy of a pydantic model with dotted keys set; list items are named by their `name`.

    `also` are further valid first names for the suggestion. Raises WrongSetting.
    """
    tree = model.model_dump(mode="json")
    for key, value in changes.items():
        _set(tree, key, key.split("."), value, also or [])
    try:
        return type(model).model_validate(tree)
    except ValidationError as error:
        raise WrongSetting(_first_line(error)) from None


def read_recipe_file(path: str) -> dict[str, Any]:
    """A YAML file of settings, nested or dotted, as dotted keys; `recipe.stages` replaces the stages as a whole."""
    try:
        tree = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise WrongSetting(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise WrongSetting(f"{path} must hold settings (key: value), it holds a {type(tree).__name__}")
    if "stages" in tree:  # what `earloom recipe show` prints is a recipe by itself
        tree = {"recipe": tree}
    return _dotted(tree, "")


def _dotted(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and key not in ("tasks", "datasets", "groups", "config", "set"):
            flat |= _dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _set(tree: Any, whole: str, path: list[str], value: Any, also: list[str]) -> None:
    name, rest = path[0], path[1:]
    if isinstance(tree, list) and name == EVERY:
        for item in tree:
            _set(item, whole, rest, value, also)
    elif isinstance(tree, list):
        names = [item["name"] for item in tree]
        if name not in names:
            raise WrongSetting(_unknown(whole, name, names))
        _set(tree[names.index(name)], whole, rest, value, also)
    elif not isinstance(tree, dict) or (
        name not in tree
        and whole.split(".")[-2:-1] not in (["tasks"], ["datasets"], ["groups"], ["config"], ["connector"])
    ):
        raise WrongSetting(_unknown(whole, name, [*(tree if isinstance(tree, dict) else []), *also]))
    elif rest and tree[name] is not None:
        _set(tree[name], whole, rest, value, [])
    elif rest:
        raise WrongSetting(f"{whole}: {name} is not set in this preset")
    else:
        tree[name] = value


def _unknown(whole: str, name: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(name, valid, 1, 0.5)
    hint = f"did you mean {whole.replace(name, near[0])!r}?" if near else f"valid here: {', '.join(valid)}"
    return f"no setting {whole!r}; {hint}"


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{where} is missing"
    given = first["input"]
    said = f" (got {redacted(repr(given))})" if isinstance(given, str | int | float) else ""  # in others secrets may be
    return f"{where}: {first['msg']}{said}"
