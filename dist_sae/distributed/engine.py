"""Optimizer steps: gradient averaging, clipping and Adam, with DeepSpeed or plain torch."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dist_sae.config import Run
from dist_sae.deepspeed import import_deepspeed
from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.interface import Output, Rows, StepContext
from dist_sae.distributed.adam import MOMENTS, OnePassAdam
from dist_sae.distributed.axis import ShardedAxis
from dist_sae.distributed.gradients import ReplicaSums, is_summed_by_entry
from dist_sae.distributed.mesh import Mesh
from dist_sae.distributed.zero import deepspeed_config
from dist_sae.errors import ConfigError, NonFiniteError


class Engine:
    """Objective, gradients and updates of a dictionary in one process, with plain torch.

    The reference for `DeepSpeedEngine`. No other code may change the parameters between steps.
    """

    moments: tuple[str, ...] = MOMENTS
    """Names of the optimizer's state tensors of each parameter."""

    def __init__(self, run: Run, sae: Dictionary) -> None:
        self._sae = sae
        self._adam = OnePassAdam(run, sae)

    def objective(self, rows: Rows, context: StepContext) -> Output:
        """Compute the dictionary's objective on this rank's rows."""
        with self._adam.use_encoder_copy():
            return self._sae.objective(rows, context)

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Compute gradients of the loss, summed within a replica and averaged over replicas."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float, *wanted: Tensor) -> list[float]:
        """Clip gradients, update weights and apply constraints. The host waits once for the device.

        Args:
            lr: Learning rate.
            wanted: Tensors on the device whose values the caller needs as well.

        Returns:
            The norm of the global gradient before clipping, and the values of `wanted`.

        Raises:
            NonFiniteError: The gradient is not finite. The weights are unchanged.
        """
        norm = gradient_norm(self._sae)
        self._adam.prepare(lr, norm)
        self._adam.step()
        self._adam.zero_grad()
        return self._updated(self._sae.constrain_others, norm, *wanted)

    def revive(self, stuck: Tensor, x: Tensor, error: Tensor) -> None:
        """Revive stuck latents as the recipe does; see `Dictionary.revive`."""
        self._sae.revive(stuck, x, error)
        self._adam.invalidate_copy()

    def moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """Return a parameter's full moment tensor; `name` is one of `moments`. Collective."""
        moment: Tensor = self._adam.state[parameter][name]
        return moment

    def restore(self, step: int, moments: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Adopt parameters changed elsewhere, and set Adam's state to that after `step` updates."""
        self._adam.updates = step
        for parameter, state in moments.items():
            self._adam.state[parameter] = dict(state)
        self._adam.invalidate_copy()

    def _updated(self, constrain: Callable[[], None], norm: Tensor, *wanted: Tensor) -> list[float]:
        """Read the norm and other values. If the norm is finite, count the update and constrain."""
        # wait with the update already queued, so that the device has work in the meantime
        norm_read, *numbers = read(norm, *wanted)
        check_finite(norm_read)
        self._adam.updates += 1
        constrain()
        return [norm_read, *numbers]


class DeepSpeedEngine(Engine):
    """DeepSpeed's engine, optionally with ZeRO-1 or 2 and offload over the replicas.

    Parameters are fp32, without separate master weights. At stage 0, gradients are averaged over
    the replicas (`gradients.py`) and clipped here, because DeepSpeed then neither reports the norm
    nor checks it before it updates the weights.
    With ZeRO, torch's Adam updates flat partitions of all parameters. Constraints are then applied
    to whole parameters after the update, and products convert W_enc themselves.
    """

    def __init__(self, run: Run, sae: Dictionary, mesh: Mesh) -> None:
        deepspeed = import_deepspeed()
        super().__init__(run, sae)
        config = deepspeed_config(run)
        self._stage: int = config["zero_optimization"]["stage"]
        self._optimizer: torch.optim.Optimizer = self._adam
        if self._stage:
            self._optimizer = torch.optim.Adam(
                sae.parameters(), run.lr, run.train.betas, run.train.eps, fused=True
            )
        for name, parameter in sae.named_parameters():
            parameter.model_parallel = sae.is_per_latent(name)  # type: ignore[attr-defined]
        self._engine, *_ = deepspeed.initialize(
            model=sae,
            optimizer=self._optimizer,
            config=config,
            mpu=_Mpu(mesh.axis),
            dist_init_required=False,
        )
        self._summed: frozenset[str] = frozenset()  # weights with gradients that are summed already
        if self._stage == 0:
            self._engine.enable_backward_allreduce = False  # copies all gradients twice
            if mesh.axis.replicas > 1 and is_summed_by_entry(sae.config):
                self._summed = frozenset({"W_enc", "W_dec"})
                sums = ReplicaSums(sae.kernels, mesh.axis)
                sae.kernels = sae.kernels._replace(sum_by_latent=sums)
        if self._stage == 0 and self._engine.optimizer is not self._optimizer:
            raise ConfigError(
                "train.deepspeed: this setting wraps the optimiser (bf16 or fp16), which would "
                "keep a second copy of the parameters although they are fp32; leave it out"
            )

    def objective(self, rows: Rows, context: StepContext) -> Output:
        with nullcontext() if self._stage else self._adam.use_encoder_copy():
            output: Output = self._engine(rows, context)
        return output

    def backward(self, loss: Float[Tensor, ""]) -> None:
        if self._stage:
            self._engine.backward(loss)
            return
        axis = self._sae.axis
        self._engine.backward(loss / axis.replicas)
        for name, parameter in self._sae.named_parameters():
            if name not in self._summed and parameter.grad is not None:
                axis.sum_replicas_(parameter.grad)

    def step(self, lr: float, *wanted: Tensor) -> list[float]:
        if self._stage == 0:
            norm = gradient_norm(self._sae)
            self._adam.prepare(lr, norm)
            self._engine.step()
            return self._updated(self._sae.constrain_others, norm, *wanted)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()  # does nothing if the norm is not finite
        found, device = self._engine.get_global_grad_norm(), self._sae.b_dec.device
        norm = torch.as_tensor(found, dtype=torch.float64, device=device)
        numbers = self._updated(self._sae.constrain, norm, *wanted)
        self._take_over()
        return numbers

    def revive(self, stuck: Tensor, x: Tensor, error: Tensor) -> None:
        super().revive(stuck, x, error)
        self._take_over()

    def moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        if self._stage == 0:
            return super().moment(parameter, name)
        from deepspeed.utils import safe_get_full_optimizer_state

        whole: Tensor = safe_get_full_optimizer_state(parameter, name)
        return whole

    def restore(self, step: int, moments: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        if self._stage == 0:
            super().restore(step, moments)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        self._take_over()
        zero = self._engine.optimizer
        for partition in zero.single_partition_of_fp32_groups:
            self._optimizer.state[partition] |= {
                "step": torch.tensor(float(step), device=partition.device),
                **{name: torch.zeros_like(partition) for name in self.moments},
            }
        # otherwise DeepSpeed links states only after the first update, and finds none before
        zero._hp_optimizer_states_linked = False  # noqa: SLF001
        zero._lazy_init_hp_params_optimizer_state()  # noqa: SLF001
        for parameter, state in moments.items():
            for name, moment in state.items():
                safe_set_full_optimizer_state(parameter, moment, name)

    def _take_over(self) -> None:
        """Update ZeRO's partitions of the parameters after other code changed the parameters."""
        if self._stage:
            self._engine.optimizer.refresh_fp32_params()


class _Mpu:
    """The latent axis in the form that DeepSpeed expects: Megatron's "model parallel" ranks."""

    def __init__(self, axis: LatentAxis) -> None:
        assert isinstance(axis, ShardedAxis)
        self._axis = axis

    def get_model_parallel_rank(self) -> int:
        return self._axis.shard

    def get_model_parallel_world_size(self) -> int:
        return self._axis.shards

    def get_model_parallel_group(self) -> Any:
        return self._axis.within

    def get_data_parallel_rank(self) -> int:
        return self._axis.replica

    def get_data_parallel_world_size(self) -> int:
        return self._axis.replicas

    def get_data_parallel_group(self) -> Any:
        return self._axis.across


@torch.no_grad()
def gradient_norm(sae: Dictionary) -> Float[Tensor, ""]:
    """Return the whole dictionary's gradient norm, in fp64. Replicated tensors count once."""
    gradients = {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}
    squares = {name: _square_sum(gradient) for name, gradient in gradients.items()}
    replicated = sum(square for name, square in squares.items() if not sae.is_per_latent(name))
    local = torch.stack([s for name, s in squares.items() if sae.is_per_latent(name)]).sum()
    total: Tensor = sae.axis.total(local) / sae.axis.replicas + replicated
    return total.sqrt()


def read(*numbers: Tensor) -> list[float]:
    """Return the elements of tensors on one device, in order. The host waits once for all."""
    values: list[float] = torch.cat([n.double().flatten() for n in numbers]).tolist()
    return values


def _square_sum(gradient: Tensor) -> Float[Tensor, ""]:
    """Sum the squares of all elements, in fp64 over rows.

    On a CPU, `vector_norm` of a whole tensor accumulates in a few fp32 numbers. For 67 million
    squares this lost one percent and took twice the time.
    """
    if gradient.ndim == 1:
        return gradient.double().square().sum()
    norms: Tensor = torch.linalg.vector_norm(gradient, dim=1)
    return norms.double().square().sum()


def check_finite(norm: float) -> None:
    """Raise `NonFiniteError` for a gradient's norm that is NaN or infinite."""
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"the gradient's norm is {norm}; the weights are those of the previous step. "
            f"Lower train.lr under another name, or check the shards with `dist-sae store verify`"
        )
