"""An S3 server's bad days, in front of a good one: refusals, resets, lost replies, bodies cut short but called whole.

    python -m tests.infra.fault_proxy --upstream http://127.0.0.1:5000 --errors 0.1 --resets 0.02 --truncated 0.01

prints `port N`. The shares are of requests. Of `--errors` half are 503 SlowDown and half 500. `--resets` cut a GET in
the middle of its body; of other requests half are cut before the server hears of them, and half after it has done
what they ask, so that its reply is lost. `--truncated` bodies of GET have a Content-Length that fits what is left of
them. `/__counts` tells what was done. The Host header is passed on as it is, for it is signed.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import random

from aiohttp import ClientSession, ClientTimeout, web
from yarl import URL

HOP = ("connection", "keep-alive", "transfer-encoding", "expect", "content-length", "te", "upgrade")
ERRORS = {
    503: ("slow_down", "SlowDown", "Please reduce your request rate."),
    500: ("internal_errors", "InternalError", "We encountered an internal error. Please try again."),
}


class Proxy:
    def __init__(self, upstream: str, errors: float, resets: float, truncated: float, seed: int) -> None:
        self.upstream, self.errors, self.resets, self.truncated = upstream.rstrip("/"), errors, resets, truncated
        self.dice, self.counts = random.Random(seed), collections.Counter[str]()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/__counts":
            return web.json_response(self.counts)
        body, roll, half = await request.read(), self.dice.random(), self.dice.random() < 0.5
        self.counts["requests"] += 1
        self.counts[request.method] += 1
        if roll < self.errors:
            return self.refused(503 if half else 500)
        resets = roll < self.errors + self.resets
        if resets and request.method not in ("GET", "HEAD") and half:
            return self.reset(request, "resets_before")
        status, headers, data = await self.forward(request, body)
        if resets and (request.method != "GET" or len(data) < 2):
            return self.reset(request, "replies_lost")
        if resets:
            return await self.cut(request, status, headers, data)
        if (
            roll < self.errors + self.resets + self.truncated
            and request.method == "GET"
            and status in (200, 206)
            and data
        ):
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


async def serve(proxy: Proxy, port: int) -> None:
    """Until it is ended from outside."""
    application = web.Application(client_max_size=1 << 30)
    application.router.add_route("*", "/{path:.*}", proxy.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print(f"port {runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--port", type=int, default=0)
    for share in ("--errors", "--resets", "--truncated"):
        parser.add_argument(share, type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    asyncio.run(serve(Proxy(chosen.upstream, chosen.errors, chosen.resets, chosen.truncated, chosen.seed), chosen.port))


if __name__ == "__main__":
    main()
