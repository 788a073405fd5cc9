"""Numbers about a training run, for people."""

import logging
import time

import torch
from torch import Tensor

from dist_sae import logs
from dist_sae.checkpoint.saver import Saved
from dist_sae.checkpoint.state import TrainingState
from dist_sae.config import Run
from dist_sae.data.loader import Batch
from dist_sae.parallel.mesh import Mesh
from dist_sae.sae.base import Output
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.history import History

logger = logging.getLogger(__name__)

_FAR_ABOVE_EPS = 10


class TrainingReporter:
    """Into Prometheus, the run's history and the progress bar."""

    def __init__(
        self, run: Run, mesh: Mesh, telemetry: Telemetry, history: History, start: int
    ) -> None:
        self._run = run
        self._mesh = mesh
        self._telemetry = telemetry
        self._history = history
        self._since = (start, time.monotonic())
        self._waited = 0.0
        self._load: Tensor | None = None
        """Rows that each expert of a routed dictionary was sent since the last report."""
        self._idle_experts: list[int] = []
        self.last: dict[str, float] = {}
        telemetry.set("dist_sae_train_steps", run.steps)

    def step(
        self,
        step: int,
        batch: Batch,
        output: Output,
        state: TrainingState,
        *,
        lr: float,
        gradient_norm: float,
    ) -> None:
        """Count a step; every `log_every_steps`, gather and publish. Collective then."""
        self._waited += batch.waited_seconds
        self._telemetry.add("dist_sae_train_stuck_latents_total", state.dead.n_stuck)
        if routing := output.routing:
            self._telemetry.add("dist_sae_train_dropped_rows_total", routing.dropped)
            self._load = routing.load if self._load is None else self._load + routing.load
        if step % self._run.train.log_every_steps and step != self._run.steps:
            return
        axis, terms = self._mesh.axis, output.terms
        active = output.active / (len(batch.acts) * axis.shards)
        local = [terms.fvu.detach(), terms.auxk.detach(), terms.sparsity.detach(), active]
        fvu, auxk, sparsity, l0 = (axis.total(torch.stack(local)) / axis.replicas).tolist()
        first, then = self._since
        seconds = time.monotonic() - then
        self._since = (step, time.monotonic())
        rows = (step - first) * self._run.train.batch_rows
        numbers = {
            "fvu": fvu,
            "auxk_loss": auxk,
            "sparsity_loss": sparsity,
            "l0_latents": l0,
            "dead_share": state.dead.share,
            "starved_share": self._starved_share(state),
            "gradient_norm": gradient_norm,
            "learning_rate": lr,
            "rows_per_second": rows / seconds,
        }
        if self._load is not None:
            numbers |= self._of_experts(self._load, state)
            self._load = None
        self.last = numbers
        self._publish(step, rows, seconds, numbers)
        self._waited = 0.0

    def _starved_share(self, state: TrainingState) -> float:
        """Of all latents: those whose encoder row learns as fast as eps, not Adam, lets it."""
        variance = state.engine.moment(state.sae.W_enc, "exp_avg_sq").mean(dim=1)
        starved = (variance.sqrt() < _FAR_ABOVE_EPS * self._run.train.eps).sum()
        return int(self._mesh.axis.total(starved)) / (
            self._mesh.axis.replicas * state.sae.n_latents
        )

    def _of_experts(self, load: Tensor, state: TrainingState) -> dict[str, float]:
        """How evenly rows were sent, and how the worst expert fares. Collective."""
        axis = self._mesh.axis
        idle = (load == 0).nonzero()[:, 0].tolist()
        if idle and idle != self._idle_experts:
            logger.warning(
                "experts %s got no row since the last report; raise sae.balance_coefficient or try "
                "sae.balance: bias",
                ", ".join(map(str, idle)),
            )
        self._idle_experts = idle
        here = state.dead.mask.view(len(load) // axis.shards, -1).double().mean(1)
        dead = here.new_zeros(len(load))
        dead[axis.shard * len(here) :][: len(here)] = here
        return {
            "expert_load_ratio": float(load.max() / load.double().mean()),
            "idle_experts": float(len(idle)),
            "expert_dead_share": float(axis.total(dead).max()) / axis.replicas,
        }

    def _publish(self, step: int, rows: int, seconds: float, numbers: dict[str, float]) -> None:
        telemetry = self._telemetry
        for name, value in numbers.items():
            telemetry.set(f"dist_sae_train_{name}", value)
        telemetry.set("dist_sae_train_step", step)
        telemetry.add("dist_sae_train_rows_total", rows / self._mesh.world)
        telemetry.add("dist_sae_train_step_seconds_total", seconds)
        telemetry.add("dist_sae_train_wait_seconds_total", self._waited)
        if self._mesh.is_first:
            trained = step * self._run.train.batch_rows
            self._history.append(
                {
                    "step": step,
                    "rows": trained,
                    "seconds": seconds,
                    "wait_seconds": self._waited,
                    **numbers,
                }
            )
            shown = {
                name: numbers[name]
                for name in ("fvu", "l0_latents", "dead_share", "rows_per_second")
            }
            logs.progress(
                "train", step, self._run.steps, wait_share=self._waited / seconds, **shown
            )

    def heldout(self, fvu: float | None) -> None:
        """Held-out FVU, where it is measured."""
        if fvu is not None:
            self._telemetry.set("dist_sae_train_heldout_fvu", fvu)

    def stalled(self, seconds: float) -> None:
        """The training stood still for a copy to be made, or for the save before."""
        self._telemetry.add("dist_sae_train_save_stall_seconds_total", seconds)

    def saved(self, saved: Saved) -> None:
        """A checkpoint is durable. Called in the thread that saves."""
        self._telemetry.set("dist_sae_checkpoint_step", saved.step)
        self._telemetry.set("dist_sae_checkpoint_seconds", saved.seconds)
        self._telemetry.set("dist_sae_checkpoint_bytes", saved.bytes)

    def flush(self) -> None:
        """The history up to now, durably. Called in the thread that saves."""
        self._history.flush()
