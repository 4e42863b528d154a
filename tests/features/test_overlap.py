"""Threads before and behind an encoder: order, bounds and errors."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from components.features.overlap import AHEAD, BEHIND, Behind, ahead


@pytest.mark.parametrize("threads", [1, 3])
def test_items_come_in_their_batches_and_only_two_batches_are_worked_on_ahead(threads: int) -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item * item

    batches = [[0, 1], [2], [3, 4, 5], [6], [7], [8]]
    found = []
    with closing(ahead(work, batches, threads)) as made:
        for number, batch in enumerate(made):
            found.append(batch)
            assert len(begun) <= sum(map(len, batches[: number + 1 + AHEAD]))
    assert found == [[item * item for item in batch] for batch in batches]
    assert sorted(begun) == list(range(9))


def test_the_next_batch_is_made_while_this_one_is_used() -> None:
    done = threading.Semaphore(0)
    with closing(ahead(lambda item: done.release() or item, [[0], [1], [2]])) as made:
        next(made)
        assert all(done.acquire(timeout=5) for _ in range(3))  # nobody asked for the other two


def test_an_error_comes_at_its_batch_and_an_unfinished_iterator_stops() -> None:
    with closing(ahead(lambda item: 1 // item, [[1], [1, 0], [1]])) as made:
        assert next(made) == [1]
        with pytest.raises(ZeroDivisionError):
            next(made)
    begun: list[int] = []
    with closing(ahead(begun.append, [[i] for i in range(100)])) as made:
        next(made)
    assert len(begun) <= 1 + AHEAD
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_work_behind_is_done_in_order_within_a_bound() -> None:
    free, done = threading.Semaphore(0), []

    def work(number: int) -> None:
        free.acquire()
        done.append(number)

    with Behind() as behind:
        for number in range(BEHIND):
            behind.put(lambda number=number: work(number))
        late = threading.Thread(target=behind.put, args=(lambda: work(BEHIND),))
        late.start()
        late.join(0.05)
        assert late.is_alive() and done == []  # a third piece waits until the first is done
        free.release(BEHIND + 1)
        late.join()
    assert done == list(range(BEHIND + 1))


def failing(more: int, done: list[int]) -> None:
    with Behind() as behind:
        behind.put(lambda: 1 // 0)
        for _ in range(more):
            behind.put(lambda: done.append(1))
        done.append(0)


def test_an_error_behind_is_raised_at_the_end_or_by_what_comes_too_much() -> None:
    done: list[int] = []
    with pytest.raises(ZeroDivisionError):
        failing(0, done)
    assert done == [0]
    with pytest.raises(ZeroDivisionError):
        failing(BEHIND, done)
    assert 0 not in done[1:]


def interrupted() -> None:
    with Behind() as behind:
        behind.put(lambda: 1 // 0)
        raise KeyboardInterrupt


def test_an_error_before_is_the_one_that_is_told() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("behind")]
