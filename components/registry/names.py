"""What a registered model, its versions and its aliases may be called, and how they are named in one word."""

from __future__ import annotations

import re

CHAMPION = "champion"  # the alias that is given by a promotion alone


def parse_model(model: str) -> tuple[str, str | None, str | None]:
    """`NAME[@alias|/version]` → (name, alias, version); `@latest` is the newest version, as without an alias."""
    name, at, alias = model.partition("@")
    name, slash, version = name.partition("/") if not at else (name, "", "")
    check_name(name)
    if slash and not version.isdecimal():
        raise ValueError(f"{model!r}: what follows the / must be a version number, as in {name}/3")
    if at and alias.lower() != "latest":
        check_alias(alias)
        return name, alias, None
    return name, None, str(int(version)) if slash else None


def check_name(name: str) -> None:
    """ValueError unless a name can be a registered model's, a folder's and a word on the command line."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name) or ".." in name:
        raise ValueError(
            f"{name!r} cannot be a model's name: use letters, digits, '.', '_' and '-', starting with a letter or "
            "digit, without '/' and '..'"
        )


def check_alias(alias: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", alias) or re.fullmatch(r"(?i)v\d+|latest", alias):
        raise ValueError(
            f"{alias!r} cannot be an alias: use letters, digits, '_' and '-', but not 'latest' or 'v' and a number"
        )


def refuse_champion(alias: str) -> None:
    """ValueError where the champion's alias would be given without a comparison."""
    if alias == CHAMPION:
        raise ValueError(f"@{CHAMPION} is earned: register with alias=candidate, then `earloom promote`")
