"""The project's own files keep what they say: README, pins, weights and what the wheel holds."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from models.weights.store import CONVERTERS, converter

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = ("pipelines", "components", "models", "infra")
SYSTEMS = 26  # of the list


def listed(name: str) -> list[str]:
    """Lines of a requirements file without comments."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [line for line in lines if line]


def section(title: str) -> str:
    """The text of the README below a heading, up to the next of its level."""
    return (ROOT / "README.md").read_text().split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def tree() -> set[str]:
    """The folders of the README's tree, such as 'components/audio'."""
    folders: set[str] = set()
    room = ""
    for indent, name in re.findall(r"^    ( *)(\w+)/ ", section("The rooms"), re.MULTILINE):
        room = room if indent else name
        folders.add(f"{room}/{name}" if indent else name)
    return folders


def systems() -> list[list[str]]:
    """The cells of each row of the README's table of systems."""
    rows = re.findall(r"^\| (.+) \|$", section("The 26 systems"), re.MULTILINE)
    return [row.split(" | ") for row in rows[2:]]


# ---- README -----------------------------------------------------------------------------------------------------


def test_tree_of_readme_has_every_room_with_code() -> None:
    real = {
        str(folder.relative_to(ROOT))
        for room in ROOMS
        for folder in (ROOT / room, *(ROOT / room).glob("*/"))
        if any(path.name != "__init__.py" for path in folder.glob("*.py"))
    }
    assert sorted(real - tree()) == []


def test_tree_of_readme_has_no_room_that_is_not_there() -> None:
    assert len(tree()) > len(ROOMS)
    assert [folder for folder in sorted(tree()) if not (ROOT / folder).is_dir()] == []


def test_systems_of_readme_are_the_list() -> None:
    rows = systems()
    assert len(rows) == len({row[0] for row in rows}) == len({row[2] for row in rows}) == SYSTEMS
    assert {row[3] for row in rows} <= {"runs", "planned"}


def test_systems_that_run_are_the_architectures() -> None:
    marked = [match[1] for row in systems() if row[3] == "runs" and (match := re.search(r"\(`(\w+)`\)", row[0]))]
    files = {path.stem for path in (ROOT / "models" / "architectures").glob("*.py")} - {"__init__"}
    assert set(marked) == files
    assert len(set(marked)) == sum(row[3] == "runs" for row in systems())


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_to_files_lead_somewhere(document: str) -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text()) if "://" not in target]
    assert [target for target in targets if not (ROOT / target).is_file()] == []


# ---- pins -------------------------------------------------------------------------------------------------------


def test_constraints_are_plain_pins() -> None:
    lines = listed("constraints.txt")
    assert [
        line for line in lines if not re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*", line)
    ] == []  # no URL, path or +cpu
    pinned = [line.partition("==")[0] for line in lines]
    assert pinned == sorted(set(pinned))


def test_every_dependency_is_pinned_within_its_range() -> None:
    pins = dict(line.split("==") for line in listed("constraints.txt"))
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"].values()
    for text in [*project["dependencies"], *(text for extra in extras for text in extra)]:
        asked = Requirement(text)
        if asked.name == project["name"]:  # an extra that includes another
            continue
        pin = pins[canonicalize_name(asked.name)]
        assert asked.specifier.contains(pin), f"{text} does not allow the pin {pin}"


def test_packages_that_would_break_the_set_up_stay_out() -> None:
    pinned = {line.partition("==")[0] for line in listed("constraints.txt")}
    weights = {line.partition("==")[0] for line in listed("weights.txt")}
    assert not pinned & (weights | {"llama-cpp-python", "llm"})
    assert not [name for name in pinned if name.startswith("nvidia-")]


def test_weights_are_the_wheels_that_the_converters_read() -> None:
    asked = {wheel for name in CONVERTERS for wheel in converter(name).wheels}
    pins = {line.partition("==")[0]: line for line in listed("weights.txt")}
    assert {wheel.partition("==")[0] for wheel in asked} == set(pins)
    assert {wheel for wheel in asked if "==" in wheel} <= set(pins.values())


# ---- wheel ------------------------------------------------------------------------------------------------------


def test_wheel_holds_the_rooms() -> None:
    assert tuple(PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == ROOMS
    assert tuple(PYPROJECT["tool"]["importlinter"]["root_packages"]) == ROOMS


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_command_is_there() -> None:
    module, _, function = PYPROJECT["project"]["scripts"]["earloom"].partition(":")
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert f"def {function}(" in source
