"""Reach a Ray cluster, or start one on this machine; never stop what was not started here."""

from __future__ import annotations

import contextvars
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from infra import lean, loopback, reaper
from infra.jobs import refuse_open

NOTHING = "none"  # as a working directory: the machines have the code
LOCAL, AUTO = "local", "auto"
LET_GO_SECONDS = 5.0  # that work which was interrupted has to notice it
START_SECONDS = 30.0  # that a Ray which is starting has to come up before it is stopped
Result = TypeVar("Result")
OBJECT_STORE_BYTES = 256 << 20  # results are URLs and manifests, never features


def check_address(address: str) -> str:
    """The address without a slash at its end; ValueError for one that is none of the forms of `connect`.

    `http://…` and `https://…` are for `infra.jobs`.
    """
    bare = address.strip().rstrip("/")
    host = r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])"
    for form in (f"{LOCAL}|{AUTO}", rf"(ray://)?{host}:[0-9]{{1,5}}", rf"https?://{host}(:[0-9]{{1,5}})?(/\S*)?"):
        if re.fullmatch(form, bare):
            return bare
    if re.match(r"https?://[^/]*@", bare):
        raise ValueError("a Ray address carries no name and password: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN")
    raise ValueError(
        "no Ray address: it is local, auto, host:port, ray://host:port, or the dashboard's http(s)://host:port"
    )


def address_of(given: str | None) -> str:
    """Where work goes: the address that was given, else Ray's own `$RAY_ADDRESS`, which a Ray job finds set."""
    return given or os.environ.get("RAY_ADDRESS") or LOCAL


def interruptibly(work: Callable[[], Result]) -> Result:
    """What `work()` gives, which may wait for Ray; a signal, such as the SIGTERM of a cancelled flow, ends it at once.

    Ray waits in C++ and loses what a signal handler raises there. So the work is done in a thread, and the main thread
    waits in Python. When that is interrupted, Ray is let go of, or stopped if it was started here, and the work ends.
    """
    global _orders
    if threading.current_thread() is not threading.main_thread():
        return work()
    result = _ordered(work)
    try:
        wait([result])
    except BaseException:
        _orders = None  # the thread may hang in what was interrupted
        disconnect()
        wait([result], LET_GO_SECONDS)
        raise
    return result.result()


def begin(work: Callable[[], object]) -> None:
    """Let that thread do this first, beside what the main thread does meanwhile, such as imports.

    A fault is not raised: who needs what was begun meets it again.
    """
    global _begun
    _begun = _ordered(work)


def _ordered(work: Callable[[], Result]) -> Future[Result]:
    global _orders
    if _orders is None:
        _orders = SimpleQueue()
        threading.Thread(target=_do, args=(_orders,), daemon=True, name="work").start()
    result: Future[Result] = Future()
    _orders.put(partial(contextvars.copy_context().run, _fill, result, work))
    return result


# One thread for all work of a process: Ray's own processes end with the very thread that started them.
_orders: SimpleQueue[Callable[[], None]] | None = None
_begun: Future[object] | None = None
_ours = False  # Ray was started here
warm: list[Any] = []  # actors that have done their work and wait for more; only of a Ray that is ours


def _do(orders: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        orders.get()()


def _fill(result: Future[Result], work: Callable[[], Result]) -> None:
    try:
        result.set_result(work())
    except BaseException as error:  # noqa: BLE001  # whatever it is, it belongs to the one who waits
        result.set_exception(error)


@contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Ray takes SIGTERM for itself; what was asked before is kept, as a flow that is cancelled has to hear of it."""
    if threading.current_thread() is not threading.main_thread():
        logging.getLogger("ray").setLevel(logging.ERROR)  # it warns that it could not
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:  # else it was set by something that is not Python, which cannot be set again
            signal.signal(signal.SIGTERM, before)


@keeping_sigterm()
def connect(address: str | None, cpus: int, runtime_env: dict[str, Any] | None = None) -> Any:
    """Connect to Ray at `address`, or start it here with `cpus` cores; does nothing if it is already connected.

    `local` starts it, also where `$RAY_ADDRESS` is set; `auto` is the one that runs on this machine; else `host:port`
    or `ray://host:port`, where `runtime_env` holds for all workers.
    """
    import ray

    global _ours
    if ray.is_initialized():
        return ray
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    given, address = address, address_of(address)
    if address != LOCAL:
        if given and given != AUTO:
            refuse_open(given)
        ray.init(address=address, runtime_env=runtime_env or None, **quiet)
    else:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away
        # Without an address Ray would take one that somebody else runs on this machine, and refuse our cores.
        with loopback.only(), lean.only(), reaper.watched():
            ray.init("local", num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, **quiet)
        _ours = True
    return ray


def ours() -> bool:
    """Whether we are connected to a Ray that was started here: nobody else waits for its cores."""
    return _ours


def disconnect() -> None:
    """Stop Ray if it was started here, else only let go of it; nothing happens if it was never reached."""
    if _begun is not None:
        wait([_begun], START_SECONDS)  # of a Ray that is half started nobody knows what there is to stop
    if "ray" not in sys.modules:
        return
    import ray

    global _ours
    if ray.is_initialized():
        ray.shutdown()
    _ours = False
    warm.clear()
    reaper.release()
