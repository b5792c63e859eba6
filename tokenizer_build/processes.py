"""Work on a stream in several processes, with the results in the order of the stream."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def map_in_order(
    function: Callable, items: Iterable, processes: int, initializer: Callable | None = None, arguments: tuple = ()
) -> Iterator[Any]:
    """Yield `function(item)` of every item, in order, computed by `processes` processes (1: by this one).

    At most two items per process are in flight, so a stream is read no faster than it is worked on. `function` must be
    importable; `initializer(*arguments)` runs once in every process that works. Processes are spawned, not forked: the
    caller may have threads (torch, tokenizers and pyarrow start some), and forking those can hang.
    """
    if processes <= 1:
        if initializer:
            initializer(*arguments)
        yield from map(function, items)
        return
    waiting: deque = deque()
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer, arguments) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
