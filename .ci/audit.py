"""What is installed, against what is pinned and what is known of it: `make audit`. Uses the package registry only.

Three questions, of which the first two need no network:
1. Is every installed distribution pinned in constraints.txt or weights.txt, and installed in that very version?
2. Is any version below a floor that a known vulnerability sets, or a C library that a wheel carries known to have one?
3. Does the registry know of a vulnerability in an installed version? PyPI's JSON API says so; a mirror of it may not.
   Whether this one does is asked first, of a version that is known to be vulnerable. Where it does not, that is
   printed in capitals and counts as "not checked", never as "nothing found".

What is found and accepted stands in .ci/audit-allow.txt: id, last day, reason. An entry that is past its day fails.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import sys
import time
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
INDEX = os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_DEFAULT_INDEX") or "https://pypi.org/simple"
CANARY = ("requests", "2.19.0")  # CVE-2018-18074: a registry that knows nothing of it knows no vulnerabilities
OURS = {"earloom"}
TOOLS = {"uv", "pip", "setuptools"}  # that set the environment up; the Makefile pins uv
TIMEOUT, THREADS, LIMIT = 5.0, 16, 20.0  # seconds of a request, requests at once, seconds in all

# Lowest version without the vulnerability.
FLOORS = {
    "torch": ("2.10.0", "CVE-2026-24747"),
    "mlflow-skinny": ("3.11", "CVE-2026-4137"),
    "ray": ("2.52", "CVE-2023-48022"),
}
LIBSNDFILE = ("1.2.3", "CVE-2026-37555")  # the first version that may be without it; soundfile's wheel carries its own


class Allowed(NamedTuple):
    """A finding that is accepted up to and on a day."""

    identity: str
    until: datetime.date
    reason: str


class Finding(NamedTuple):
    """Something that is wrong with one distribution."""

    identity: str
    text: str


def main() -> int:
    installed = installed_versions()
    allowed = read_allowed((ROOT / ".ci" / "audit-allow.txt").read_text())
    pins = read_pins((ROOT / "constraints.txt").read_text()) | read_pins((ROOT / "weights.txt").read_text())
    findings = [*unpinned(installed, pins), *below_floors(installed), *bundled()]
    known, checked = advisories(installed)
    refused, accepted, stale = judged([*findings, *known], allowed, datetime.date.today())
    for finding in accepted:
        print(f"accepted  {finding.identity}: {finding.text}")
    for line in stale:
        print(f"warning   {line}")
    for finding in refused:
        print(f"FOUND     {finding.identity}: {finding.text}")
    print(f"audit: {len(installed)} distributions are installed, {len(pins)} are pinned; {len(FLOORS)} floors hold")
    if checked:
        print(f"audit: the registry answered about {checked} of them")
    if 0 < checked < len(installed):
        print(f"audit: NOT CHECKED: {len(installed) - checked} of them; run it where the registry answers sooner")
    if not checked:
        print("audit: NOT CHECKED AGAINST ADVISORIES: this registry has none. Run it where pypi.org can be reached.")
    return 1 if refused else 0


def installed_versions() -> dict[str, str]:
    """Normalised name → version of what this interpreter sees."""
    found = {canonical(one.metadata["Name"]): one.version for one in metadata.distributions() if one.metadata["Name"]}
    return {name: version for name, version in sorted(found.items()) if name not in OURS | TOOLS}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(text: str) -> dict[str, str]:
    """`name==version` lines; comments and blank lines are skipped. ValueError for a line that pins nothing."""
    pins = {}
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)\s*==\s*([^\s;]+)(\s*;.*)?", line)
        if match is None:
            raise ValueError(f"{line!r} pins nothing: write name==version")
        pins[canonical(match[1])] = match[2]
    return pins


def unpinned(installed: dict[str, str], pins: dict[str, str]) -> list[Finding]:
    """What is installed without a pin, or in another version; builds such as +cpu are the same version."""
    found = []
    for name, version in installed.items():
        if name not in pins:
            found.append(Finding(f"unpinned:{name}", f"{version} is installed and not in constraints.txt"))
        elif Version(Version(version).public) != Version(Version(pins[name]).public):
            found.append(Finding(f"unpinned:{name}", f"{version} is installed, {pins[name]} is pinned"))
    return found


def below_floors(installed: dict[str, str]) -> list[Finding]:
    return [
        Finding(why.partition(" ")[0], f"{name} {installed[name]} is installed, {floor} is the first without it")
        for name, (floor, why) in FLOORS.items()
        if name in installed and Version(installed[name]) < Version(floor)
    ]


def bundled() -> list[Finding]:
    """Known faults of C libraries that wheels carry: no registry lists them under the wheel's name."""
    import soundfile

    found, (floor, identity) = soundfile.__libsndfile_version__.removeprefix("libsndfile-"), LIBSNDFILE
    if Version(found) >= Version(floor):
        return []
    return [Finding(identity, f"soundfile carries libsndfile {found}: integer overflow in its IMA ADPCM reader")]


