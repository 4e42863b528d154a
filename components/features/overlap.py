"""What runs beside an encoder: clips are decoded ahead of it, results are written behind it, both within a bound.

libFLAC, digests, copies and torch's own kernels let go of the interpreter's lock, so threads are enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

AHEAD = 2  # batches that are decoded, or being decoded, while one is encoded
BEHIND = 2  # results that wait to be written

Item = TypeVar("Item")
Made = TypeVar("Made")


def ahead(work: Callable[[Item], Made], batches: Iterable[Sequence[Item]], threads: int = 1) -> Generator[list[Made]]:
    """`work` on each item of each batch, in order; `AHEAD` batches are worked on by threads before they are asked for.

    What `work` raises is raised here, at its batch. Close the iterator if it is not used to its end.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="ahead") as pool:
        waiting: deque[list[Future[Made]]] = deque()
        try:
            for batch in batches:
                waiting.append([pool.submit(work, item) for item in batch])
                if len(waiting) > AHEAD:
                    yield _results(waiting.popleft())
            while waiting:
                yield _results(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _results(futures: list[Future[Made]]) -> list[Made]:
    return [future.result() for future in futures]


class Behind:
    """One thread that does what is put to it, in that order.

    `put` waits while `BEHIND` pieces are unfinished. An error in the thread is raised by a later `put`, or where the
    `with` block ends; a block that ends well has had all its work done.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self.waiting: deque[Future[Any]] = deque()

    def put(self, work: Callable[[], Any]) -> None:
        while len(self.waiting) >= BEHIND:
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(work))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while self.waiting and kind is None:
                self.waiting.popleft().result()
        finally:
            self.pool.shutdown(cancel_futures=True)
