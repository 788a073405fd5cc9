"""Memory use of a call, measured in a separate process."""

import ctypes
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil

from dist_sae.bench.measuring import peak_memory
from tests.forks import processes

MIB = 2**20
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
_PR_SET_THP_DISABLE = 41  # of Linux's prctl


def anonymous_bytes() -> int:
    """Return this process's memory without files and shared memory."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def peak_bytes(call: Callable[..., Any], first: tuple[Any, ...], then: tuple[Any, ...]) -> int:
    """Measure a call's peak memory in addition to that after a first call, which loads libraries.

    Args:
        call: A module-level function.
        first: Arguments of the first call.
        then: Arguments of the measured call.
    """
    here, there = processes.Pipe(duplex=False)
    process = processes.Process(target=_measure, args=(there, call, first, then), daemon=True)
    process.start()
    there.close()
    measured: int = here.recv()
    process.join()
    return measured


def _measure(
    answer: Connection, call: Callable[..., Any], first: tuple[Any, ...], then: tuple[Any, ...]
) -> None:
    # mmap large blocks, because otherwise it is random how much freed memory the process keeps
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, MIB // 4)
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)  # huge pages would round up the size of blocks
    call(*first)
    before = anonymous_bytes()
    with peak_memory(anonymous_bytes) as peak:
        call(*then)
    answer.send(peak[0] - before)
