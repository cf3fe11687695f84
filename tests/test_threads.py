"""Items are worked on by no more threads than there are cores, in their order."""

import os
import threading

import pytest

from microtome.threads import in_threads, looked_at_in_threads, usable_cores


def test_the_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 6}, raising=False)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


@pytest.mark.parametrize(("items", "most"), [([4], 9), ([4, 5, 6], 1), ([], 9)])
def test_where_one_thread_would_do_it_is_this_one(items: list[int], most: int) -> None:
    found = in_threads(lambda item: (item * 2, threading.get_ident()), items, most)
    assert found == [(item * 2, threading.get_ident()) for item in items]


def test_several_items_are_under_way_at_a_time_and_come_in_their_order() -> None:
    both = threading.Barrier(2, timeout=60)

    def meet(item: int) -> int:
        both.wait()
        return item

    assert in_threads(meet, [7, 1], 2) == [7, 1]


def test_what_goes_wrong_with_an_item_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda item: 1 // item, [1, 0, 1], 2)


def test_few_items_are_looked_at_by_this_thread_and_many_by_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert set(looked_at_in_threads(lambda _: threading.get_ident(), range(8))) == {threading.get_ident()}
    five = threading.Barrier(5, timeout=60)
    assert len(set(looked_at_in_threads(lambda _: five.wait(), range(10)))) == 5
