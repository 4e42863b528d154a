"""An S3 server's bad days, in front of a good one: refusals, resets, lost replies, bodies cut short but called whole.

    python -m tests.infra.fault_proxy --upstream http://127.0.0.1:5000 --errors 0.1 --resets 0.02 --truncated 0.01

prints `port N`; `proxied()` does that for a test. The shares are of requests. Of `--errors` half are 503 SlowDown and
half 500. `--resets` cut a GET in the middle of its body; of other requests half are cut before the server hears of
them, and half after it has done what they ask, so that its reply is lost. `--truncated` bodies have a Content-Length
that fits what is left of them; a request without a body leaves that to the next. `--delay` is how many seconds each
request waits before it is passed on.

A PUT to `/__faults` with some of these as JSON changes them at once and begins to count anew; `/__counts` tells what
was done, `/__written` which objects were written, in the order in which the server had them. The Host header is passed
on as it is, for it is signed.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientTimeout, web
from yarl import URL

HOP = ("connection", "keep-alive", "transfer-encoding", "expect", "content-length", "te", "upgrade")
ERRORS = {
    503: ("slow_down", "SlowDown", "Please reduce your request rate."),
    500: ("internal_errors", "InternalError", "We encountered an internal error. Please try again."),
}


class Proxy:
    def __init__(self, upstream: str, **faults: float) -> None:
        self.upstream = upstream.rstrip("/")
        self.change(**faults)

    def change(
        self, errors: float = 0.0, resets: float = 0.0, truncated: float = 0.0, delay: float = 0.0, seed: float = 0
    ) -> None:
        self.errors, self.resets, self.truncated, self.delay = errors, resets, truncated, delay
        self.owed = 0  # bodies to cut, of requests that had none
        self.dice, self.counts, self.written = random.Random(seed), collections.Counter[str](), list[str]()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/__counts":
            return web.json_response(self.counts)
        if request.path == "/__written":
            return web.json_response(self.written)
        if request.path == "/__faults":
            self.change(**await request.json())
            return web.json_response({})
        body, roll, half = await request.read(), self.dice.random(), self.dice.random() < 0.5
        self.counts["requests"] += 1
        self.counts[request.method] += 1
        if roll < self.errors:
            return self.refused(503 if half else 500)
        resets = roll < self.errors + self.resets
        if resets and request.method not in ("GET", "HEAD") and half:
            return self.reset(request, "resets_before")
        if self.delay:
            await asyncio.sleep(self.delay)
        status, headers, data = await self.forward(request, body)
        if status == 200 and ((request.method == "PUT" and "partNumber" not in request.query) or _completes(request)):
            self.written.append(request.path.lstrip("/"))
        if resets and (request.method != "GET" or len(data) < 2):
            return self.reset(request, "replies_lost")
        if resets:
            return await self.cut(request, status, headers, data)
        self.owed += not resets and roll < self.errors + self.resets + self.truncated
        if self.owed and request.method == "GET" and status in (200, 206) and data:
            self.owed -= 1
            self.counts["truncated"] += 1
            data = data[: int(self.dice.random() * len(data))]
        if request.method == "HEAD":  # its length is that of a body that does not come
            reply = web.StreamResponse(status=status, headers=headers)
            await reply.prepare(request)
            return reply
        headers.pop("Content-Length", None)
        return web.Response(status=status, headers=headers, body=data)

    async def forward(self, request: web.Request, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP}
        url = URL(self.upstream + request.raw_path, encoded=True)
        options = {"headers": headers, "data": body or None, "allow_redirects": False}
        automatic = ("Content-Type", "User-Agent", "Accept", "Accept-Encoding")
        async with (
            ClientSession(auto_decompress=False, timeout=ClientTimeout(60), skip_auto_headers=automatic) as session,
            session.request(request.method, url, **options) as reply,
        ):
            data = await reply.read()
            kept = {name: value for name, value in reply.headers.items() if name.lower() not in HOP[:3]}
            return reply.status, kept, data

    def refused(self, status: int) -> web.Response:
        count, code, message = ERRORS[status]
        self.counts[count] += 1
        text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
        return web.Response(status=status, text=text, content_type="application/xml")

    def reset(self, request: web.Request, count: str) -> web.Response:
        self.counts[count] += 1
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def cut(self, request: web.Request, status: int, headers: dict[str, str], data: bytes) -> web.StreamResponse:
        self.counts["resets"] += 1
        reply = web.StreamResponse(status=status, headers=headers | {"Content-Length": str(len(data))})
        await reply.prepare(request)
        await reply.write(data[: len(data) // 2])
        assert request.transport is not None
        request.transport.abort()
        return reply


def _completes(request: web.Request) -> bool:
    """Whether it makes an object of the parts that were sent."""
    return request.method == "POST" and "uploadId" in request.query


async def serve(proxy: Proxy, port: int) -> None:
    """Until it is ended from outside."""
    application = web.Application(client_max_size=1 << 30)
    application.router.add_route("*", "/{path:.*}", proxy.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print(f"port {runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


class Remote:
    """A proxy that runs beside a test."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def ask(self, what: str, **sent: float) -> Any:
        data = json.dumps(sent).encode() if sent else None
        request = urllib.request.Request(f"{self.endpoint}/__{what}", data, method="PUT" if data else "GET")
        with urllib.request.urlopen(request, timeout=10) as reply:
            return json.load(reply)

    def change(self, **faults: float) -> None:
        """Other faults from now on; the seed and the counts begin anew."""
        self.ask("faults", **{"errors": 0.0} | faults)

    def counts(self) -> dict[str, int]:
        return dict(self.ask("counts"))

    def written(self) -> list[str]:
        """`bucket/key` of what was written, each as often as it was, in order."""
        return list(self.ask("written"))


@contextmanager
def proxied(**faults: float) -> Iterator[Remote]:
    """A proxy between the server that the environment names and us; the environment names the proxy meanwhile."""
    import pytest
    from s3fs import S3FileSystem

    command = [sys.executable, "-m", "tests.infra.fault_proxy", "--upstream", os.environ["AWS_ENDPOINT_URL"]]
    command += [word for name, value in faults.items() for word in (f"--{name}", str(value))]
    proxy = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True)
    assert proxy.stdout is not None
    try:
        endpoint = f"http://127.0.0.1:{proxy.stdout.readline().split()[1]}"
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("AWS_ENDPOINT_URL", endpoint)
            S3FileSystem.clear_instance_cache()
            yield Remote(endpoint)
    finally:
        S3FileSystem.clear_instance_cache()
        proxy.terminate()
        proxy.wait()
        proxy.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--port", type=int, default=0)
    for name in ("errors", "resets", "truncated", "delay", "seed"):
        parser.add_argument(f"--{name}", type=float, default=0.0)
    chosen = vars(parser.parse_args())
    port = chosen.pop("port")
    asyncio.run(serve(Proxy(**chosen), port))


if __name__ == "__main__":
    main()
