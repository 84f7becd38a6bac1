"""The same function on many chunks, in several processes, results in order.

In:  a function, an object that all its calls share, an iterable of chunks. Out: an iterator of results.
Does not know what the chunks are.
"""

import gc
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from .sentencepiece_model import TokenizerError

_shared = None  # in a worker process: the object it was started with


def map_in_order(work: Callable, shared, chunks: Iterable, processes: int = 1) -> Iterator:
    """`work(shared, chunk)` of every chunk, in the order of the chunks.

    Chunks are read as results are consumed, 2 * processes + 1 of them at most ahead.

    Args:
        work: a function at the top of a module.
        shared: sent to each worker once, at its start (with "fork" it is there already and nothing is sent).
        chunks: any iterable.
        processes: 1 for none but this one; more start that many workers.

    Returns:
        an iterator of results.

    Raises:
        TokenizerError: a worker was killed. What `work` raises is raised here.
    """
    if processes <= 1:
        yield from (work(shared, chunk) for chunk in chunks)
        return
    # Not multiprocessing.Pool: it waits for ever for a worker that the system killed.
    with ProcessPoolExecutor(processes, initializer=_start, initargs=(shared,)) as pool:
        waiting = deque()
        try:
            # Some chunks ahead, so that no worker waits for the one whose result is next; not all, for memory.
            for chunk in chunks:
                waiting.append(pool.submit(_call, work, chunk))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise TokenizerError("a worker process was killed -- out of memory? fewer --processes need less") from None
        finally:
            # The reader of the results may have had enough.
            for future in waiting:
                future.cancel()


def _start(shared) -> None:
    global _shared
    _shared = shared
    threading.Thread(target=_follow_parent, daemon=True).start()
    # What is there stays: the collector need not look through a vocabulary again and again.
    gc.freeze()


def _follow_parent() -> None:
    """A worker whose parent was killed would wait for work for ever, and hold its memory."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(work: Callable, chunk):
    return work(_shared, chunk)
