"""Work in several processes: results in order, the stream read no faster than it is worked on."""

import os

import pytest

from tokenizer_build.processes import map_in_order

found: list[int] = []


def start(number: int) -> None:
    found.append(number)


def work(item: int) -> tuple[int, int, int]:
    return item * found[-1], len(found), os.getpid()


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order_and_the_stream_is_read_as_needed(processes):
    found.clear()
    read = []

    def items():
        for item in range(50):
            read.append(item)
            yield item

    results = map_in_order(work, items(), processes, start, (3,))
    first = next(results)
    assert first[0] == 0 and len(read) <= 2 * processes
    rest = [first, *results]
    assert [result[0] for result in rest] == [3 * item for item in range(50)]
    assert {result[1] for result in rest} == {1}  # the initializer ran once in every process
    assert (os.getpid() in {result[2] for result in rest}) == (processes == 1)
    assert list(map_in_order(work, [], processes, start, (3,))) == []
