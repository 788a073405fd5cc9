"""A run's state in its stores. Requests to an unreachable store are not retried."""

import threading
from functools import cached_property
from typing import Any

from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.run_folder import started_run
from dist_sae.config import Run, jobs_of
from dist_sae.config.fingerprint import PLAN_SECTIONS, as_begun, changes, run_fingerprint
from dist_sae.data.consumers import Consumers
from dist_sae.data.identity import moved_paths, plan_settings, setting_changes
from dist_sae.data.plan import PLAN_KEY, Plan, load_plan, resolve_from_plan
from dist_sae.data.shard import existing_units
from dist_sae.errors import HubUnavailableError, PlanMismatchError, StoreError
from dist_sae.index.progress import index_progress
from dist_sae.report.build import report_key
from dist_sae.storage import ObjectStore, open_store
from dist_sae.telemetry.history import read_history


class StoredRun:
    """A run's objects in `store.runs` and `store.activations`."""

    def __init__(self, run: Run) -> None:
        no_retries = threading.Event()
        no_retries.set()
        self._run = run
        self._runs, self._activations = (
            open_store(url, run.store.s3, None, no_retries)
            for url in (run.store.runs, run.store.activations)
        )
        self._checkpoints = Checkpoints(self._runs, run.name, run.train.keep_checkpoints)
        self.url = f"{self._runs.url}/{run.name}"
        self.jobs = {job.name: StoredRun(job) for job in jobs_of(run)} if run.sweep else {}
        """Jobs of a sweep by run name; empty for a single run."""

    @property
    def steps(self) -> int | None:
        """Steps of the whole run; None if they depend on a plan that does not exist yet.

        For a sweep, the steps of its longest job.
        """
        if self.jobs:
            steps = [job.steps for job in self.jobs.values()]
            return None if None in steps else max(filter(None, steps))
        if self._run.train.rows == "all" and (started := self.started_run()):
            # for a child run, "all" means the rows that its parent left
            self._run = self._run.filled(started.model_dump(mode="json"))
        if self._run.train.rows == "all" and (
            resolved := resolve_from_plan(self._run, self._activations)
        ):
            self._run = resolved
        return None if self._run.train.rows == "all" else self._run.steps

    def started_run(self) -> Run | None:
        """Return the run file with which training last started, or None before the first start."""
        return started_run(self._runs, self._run.name)

    def is_planned(self) -> bool:
        """Return whether the activation set has a plan, even one with other settings."""
        return self._activations.size(PLAN_KEY) is not None

    def is_complete(self) -> bool:
        """Return whether training is complete, and the index and the report if the run has them.

        A report older than the last checkpoint does not count. A sweep is complete if all of its
        jobs are.
        """
        if self.jobs:
            return all(job.is_complete() for job in self.jobs.values())
        key = report_key(self._run)
        reports = {entry.age_seconds for entry in self._runs.entries(key) if entry.key == key}
        ages = self._checkpoints.ages()  # read after the reports, else a new report can look older
        trained = None if self.steps is None else ages.get(self.steps)
        if trained is None or not self._is_indexed():
            return False
        if self._run.cluster.reporter is None:
            return True
        return any(age <= trained for age in reports)

    def changes(self, other: Run | None) -> list[str]:
        """List settings that affect the outcome and differ between this run file and another.

        Text and model are compared by content if there is a plan, else by their resolved paths.
        Jobs of two sweeps are compared by name. A job that only one of them has is no difference.
        """
        if other is None:
            return []
        if (other.sweep is None) != (self._run.sweep is None):
            return ["sweep: only one of the two runs is a sweep"]
        if self.jobs:
            theirs = {job.name: job for job in jobs_of(other)}
            return [
                f"{name}: {line}"
                for name, job in self.jobs.items()
                for line in job.changes(theirs.get(name))
            ]
        stored = run_fingerprint(other)
        run = as_begun(self._run, stored)
        changed = changes(stored, run, but=PLAN_SECTIONS)
        changed += setting_changes(plan_settings(other), plan_settings(run))
        if moved := moved_paths(other, run):
            try:
                load_plan(self._activations, run)
            except (PlanMismatchError, StoreError, HubUnavailableError):  # also if there is no plan
                changed += moved
        return changed

    def progress(self) -> dict[str, Any]:
        """Return the progress of producers, trainers and the index, from their stored objects.

        Without a valid plan, `plan` is the error message, and there are no counts of units.
        """
        ages = self._checkpoints.ages()
        newest = max(ages, default=None)
        if self.jobs:
            return {
                "jobs": {name: job.progress() for name, job in self.jobs.items()},
                **self._units(),
            }
        return {
            **self._units(),
            "steps": self.steps,
            "checkpoint_step": newest,
            "checkpoint_age_seconds": None if newest is None else ages[newest],
            "index": None if newest is None else self._index(newest),
        }

    def last_numbers(self) -> dict[str, Any] | None:
        """Return the last metrics in the run's history, or None if there are none."""
        history = read_history(self._runs, self._run.name)
        return next((record for record in reversed(history) if "fvu" in record), None)

    def _is_indexed(self) -> bool:
        """Return whether the last step's index is complete, or the run has no index."""
        if not self._run.index.workers or self.steps is None:
            return not self._run.index.workers
        progress = index_progress(self._runs, self._run, self.steps)
        return progress is not None and progress.is_complete(self._run, self.steps)

    def _index(self, step: int) -> dict[str, int] | None:
        progress = index_progress(self._runs, self._run, step)
        if progress is None:
            return None
        return {
            "units": len(progress.manifest.units),
            "encoded_units": progress.units,
            "buckets": progress.manifest.n_buckets,
            "merged_buckets": progress.buckets,
        }

    @cached_property
    def _plan(self) -> Plan:
        return load_plan(self._activations, self._run)

    def _units(self) -> dict[str, Any]:
        store: ObjectStore = self._activations
        try:
            plan = self._plan
        except PlanMismatchError as exc:  # also if there is no plan yet
            return {"plan": str(exc)}
        ready = sum(unit in plan.train_units for unit in existing_units(store))
        consumers = Consumers(store, self._run.store.consumer_expiry_hours).all()
        names = self.jobs or [self._run.name]
        reached = min((c.reached for c, _ in consumers if c.run in names), default=0)
        return {
            "plan": plan.hash,
            "units": plan.n_train_units,
            "ready_units": ready,
            "reached_unit": reached,
            "backlog_units": max(0, ready - reached),
        }
