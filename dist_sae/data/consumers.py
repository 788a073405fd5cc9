"""Progress of each training run, which decides when producers wait and which shards are deleted.

    consumers/<run>.json    rewritten while the run is alive, even while it waits for data; its
                            age, by the store's clock, shows whether the run is alive
    retired.json            a number that never decreases: shards of units below it are deleted

A run is abandoned if it has not rewritten its object for `store.consumer_expiry_hours`. Producers
then no longer wait for it, and no shards are retained for it.
"""

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Literal

from dist_sae.config import Run
from dist_sae.data.plan import Plan
from dist_sae.data.shard import read_manifest
from dist_sae.data.streams import StreamCursor
from dist_sae.errors import ConfigError, DataExhaustedError, ObjectNotFoundError, StoreError
from dist_sae.storage import Entry, ObjectStore
from dist_sae.storage.keys import KeyPattern, warn_of_foreign
from dist_sae.storage.records import Record, read_record, seal

logger = logging.getLogger(__name__)

_CONSUMERS = KeyPattern("consumers/", r"(?P<run>[a-z0-9.-]+)\.json")
_RETIRED_KEY = "retired.json"
_RENEW_SECONDS = 600.0
_RETIRED_AT_ONCE = 256  # units
_READERS = 16  # threads that read manifests


class Consumer(Record):
    """Position of a training run in the data: content of `consumers/<run>.json`."""

    schema_version: Literal[1] = 1
    run: str
    reached: int
    """Lowest unit that the run is reading. `store.max_ahead_units` counts from this unit."""
    needed: int
    """Lowest unit that the run may still need. Usually the lowest unit of the checkpoint before its
    last one, in case the last one is damaged."""


class Retired(Record):
    """Number of units whose shards are deleted: content of `retired.json`."""

    schema_version: Literal[1] = 1
    below: int
    """Lowest unit whose shards are not deleted. The manifests of earlier units remain."""


def retired_below(store: ObjectStore) -> int:
    """Return the unit below which all shards have been deleted."""
    try:
        return read_record(Retired, store, _RETIRED_KEY).below
    except ObjectNotFoundError:
        return 0


def kept_units(store: ObjectStore, plan: Plan) -> range:
    """Return the training units whose shards have not been deleted."""
    return plan.train_units[retired_below(store) :]


def lowest_unit(plan: Plan, cursors: Mapping[int, StreamCursor], *, multi_pass: bool) -> int:
    """Return the lowest unit of the windows that the cursors point to.

    After its only pass, a stream may read its last window again, so that window still counts. If
    there are several passes (`multi_pass`), all units have been read once when a stream begins its
    second pass, so its position is then past all units.
    """
    return min(
        (
            plan.n_train_units
            if cursor.data_pass and multi_pass
            else stream + plan.streams * cursor.first
            for stream, cursor in cursors.items()
        ),
        default=0,
    )


def check_ahead(run: Run, plan: Plan, rows: int, first: int = 0) -> None:
    """Check that `store.max_ahead_units` lets training take its first step.

    Args:
        run: Run, resolved by its plan.
        rows: Rows that the run reads before it reports progress.
        first: First unit that the run reads.

    Raises:
        ConfigError: The limit is so low that producers and the run would wait for each other.
    """
    units = plan.rows_of_units[first : plan.n_train_units]
    if problem := run.ahead_problem(rows, plan.first_windows, units, most=len(units)):
        raise ConfigError(f"store.max_ahead_units: {problem}")


