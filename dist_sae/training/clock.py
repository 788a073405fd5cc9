"""Where a rank's time goes, from the moment that training is begun: counted, exported, told."""

from collections import defaultdict
from collections.abc import Mapping

import torch

from dist_sae import logs
from dist_sae.distributed import axis
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.metrics import STANDING
from dist_sae.training.phases import Clock, Phases


class Times:
    """This rank's time by phase (`telemetry.metric.PHASES`).

    Args:
        telemetry: Takes the metrics.
        device: Whose time it is.
    """

    step: int = 0
    """Steps done."""
    steps: int = 0
    """Steps in all, once the plan has decided them."""

    def __init__(self, telemetry: Telemetry, device: torch.device) -> None:
        self.clock = Clock(device)
        self._telemetry = telemetry
        self._phases = Phases(self.clock)
        self._exchanged = axis.seconds
        self._told: defaultdict[str, float] = defaultdict(float)
        """Seconds by phase since the last report that were exported before it."""
        self._waited = 0.0
        """How long this rank has said that it waits."""

    def end(self, phase: str, *, waited: float = 0.0) -> None:
        """What was done since the last call was this phase.

        Time in collectives is `ranks`: on a CPU, where they are waited for. A GPU's clock knows
        nothing of the seconds in which they are begun.

        Args:
            phase: What to call it.
            waited: Seconds of it, at most, for which another rank waited for its data: `wait`.
        """
        exchanged, self._exchanged = axis.seconds - self._exchanged, axis.seconds
        in_ranks = {} if self.clock.is_cuda else {"ranks": exchanged}
        self._phases.end(phase, {"wait": waited} | in_ranks)
        if self._waited and phase == "wait":
            self._waited = 0.0
            self._say_waiting()

    def waiting(self, seconds: float) -> None:
        """There is no data yet: says so now, since the next report may be far away."""
        self._phases.end("wait")
        for phase, spent in self._export(self._phases.take()).items():
            self._told[phase] += spent
        self._waited = seconds
        self._say_waiting()

    def take(self) -> dict[str, float]:
        """Seconds since the last call, by phase. On a GPU this waits for it."""
        spent = self._export(self._phases.take())
        told, self._told = self._told, defaultdict(float)
        return {phase: spent.get(phase, 0.0) + told.get(phase, 0.0) for phase in {*spent, *told}}

    def _export(self, phases: dict[str, float]) -> dict[str, float]:
        telemetry = self._telemetry
        telemetry.add("dist_sae_train_step_seconds_total", sum(phases.values()))
        telemetry.add("dist_sae_train_save_stall_seconds_total", phases.get("save", 0.0))
        for phase, seconds in phases.items():
            telemetry.add("dist_sae_train_phase_seconds_total", seconds, phase=phase)
        return phases

    def _say_waiting(self) -> None:
        if logs.is_supervised():
            logs.progress("train", self.step, self.steps, waiting_seconds=self._waited)


def rows_per_worked_second(rows: int, phases: Mapping[str, float]) -> float:
    """The pace of the steps themselves, without the time in which there were none."""
    worked = sum(seconds for phase, seconds in phases.items() if phase not in STANDING)
    return rows / worked
