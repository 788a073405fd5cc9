"""Publishes a training job's metrics to Prometheus, its history and the terminal.

Most steps only update counts on the device and record a few timing marks. Everything that is
collective or waits for the device happens only every `train.log_every_steps` steps.
"""

import logging
import socket
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_sae import logs
from dist_sae.checkpoint.saver import Saved
from dist_sae.checkpoint.state import TrainingState
from dist_sae.config import Run
from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.dictionaries.density import DensityCounter
from dist_sae.dictionaries.interface import Output, Routing, Rows
from dist_sae.dictionaries.normaliser import SiteNormalisers
from dist_sae.distributed.mesh import Mesh
from dist_sae.errors import DistSaeError, Stopped
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.metric import COMPUTE_PHASES, DENSITIES, NEVER, PHASES, RARE
from dist_sae.telemetry.metrics import gauges, listed
from dist_sae.telemetry.sinks import Sink
from dist_sae.training.clock import Times, rows_per_worked_second
from dist_sae.training.health import training_warning
from dist_sae.training.limits import describe_slow
from dist_sae.training.numbers import (
    batch_numbers,
    expert_numbers,
    prefix_fvus,
    site_fvus,
    starved_share,
)
from dist_sae.training.phases import ProductSamples

logger = logging.getLogger(__name__)

_EDGES = [float(edge) for edge in DENSITIES if edge != NEVER]


