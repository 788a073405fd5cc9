"""Memory that a call takes, measured in a process of its own."""

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
    """Memory of this process that is not of files."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def peak_bytes(call: Callable[..., Any], first: tuple[Any, ...], then: tuple[Any, ...]) -> int:
    """Peak of a call beyond what its process has after a first call, which loads libraries.

    Args:
        call: A function of a module.
        first: Arguments of the first call.
        then: Arguments of the call that is measured.
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
    # large blocks are mapped: or how much of what is freed stays is a matter of chance
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, MIB // 4)
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)  # where they are on, blocks take more than they say
    call(*first)
    before = anonymous_bytes()
    with peak_memory(anonymous_bytes) as peak:
        call(*then)
    answer.send(peak[0] - before)
