"""Averages the gradients and updates the parameters; the only module that talks to DeepSpeed."""

import logging
import os
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dist_sae.config import Run
from dist_sae.errors import ConfigError, NonFiniteError
from dist_sae.parallel.mesh import Mesh
from dist_sae.parallel.zero import deepspeed_config
from dist_sae.sae.base import Output, Sae

logger = logging.getLogger(__name__)


@runtime_checkable
class Engine(Protocol):
    """One optimiser step of a dictionary, however many ranks share it."""

    optimizer: torch.optim.Adam

    def objective(self, *args: Any) -> Output:
        """The dictionary's objective on this rank's rows."""
        ...

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Gradients of the mean of `loss` over the ranks."""
        ...

    def step(self, lr: float) -> float:
        """Clip, update, constrain.

        Returns:
            The norm of the global gradient before clipping.

        Raises:
            NonFiniteError: The gradient is not finite; the weights are as before.
        """
        ...


class LocalEngine:
    """Plain torch, one process: what readers read and what tests compare DeepSpeed with."""

    def __init__(self, run: Run, sae: Sae) -> None:
        self._sae = sae
        self._clip_norm = run.train.clip_norm
        self.optimizer = build_optimizer(run, sae)

    def objective(self, *args: Any) -> Output:
        return self._sae.objective(*args)

    def backward(self, loss: Float[Tensor, ""]) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> float:
        norm = prepare_gradients(self._sae, self._clip_norm)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._sae.constrain_parameters()
        return norm


class DeepSpeedEngine:
    """DeepSpeed's engine over the data axis: parameters fp32, stage 0.

    Clipping is done here and not by DeepSpeed, which at stage 0 neither tells the norm nor
    looks whether it is finite before it updates the weights.
    """

    def __init__(self, run: Run, sae: Sae, mesh: Mesh) -> None:
        deepspeed = _import_deepspeed(mesh)
        config = deepspeed_config(run)
        self._sae = sae
        self._clip_norm = run.train.clip_norm
        self.optimizer = build_optimizer(run, sae)
        assert isinstance(sae, nn.Module)
        self._engine, *_ = deepspeed.initialize(
            model=sae, optimizer=self.optimizer, config=config, dist_init_required=False
        )
        if self._engine.optimizer is not self.optimizer:
            raise ConfigError(
                "train.deepspeed: this setting wraps the optimiser (ZeRO, bf16 or fp16), which the "
                "unit-norm constraint does not support yet; leave zero_optimization.stage at 0"
            )

    def objective(self, *args: Any) -> Output:
        output: Output = self._engine(*args)
        return output

    def backward(self, loss: Float[Tensor, ""]) -> None:
        self._engine.backward(loss)

    def step(self, lr: float) -> float:
        norm = prepare_gradients(self._sae, self._clip_norm)
        set_lr(self.optimizer, lr)
        self._engine.step()
        self._sae.constrain_parameters()
        return norm


def build_optimizer(run: Run, sae: Sae) -> torch.optim.Adam:
    """Adam without weight decay over the dictionary's parameters."""
    assert isinstance(sae, nn.Module)
    train = run.train
    return torch.optim.Adam(
        sae.parameters(), lr=run.lr, betas=train.betas, eps=train.eps, fused=True
    )


def set_lr(optimizer: torch.optim.Adam, lr: float) -> None:
    """The learning rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def prepare_gradients(sae: Sae, clip_norm: float | None) -> float:
    """Constrain and clip the averaged gradients; returns their norm before clipping.

    Raises:
        NonFiniteError: The norm is NaN or infinite.
    """
    assert isinstance(sae, nn.Module)
    sae.constrain_gradients()
    gradients = [p.grad for p in sae.parameters() if p.grad is not None]
    norm = float(nn.utils.get_total_norm(gradients))
    if not torch.isfinite(torch.tensor(norm)):
        raise NonFiniteError(
            f"the gradient's norm is {norm}; the weights are those of the step before. "
            f"Lower train.lr under another name, or check the shards with `dist-sae store verify`"
        )
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(list(sae.parameters()), clip_norm, torch.tensor(norm))
    return norm


def _import_deepspeed(mesh: Mesh) -> Any:
    if mesh.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(mesh.rank))  # DeepSpeed insists on it
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # An all-reduce for inference that DeepSpeed would compile for a minute at first use, and
    # that leaves 66 MiB per rank in /dev/shm. Training goes through gloo or NCCL.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
