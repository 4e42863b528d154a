"""Import every module of an unpacked wheel and make sure that it is the wheel's, not the checkout's."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

ROOMS = ("pipelines", "components", "models", "infra")


def modules(wheel: Path) -> list[str]:
    """Names of all modules in the wheel."""
    found = list(ROOMS)
    for room in ROOMS:
        found += [module.name for module in pkgutil.walk_packages([str(wheel / room)], f"{room}.")]
    return found


def main(wheel: Path) -> None:
    sys.path.remove(str(Path(__file__).parent))
    names = modules(wheel)
    for name in names:
        path = Path(importlib.import_module(name).__file__ or "")
        if not path.is_relative_to(wheel):
            raise SystemExit(f"{name} was imported from {path}: the wheel does not hold it")
    print(f"wheel: {len(names)} modules import from an empty folder")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