def advisories(installed: dict[str, str]) -> tuple[list[Finding], int]:
    """What the registry knows of the installed versions, and of how many it was asked; 0 if it knows nothing."""
    if not asked(*CANARY):
        return [], 0
    end = time.monotonic() + LIMIT

    def ask(pair: tuple[str, str]) -> list[dict[str, Any]] | None:
        return asked(pair[0], Version(pair[1]).public) if time.monotonic() < end else None

    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(zip(installed.items(), pool.map(ask, installed.items()), strict=True))
    found = [
        Finding(one["id"], f"{name} {version}: {', '.join(one['aliases'])} {one['summary']}")
        for (name, version), answer in answers
        for one in answer or []
    ]
    return found, sum(answer is not None for _, answer in answers)


def asked(name: str, version: str) -> list[dict[str, Any]] | None:
    """Vulnerabilities of a version, without those that were withdrawn; None if the registry does not say."""
    try:
        base = INDEX.rstrip("/").removesuffix("/simple")
        with urllib.request.urlopen(f"{base}/pypi/{name}/{version}/json", timeout=TIMEOUT) as reply:
            listed = json.load(reply).get("vulnerabilities")
    except (OSError, ValueError):
        return None
    return None if listed is None else [parsed(one) for one in listed if not one.get("withdrawn")]


def parsed(one: dict[str, Any]) -> dict[str, Any]:
    text = str(one.get("summary") or one.get("details") or "").partition("\n")[0][:120]
    fixed = ", ".join(map(str, one.get("fixed_in") or [])) or "no version"
    return {"id": one["id"], "aliases": list(one.get("aliases") or []), "summary": f"{text} (fixed in {fixed})"}


def read_allowed(text: str) -> list[Allowed]:
    """Lines of `ID YYYY-MM-DD reason`. ValueError for one that is not."""
    found = []
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        identity, _, rest = line.partition(" ")
        day, _, reason = rest.strip().partition(" ")
        if not reason.strip():
            raise ValueError(f"{line!r}: write the id, the last day (YYYY-MM-DD) and the reason")
        found.append(Allowed(identity, datetime.date.fromisoformat(day), reason.strip()))
    return found


def judged(
    findings: Iterable[Finding], allowed: Iterable[Allowed], today: datetime.date
) -> tuple[list[Finding], list[Finding], list[str]]:
    """Findings that fail, findings that are accepted, and entries of the list that nothing needs any more."""
    entries = {one.identity: one for one in allowed}
    refused, accepted = [], []
    for finding in findings:
        names = [finding.identity, *re.findall(r"(?:CVE|GHSA|PYSEC)-[\w-]+", finding.text)]
        entry = next((entries[name] for name in names if name in entries), None)
        if entry is None:
            refused.append(finding)
        elif entry.until < today:
            refused.append(finding._replace(text=f"{finding.text} (was accepted until {entry.until}: {entry.reason})"))
        else:
            accepted.append(finding._replace(text=f"{finding.text} (until {entry.until}: {entry.reason})"))
    needed = {name for f in (*refused, *accepted) for name in (f.identity, *re.findall(r"[A-Z]+-[\w-]+", f.text))}
    stale = [f"{name} in .ci/audit-allow.txt was not found: does it still hold?" for name in entries.keys() - needed]
    return refused, accepted, stale


if __name__ == "__main__":
    sys.exit(main())
