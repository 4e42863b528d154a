"""A small Hugging Face hub on loopback: the endpoints that an upload needs, with git-LFS, and what arrived."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "planted" * 5


@dataclass
class Hub:
    """Repositories by name; `faults` answers of 503 come before the next answers to uploads."""

    url: str = ""
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: int = 0

    def add(self, name: str, private: bool, files: dict[str, bytes] | None = None) -> None:
        self.repositories[name] = {"private": private, "branches": {"main": dict(files or {})}, "commits": []}


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_any(self) -> None:
        data, path = self.body(), self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        if path.startswith("/upload/"):
            return self.upload(path, data)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/([\w-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(data))
        found = re.fullmatch(r"/api/models/([\w-]+/[\w.-]+)(?:/(\w+)/([\w.-]+))?(?:/.*)?", path)
        repository = self.hub.repositories.get(found[1]) if found else None
        if found is None or repository is None:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return self.about(found, repository, data)

    def about(self, found: re.Match[str], repository: dict[str, Any], data: bytes) -> None:
        action, branch = found[2], found[3]
        files = repository["branches"].get(branch or "main", {})
        if action is None:
            return self.answer({"id": found[1], "private": repository["private"], "sha": "0" * 40, "siblings": []})
        if action == "tree":
            return self.answer([{"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in files.items()])
        if action == "branch":
            repository["branches"][branch] = dict(repository["branches"]["main"])
            return self.answer({}, 200)
        if action == "preupload":
            return self.answer({"files": [self.mode(file) for file in json.loads(data)["files"]]})
        if action == "commit":
            return self.commit(found[1], repository, files, data)
        return self.answer({"error": "unknown"}, 404)

    def mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith((".safetensors", "tokenizer.json"))
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            return self.answer({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.add(name, asked.get("visibility") == "private")
        return self.answer({"url": f"{self.hub.url}/{name}"})

    def batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            upload = {"href": f"{self.hub.url}/upload/{one['oid']}", "header": {}}
            actions = {} if one["oid"] in self.hub.blobs else {"actions": {"upload": upload}}
            objects.append({"oid": one["oid"], "size": one["size"]} | actions)
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, path: str, data: bytes) -> None:
        if self.hub.faults:
            self.hub.faults -= 1
            return self.answer({"error": "slow down"}, 503)
        oid = path.rpartition("/")[2]
        if hashlib.sha256(data).hexdigest() != oid:
            return self.answer({"error": "wrong sha256"}, 422)
        self.hub.blobs[oid] = data
        return self.answer({})

    def commit(self, name: str, repository: dict[str, Any], files: dict[str, bytes], data: bytes) -> None:
        for line in data.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                repository["commits"].append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self.answer({"error": "LFS object is missing"}, 400)
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(data).hexdigest()
        return self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    do_GET = do_POST = do_PUT = handle_any


@contextmanager
def running() -> Iterator[Hub]:
    """The hub, on a free port, until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