class Consumers:
    """Training runs that read an activation set.

    Args:
        store: Object store of the activation set.
        expiry_hours: Hours without a report after which a run counts as abandoned.
    """

    def __init__(self, store: ObjectStore, expiry_hours: float) -> None:
        self._store = store
        self._expiry_seconds = 3600 * expiry_hours
        self.renew_seconds = min(_RENEW_SECONDS, self._expiry_seconds / 3)
        """Time between reports of a live run, even if it has made no progress."""
        self._abandoned: set[str] = set()

    def report(self, run: str, *, reached: int, needed: int) -> None:
        """Report how far a run has come; the first report registers it."""
        consumer = Consumer(run=run, reached=reached, needed=needed)
        self._store.put(f"{_CONSUMERS.folder}{run}.json", seal(consumer))

    def all(self) -> list[tuple[Consumer, Entry]]:
        """Return every run that ever registered, with the listing entry of its object."""
        found = []
        for key, entry in list(_CONSUMERS.entries(self._store)):
            try:
                consumer = read_record(Consumer, self._store, entry.key)
            except ObjectNotFoundError:  # deleted after it was listed
                continue
            if consumer.run == key["run"]:
                found.append((consumer, entry))
            else:
                warn_of_foreign(self._store, _CONSUMERS.folder, entry.key)  # a copied object
        return found

    def is_abandoned(self, entry: Entry) -> bool:
        """Return whether the run that wrote this object counts as abandoned."""
        return entry.age_seconds > self._expiry_seconds

    def alive(self) -> list[Consumer]:
        """Return the runs that are not abandoned."""
        alive = []
        for consumer, entry in self.all():
            if not self.is_abandoned(entry):
                alive.append(consumer)
            elif consumer.run not in self._abandoned:
                self._abandoned.add(consumer.run)
                logger.warning(
                    "run %s has not reported for %.0f h and is considered abandoned",
                    consumer.run,
                    entry.age_seconds / 3600,
                )
        return alive

    def slowest(self) -> tuple[int, str]:
        """Return the unit and name of the slowest live run.

        If all runs are abandoned, return those of the run that has come furthest.
        """
        alive = self.alive()
        if alive:
            return min((consumer.reached, consumer.run) for consumer in alive)
        gone = [(consumer.reached, consumer.run) for consumer, _ in self.all()]
        return max(gone, default=(0, "the first run to start"))

    def check_present(self, run: str, needed: int) -> None:
        """Check that no shard that a run is going to read has been deleted.

        Raises:
            DataExhaustedError: A shard has been deleted.
        """
        below = retired_below(self._store)
        if needed < below:
            raise DataExhaustedError(
                f"{self._store.url}: run {run} starts at unit {needed}, but units below {below} "
                f"were deleted after use (store.retention: delete_consumed); create "
                f"another activation set, with retention keep or with all its runs started together"
            )

    def retire(self, plan: Plan, stopping: threading.Event | None = None) -> int:
        """Delete the shards that no run will read again.

        The manifests remain, so that no producer produces the units again.

        Args:
            stopping: Event after which the remaining shards are left to the next call.

        Returns:
            The unit below which shards are deleted; 0 if this call deleted none.
        """
        below = 0
        while stopping is None or not stopping.is_set():
            # looked up again for each part, because runs may register in the meantime
            first = retired_below(self._store)
            needed = min((consumer.needed for consumer in self.alive()), default=0)
            last = min(needed, plan.n_train_units, first + _RETIRED_AT_ONCE)
            if last <= first:
                break
            # after a crash below, the remaining shards are orphans, which `store gc` deletes
            self._store.put(_RETIRED_KEY, seal(Retired(below=last)))
            with ThreadPoolExecutor(_READERS) as pool:
                shards = pool.map(self._shards, range(first, last))
                self._store.delete_many([key for keys in shards for key in keys])
            below = last
        return below

    def _shards(self, unit: int) -> list[str]:
        """Return the keys of a unit's shards; no keys if the unit was never produced."""
        try:
            return [shard.key for shard in read_manifest(self._store, unit).sites.values()]
        except ObjectNotFoundError:  # a run may end before all units are produced
            return []


