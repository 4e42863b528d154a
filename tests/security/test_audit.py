""".ci/audit.py: pins, floors, the registry's answers and the list of what is accepted."""

from __future__ import annotations

import datetime
import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TODAY = datetime.date(2026, 12, 1)


@pytest.fixture(scope="module")
def audit() -> Any:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def registry(audit: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A registry on loopback that answers with what is put in: path → JSON; 404 for the rest."""
    pages: dict[str, Any] = {}

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(pages.get(self.path)).encode()
            self.send_response(200 if self.path in pages else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(audit, "INDEX", f"http://127.0.0.1:{server.server_port}/simple")
    yield pages
    server.shutdown()
    server.server_close()


def test_the_pins_are_what_is_installed(audit: Any) -> None:
    installed = audit.installed_versions()
    pins = audit.read_pins((ROOT / "constraints.txt").read_text()) | audit.read_pins((ROOT / "weights.txt").read_text())
    assert [finding for finding in audit.unpinned(installed, pins) if "is pinned" in finding.text] == []
    assert audit.below_floors(installed) == []
    assert len(installed) > 150


def test_another_version_or_none_is_found(audit: Any) -> None:
    pins = audit.read_pins("torch==2.13.0  # exactly\n\nfoo_bar == 1.0\nbaz==2\n")
    installed = {"torch": "2.13.0+cpu", "foo-bar": "1.0.post1", "qux": "3", "baz": "2.0"}
    assert [finding.identity for finding in audit.unpinned(installed, pins)] == ["unpinned:foo-bar", "unpinned:qux"]
    assert [finding.identity for finding in audit.below_floors({"torch": "2.9.1"})] == ["CVE-2026-24747"]
    assert audit.below_floors({"torch": "2.10.0"}) == []
    with pytest.raises(ValueError, match="'torch>=2' pins nothing"):
        audit.read_pins("torch>=2")


def test_advisories_of_a_registry_that_has_some(audit: Any, registry: dict[str, Any]) -> None:
    one = {"id": "PYSEC-1", "aliases": ["CVE-1"], "summary": "bad", "fixed_in": ["2.1"], "withdrawn": None}
    registry["/pypi/requests/2.19.0/json"] = {"vulnerabilities": [one]}
    registry["/pypi/torch/2.13.0/json"] = {"vulnerabilities": [one, one | {"withdrawn": "2026-01-01T00:00:00Z"}]}
    registry["/pypi/safe/1/json"] = {"vulnerabilities": []}
    found, checked = audit.advisories({"torch": "2.13.0+cpu", "safe": "1", "unknown": "1"})
    assert [(f.identity, f.text) for f in found] == [("PYSEC-1", "torch 2.13.0+cpu: CVE-1 bad (fixed in 2.1)")]
    assert checked == 2


@pytest.mark.parametrize("canary", [None, {"info": {}}, {"vulnerabilities": []}])
def test_a_registry_without_any_is_not_taken_for_a_clean_bill(
    audit: Any, registry: dict[str, Any], canary: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    if canary is not None:
        registry["/pypi/requests/2.19.0/json"] = canary
    assert audit.advisories({"safe": "1"}) == ([], 0)
    assert audit.main() == 0
    assert "NOT CHECKED AGAINST ADVISORIES" in capsys.readouterr().out


def test_what_is_accepted_and_until_when(audit: Any) -> None:
    finding, other = audit.Finding("PYSEC-1", "torch 2: CVE-7 bad"), audit.Finding("GHSA-2", "ray: worse")
    allowed = audit.read_allowed("# why\nCVE-7 2026-12-01 not reached\nPYSEC-9 2027-01-01 gone by now\n")
    refused, accepted, stale = audit.judged([finding, other], allowed, TODAY)
    assert [f.identity for f in refused] == ["GHSA-2"]
    assert [f.identity for f in accepted] == ["PYSEC-1"]
    assert stale == ["PYSEC-9 in .ci/audit-allow.txt was not found: does it still hold?"]
    late = audit.judged([finding], allowed, TODAY + datetime.timedelta(days=1))
    assert [f.identity for f in late[0]] == ["PYSEC-1"]
    for line in ("CVE-7", "CVE-7 2026-12-01", "CVE-7 soon because"):
        with pytest.raises(ValueError, match=r"write the id|Invalid isoformat"):
            audit.read_allowed(line)
