"""A small activation set whose rows are numbered: 16 training units in 4 streams, 3 at a time."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_sae.config import Run
from dist_sae.errors import ObjectNotFoundError
from dist_sae.storage import ObjectStore
from tests.world import Wrapped


@dataclass
class World:
    """An activation set of `make_run`, filled by `RowNumbers`."""

    run: Run
    store: ObjectStore
    stream_rows: list[int]
    """Rows of each stream in one pass."""

    @property
    def full_batches(self) -> int:
        return min(self.stream_rows) // 16


def ids(acts: Tensor | list[Tensor]) -> list[int]:
    return [int(i) for i in (acts if isinstance(acts, Tensor) else torch.cat(acts))[:, 0]]


class LateUnits(Wrapped):
    """A store whose units appear one by one, in random order, each time a reader misses one."""

    def __init__(self, store: ObjectStore, seed: int) -> None:
        super().__init__(store)
        self.hidden = sorted(key for key in store.keys("units/"))
        random.Random(seed).shuffle(self.hidden)
        self.misses = 0

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        if key in self.hidden:
            self.misses += 1
            self.hidden.pop()
            raise ObjectNotFoundError("no such object", url=self.url, key=key)
        return super().get(key, start, stop)