class Registration:
    """Reports a run's progress to producers and to other runs.

    As a context manager, it regularly repeats the last report in a thread, because a run may wait
    for data for longer than `store.consumer_expiry_hours`.

    Args:
        consumers: Runs that read the activation set.
        multi_pass: Whether the run makes several passes, and so needs all units until it has ended.
        retires: Whether to delete shards that no run needs any more.
        reports: Whether this rank reports; only one rank of a run does.
    """

    def __init__(
        self,
        consumers: Consumers,
        plan: Plan,
        run: str,
        *,
        multi_pass: bool,
        retires: bool,
        reports: bool = True,
    ) -> None:
        self._consumers = consumers
        self._plan = plan
        self._run = run
        self._multi_pass = multi_pass
        self._retires = retires and reports
        self._reports = reports
        self._reached = self._needed = self._previous = 0
        self._is_registered = False
        self._reporting = threading.Lock()
        self._over = threading.Event()
        self._failed = threading.Event()
        self._retiring = ThreadPoolExecutor(1, "retire")
        self._retirements: list[Future[None]] = []
        # a daemon, because the process must not wait at its exit while the store retries
        self._thread = threading.Thread(target=self._renew, name="consumer", daemon=True)

    def __enter__(self) -> "Registration":
        if self._reports:
            self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._over.set()
        if error is not None:
            self._failed.set()
        self._retiring.shutdown()
        if error is None:
            self.finish()

    @property
    def reached(self) -> int:
        """Lowest unit that the run is reading; it has read all earlier units in plan order."""
        return self._reached

    def register(self, cursors: Mapping[int, StreamCursor], *, ended: bool = False) -> None:
        """Register the run, and check that the shards it is going to read still exist.

        Args:
            cursors: Cursors of the run's last checkpoint; empty if it has no checkpoint.
            ended: Whether that checkpoint is the run's final one, so that it reads nothing more.

        Raises:
            DataExhaustedError: Shards that the run is going to read have been deleted.
        """
        self._reached, self._previous = 0, self._lowest(cursors)
        self.checkpointed(cursors, ended=ended)
        self._consumers.check_present(self._run, self._needed)

    def advance(self, cursors: Mapping[int, StreamCursor]) -> None:
        """Report the run's position if it has moved to another unit."""
        reached = self._lowest(cursors)
        if reached != self._reached:
            self._reached = reached
            self._report()

    def checkpointed(self, cursors: Mapping[int, StreamCursor], *, ended: bool = False) -> None:
        """Report the position from which a new checkpoint would resume.

        Units that the previous checkpoint needs are also retained, because the new checkpoint may
        turn out to be damaged. Shards that no run needs any more are deleted in a thread; see
        `finish`.

        Args:
            cursors: Cursors of the checkpoint.
            ended: Whether the run reads nothing more.

        Raises:
            StoreError: An earlier deletion failed.
        """
        lowest = self._plan.n_train_units if ended else self._lowest(cursors)
        self._reached = max(self._reached, lowest)
        previous, self._previous = self._previous, lowest
        self._needed = lowest if ended else 0 if self._multi_pass else previous
        self._report()
        if self._retires:
            # in a thread, so that a slow deletion does not delay the run
            self._retirements.append(self._retiring.submit(self._retire))
            self._raise_failures()

    def finish(self) -> None:
        """Wait until the shards that no run needs any more are deleted.

        Raises:
            StoreError: A shard could not be deleted.
        """
        wait(self._retirements)
        self._raise_failures()

    def _raise_failures(self) -> None:
        for retirement in [each for each in self._retirements if each.done()]:
            self._retirements.remove(retirement)
            retirement.result()

    def _retire(self) -> None:
        if below := self._consumers.retire(self._plan, self._failed):
            logger.info("deleted the shards of units below %d", below)

    def _lowest(self, cursors: Mapping[int, StreamCursor]) -> int:
        return lowest_unit(self._plan, cursors, multi_pass=self._multi_pass)

    def _report(self) -> None:
        self._is_registered = True
        if self._reports:
            with self._reporting:  # or the thread could overwrite a newer report with an older one
                self._consumers.report(self._run, reached=self._reached, needed=self._needed)

    def _renew(self) -> None:
        while not self._over.wait(self._consumers.renew_seconds):
            try:
                if self._is_registered:
                    self._report()
            except StoreError as exc:
                logger.warning("the run's progress could not be reported again: %s", exc)