@dataclass(eq=False)
class TrainingReporter:
    """Counts every step, and publishes metrics every `train.log_every_steps` steps."""

    run: Run
    mesh: Mesh
    telemetry: Telemetry
    """Exports the metrics."""
    times: Times
    """This rank's time by phase."""
    sinks: Sequence[Sink]
    """Outputs that rank 0 writes its records to; empty on other ranks."""
    state: TrainingState
    """The dictionary, its dead latents and its optimizer."""
    normalisers: SiteNormalisers
    reported: int
    """Step of the last report. Initially the number of steps already done."""
    role: str = "train"
    """Name under which progress is reported."""
    counted_rows: int = 0
    """Rows over which ancestors counted the latents' idle rows, if the counts were taken over."""
    last: dict[str, float] = field(default_factory=dict)
    """The last metrics reported."""

    def __post_init__(self) -> None:
        run, telemetry, device = self.run, self.telemetry, self.mesh.device
        self._mean = self.normalisers.mean.to(device)
        self._product = ProductSamples(self.state.sae, self.times.clock)
        self._densities = DensityCounter(
            len(self.state.sae.W_enc), run.dead_after_rows, self.mesh.axis, device
        )
        self._experts = ExpertLoads()
        self._warned = False
        self._counts: defaultdict[str, float] = defaultdict(float)
        telemetry.set(
            "dist_sae_train_info",
            1,
            kind=run.sae.kind,
            site=run.described_sites,
            device=device.type,
        )
        telemetry.set("dist_sae_train_latents", run.sae.n_latents)
        telemetry.set("dist_sae_train_step", self.reported)
        telemetry.set("dist_sae_train_steps", run.steps)

    def __enter__(self) -> "TrainingReporter":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None or isinstance(error, Stopped):
            self.times.take(self.run.name)
        for sink in self.sinks:
            sink.close()

    def end(self, phase: str) -> None:
        """End a phase of this job, and count the time since the last call as this phase."""
        self.times.end(phase, self.run.name)

    def step(
        self, step: int, rows: Rows, output: Output, *, lr: float, gradient_norm: float
    ) -> None:
        """Count a step. Every `log_every_steps`, gather and publish metrics, which is collective.

        Args:
            step: Steps done, including this one.
            rows: This rank's rows, normalized.
            output: The objective's output.
            lr: Learning rate of the update.
            gradient_norm: Norm of the gradient before clipping.
        """
        self.telemetry.liveness.idle()  # the pod is ready; the watch detects hung steps
        self._counts["dist_sae_train_stuck_latents_total"] += self.state.dead.n_stuck
        self._densities.add(output.firings, self.run.train.batch_rows)
        if output.routing:
            self._counts["dist_sae_train_dropped_rows_total"] += output.routing.dropped
            self._experts.add(output.routing)
        if step % self.run.train.log_every_steps == 0 or step == self.run.steps:
            axis = self.mesh.axis
            numbers, quantiles = batch_numbers(axis, output, rows.targets, self._mean)
            numbers |= {"gradient_norm": gradient_norm, "learning_rate": lr}
            by_label = {"explained_variance": quantiles}
            if len(self.normalisers.writes) > 1:
                by_label["site_fvu"] = site_fvus(axis, output.error, self.normalisers)
            if widths := self.run.sae.prefix_widths:
                by_label["prefix_fvu"] = prefix_fvus(axis, output, widths)
            self._product.sample(rows.inputs)
            self._publish(step, numbers, by_label)
        self.end("rest")

    def _publish(
        self, step: int, numbers: dict[str, float], by_label: Mapping[str, Mapping[str, float]]
    ) -> None:
        run, state, axis = self.run, self.state, self.mesh.axis
        second_moment = state.engine.moment(state.sae.W_enc, "exp_avg_sq")
        density = self._densities.counts(_EDGES, RARE)
        numbers |= {
            "rare_share": density.rare / run.sae.n_latents,
            "starved_share": starved_share(axis, second_moment, run.train.eps),
            **self._experts.take(axis, state.dead.mask),
        }
        if self.counted_rows + step * run.train.batch_rows >= run.dead_after_rows:
            numbers["dead_share"] = state.dead.share
        else:  # unknown until dead_after_rows rows have been counted
            numbers.pop("expert_dead_share", None)
        self.end("rest")
        phases, slow = self._of_all_ranks(self.times.take(self.run.name))
        seconds, steps = sum(phases.values()), step - self.reported
        self.reported = step
        rows = steps * run.train.batch_rows
        numbers["rows_per_second"] = rows / seconds
        numbers["worked_rows_per_second"] = rows_per_worked_second(rows, phases)
        self._product.cap(phases.get("forward", float("inf")) / steps)
        if self._product.seconds is not None:
            numbers["product_seconds"] = self._product.seconds
            numbers["product_share"] = self._product.seconds * steps / seconds
        self.last = numbers
        self._counts["dist_sae_train_rows_total"] += rows / self.mesh.world
        for name, value in self._counts.items():
            self.telemetry.add(name, value)
        self._counts.clear()
        self._record(
            {
                "step": step,
                "rows": step * run.train.batch_rows,
                "seconds": seconds,
                "wait_seconds": phases["wait"],
                **numbers,
                "phases": phases,
                **by_label,
                "density": dict(zip(DENSITIES, (density.never, *density.counts), strict=True)),
                "density_rows": density.rows,
            }
        )
        if self.mesh.is_first:
            names = [metric.short for metric in listed("progress") if metric.short in numbers]
            shown = {name: numbers[name] for name in names}
            logs.progress(self.role, step, run.steps, **shown, phases=phases, slow=slow)
            self._check_health(step, numbers)

    def _check_health(self, step: int, numbers: Mapping[str, float]) -> None:
        d_in = self.normalisers.widths.d_in
        found = None if self._warned else training_warning(self.run, d_in, step, numbers)
        if found:
            who = f"{self.run.name}: " if self.role != "train" else ""
            logger.warning("%safter %d of %d steps, %s", who, step, self.run.steps, found)
            self._warned = True

    def _record(self, record: Mapping[str, Any]) -> None:
        """Export a record's gauges, and append the record to the sinks, which only rank 0 has."""
        for name, value, labels in gauges("train", record):
            self.telemetry.set(name, value, **labels)
        for sink in self.sinks:
            sink.append(record)

    def _of_all_ranks(self, phases: Mapping[str, float]) -> tuple[dict[str, float], str | None]:
        """Return each phase's mean time over ranks, and a description of a slow rank. Collective.

        Times are averaged because a slow rank's `forward` appears as `ranks` on the ranks that wait
        for it. Rank 0 exports both.
        """
        mesh = self.mesh
        table = torch.zeros(mesh.world, len(PHASES), dtype=torch.float64)
        table[mesh.rank] = torch.tensor([phases.get(phase, 0.0) for phase in PHASES])
        table = mesh.axis.total(table.to(mesh.device)).cpu()
        mean = dict(zip(PHASES, table.mean(0).tolist(), strict=True))
        worked = table[:, [PHASES.index(phase) for phase in COMPUTE_PHASES]].sum(1)
        slowest = int(worked.argmax())
        ratio = float(worked[slowest] / worked.median())
        host = mesh.hosts[slowest] if mesh.hosts else socket.gethostname()
        if mesh.is_first:
            for phase, seconds in mean.items():
                share = seconds / sum(mean.values())
                self.telemetry.set("dist_sae_train_phase_share", share, phase=phase)
            self.telemetry.set_only(
                "dist_sae_train_slowest_ratio", ratio, slowest=str(slowest), host=host
            )
        return mean, describe_slow(str(slowest), host, ratio)

    def heldout(self, step: int, fvu: float | None) -> None:
        """Publish the held-out FVU at a step, if it was measured."""
        if fvu is not None:
            self._record({"step": step, "heldout_fvu": fvu})

    def failed(self, failure: DistSaeError) -> None:
        """Report that this job ends before its last step, while other jobs continue."""
        self.telemetry.ended(failure)
        logger.warning("%s failed, other jobs continue: %s", self.run.name, failure)

    def saved(self, saved: Saved) -> None:
        """Export the metrics of a checkpoint that is now durable. Called in the saver's thread."""
        self.telemetry.set("dist_sae_checkpoint_step", saved.step)
        self.telemetry.set("dist_sae_checkpoint_timestamp_seconds", time.time())
        self.telemetry.set("dist_sae_checkpoint_seconds", saved.seconds)
        self.telemetry.set("dist_sae_checkpoint_bytes", saved.bytes)
        self.telemetry.life.progressed()

    def flush(self) -> None:
        """Make all records so far durable. Called in the saver's thread."""
        for sink in self.sinks:
            sink.flush()


class ExpertLoads:
    """Counts the rows that a routed dictionary sent to each expert since the last report."""

    def __init__(self) -> None:
        self._load: Tensor | None = None
        self._idle: list[int] = []

    def add(self, routing: Routing) -> None:
        self._load = routing.load if self._load is None else self._load + routing.load

    def take(self, axis: LatentAxis, dead: Tensor) -> dict[str, float]:
        """Return metrics since the last call; empty without experts. Collective."""
        if self._load is None:
            return {}
        numbers, idle = expert_numbers(axis, self._load, dead)
        if idle and idle != self._idle:
            logger.warning(
                "experts %s got no rows since the last report; raise sae.balance_coefficient or "
                "try sae.balance: bias",
                ", ".join(map(str, idle)),
            )
        self._load, self._idle = None, idle
        return numbers
