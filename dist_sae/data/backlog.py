"""Number of units that are ready for a run to read."""

import logging
import threading
from collections.abc import Callable

from dist_sae.data.plan import Plan
from dist_sae.data.shard import MANIFESTS
from dist_sae.errors import StoreError
from dist_sae.storage import ObjectStore
from dist_sae.storage.own import PAGE

logger = logging.getLogger(__name__)

LOOK_EVERY_SECONDS = 15.0
"""Time between two looks at the store."""


class ReadyUnits:
    """Counts the existing training units in a thread.

    Producers work in the order of the plan, so a look costs a request or two: complete pages of
    units are not listed again, and nothing is listed after an empty page.

    Args:
        store: The activation set.
        show: Called from the thread with the number of units.
    """

    def __init__(self, store: ObjectStore, plan: Plan, show: Callable[[int], None]) -> None:
        self._store = store
        self._plan = plan
        self._show = show
        self._complete_pages = 0
        self._over = threading.Event()
        # a daemon, because the store may retry for longer than anyone waits for this number
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
                self._show(self.count())
            except StoreError as exc:
                logger.warning("the number of ready units is not known: %s", exc)
            if self._over.wait(LOOK_EVERY_SECONDS):
                return
