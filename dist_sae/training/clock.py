"""Measures and exports where a rank's time goes, beginning with the setup of training."""

from collections import defaultdict
from collections.abc import Mapping

import torch

from dist_sae import logs
from dist_sae.distributed import axis
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.metric import NON_STEP_PHASES
from dist_sae.training.phases import Clock, Phases


class Times:
    """This rank's time by job and phase (`telemetry.metric.PHASES`).

    Args:
        device: The device whose clock is used.
        telemetry: Metrics exporter of each job, by job name.
    """

    step: int = 0
    """Steps done."""
    steps: int = 0
    """Total steps of the run; 0 until they are known."""

    def __init__(self, device: torch.device, telemetry: Mapping[str, Telemetry]) -> None:
        self.clock = Clock(device)
        self._telemetry = telemetry
        self._phases = Phases(self.clock, *telemetry)
        self._exchanged = axis.seconds
        axis.mark = self.clock.mark if self.clock.is_cuda else None
        axis.take_spans()
        self._exported_early = {job: defaultdict[str, float](float) for job in telemetry}
        """Seconds by job and phase that were exported since the job's last report."""
        self._waited = 0.0
        """Seconds of the current wait for data that this rank has already reported."""

    def end(self, phase: str, job: str | None = None, *, waited: float = 0.0) -> None:
        """End a phase, and count the time since the last call as this phase.

        Time inside collectives counts as `ranks`. On a GPU, this time is measured between marks of
        the GPU's clock.

        Args:
            phase: Name of the phase.
            job: Name of the job that the phase belongs to; None if it belongs to all jobs.
            waited: Maximum seconds of the phase that count as `wait`, because another rank waited
                for data.
        """
        exchanged, self._exchanged = axis.seconds - self._exchanged, axis.seconds
        in_ranks = {} if self.clock.is_cuda else {"ranks": exchanged}
        self._phases.end(phase, job, {"wait": waited} | in_ranks, axis.take_spans())
        if self._waited:
            self._waited = 0.0
            self._report_waiting()

    def count_wait(self, seconds: float) -> None:
        """Count the seconds for which this rank has waited in the current wait for data."""
        # fewer seconds than reported before: a new wait, such as for the normalisers' next unit
        since = self._waited if self._waited <= seconds else 0.0
        for telemetry in self._telemetry.values():
            telemetry.add("dist_sae_train_wait_seconds_total", seconds - since)

    def report_wait(self, seconds: float) -> None:
        """Report `seconds` of an ongoing wait for data. The next regular report may be far away."""
        self._phases.end("wait")
        self.count_wait(seconds)
        for job, early in self._exported_early.items():
            for phase, spent in self._export(job).items():
                early[phase] += spent
        self._waited = seconds
        self._report_waiting()

    def take(self, job: str) -> dict[str, float]:
        """Return a job's seconds by phase since its last `take`. On a GPU, wait for the device."""
        spent = self._export(job)
        early, self._exported_early[job] = self._exported_early[job], defaultdict(float)
        return {phase: spent.get(phase, 0.0) + early.get(phase, 0.0) for phase in {*spent, *early}}

    def _export(self, job: str) -> dict[str, float]:
        phases, telemetry = self._phases.take(job), self._telemetry[job]
        telemetry.add("dist_sae_train_step_seconds_total", sum(phases.values()))
        telemetry.add("dist_sae_train_save_stall_seconds_total", phases.get("save", 0.0))
        for phase, seconds in phases.items():
            telemetry.add("dist_sae_train_phase_seconds_total", seconds, phase=phase)
        return phases

    def _report_waiting(self) -> None:
        if logs.is_supervised():
            logs.progress("train", self.step, self.steps, waiting_seconds=self._waited)


def rows_per_worked_second(rows: int, phases: Mapping[str, float]) -> float:
    """Return rows per second of the time spent in steps, without `NON_STEP_PHASES`."""
    worked = sum(seconds for phase, seconds in phases.items() if phase not in NON_STEP_PHASES)
    return rows / worked
