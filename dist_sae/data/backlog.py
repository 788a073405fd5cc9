"""Number of training units that are ready to be read."""

import logging
import threading
from collections.abc import Callable

from dist_sae.data.plan import Plan
from dist_sae.data.shard import MANIFESTS
from dist_sae.errors import StoreError
from dist_sae.storage import ObjectStore
from dist_sae.storage.keys import PAGE

logger = logging.getLogger(__name__)

LOOK_EVERY_SECONDS = 15.0
"""Time between two counts."""


class ReadyUnits:
    """Counts the existing training units regularly, in a thread.

    Producers work in plan order, so a count costs only a request or two. Complete pages of units
    are not listed again, and the count stops at the first empty page.

    Args:
        store: Object store of the activation set.
        on_count: Callback for the number of units, called from the thread.
    """

    def __init__(self, store: ObjectStore, plan: Plan, on_count: Callable[[int], None]) -> None:
        self._store = store
        self._plan = plan
        self._on_count = on_count
        self._complete_pages = 0
        self._over = threading.Event()
        # a daemon, because the process must not wait at its exit while the store retries
        self._thread = threading.Thread(target=self._look, name="backlog", daemon=True)

    def __enter__(self) -> "ReadyUnits":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def count(self) -> int:
        """Count the training units that exist now."""
        train = self._plan.train_units
        page, ready = self._complete_pages, self._complete_pages * PAGE
        while page * PAGE < len(train):
            found = sum(unit in train for unit in MANIFESTS.numbers(self._store, page))
            if not found:
                break
            if found == PAGE and page == self._complete_pages:
                self._complete_pages += 1
            page, ready = page + 1, ready + found
        return ready

    def _look(self) -> None:
        while True:
            try:
                self._on_count(self.count())
            except StoreError as exc:
                logger.warning("the ready units could not be counted: %s", exc)
            if self._over.wait(LOOK_EVERY_SECONDS):
                return
