"""Adam for a dictionary, in one pass over the parameters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import unwrap
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dist_sae.config import Run
from dist_sae.dictionaries.base import Dictionary
from dist_sae.kernels import Adam

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the state tensors of each parameter."""


class OnePassAdam(torch.optim.Optimizer):
    """Dense Adam without weight decay, which also normalizes decoder rows and copies W_enc.

    Each tensor is read and written once per step (`Kernels.update`). The copy is W_enc in the
    products' precision. Every step updates it, and it is rebuilt after `invalidate_copy`. The
    copy is only read within `use_encoder_copy`.
    """

    updates: int = 0
    """Number of updates so far. The engine counts them once it has read the norm: `step` changes
    nothing if the norm is not finite."""
    # torch wraps these two to exclude them from compilation. The wrapper imports the compiler at
    # the first call, which takes 1.4 s of CPU, a third of a trainer's start
    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(self, run: Run, sae: Dictionary) -> None:
        super().__init__(sae.parameters(), {"lr": run.lr})
        self._sae = sae
        self._train = run.train
        self._copy: Tensor | None = None
        self._next: Adam | None = None

    def prepare(self, lr: float, norm: Float[Tensor, ""]) -> None:
        """Set up the next step: clip by the norm, and change nothing if the norm is not finite.

        Args:
            lr: Learning rate.
            norm: The norm of the whole dictionary's gradient.
        """
        train = self._train
        scale = norm / train.clip_norm if train.clip_norm is not None else torch.ones_like(norm)
        self._next = Adam(
            self.updates + 1,
            lr,
            *train.betas,
            train.eps,
            scale.clamp(min=1).float(),
            (~norm.isfinite()).float(),
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have gradients."""
        assert closure is None
        assert self._next is not None, "prepare first"
        sae = self._sae
        for name, parameter in sae.named_parameters():
            if parameter.grad is None:
                continue
            state: dict[str, Any] = self.state[parameter]
            for moment in MOMENTS:
                if moment not in state:
                    state[moment] = torch.zeros_like(parameter)
            sae.kernels.update(
                parameter,
                parameter.grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                self._next,
                unit_rows=name == "W_dec" and sae.unit_rows,
                copy=self._copy if name == "W_enc" else None,
            )
        self._next = None

    @contextmanager
    def use_encoder_copy(self) -> Iterator[None]:
        """Let the dictionary use the copy for products in its precision, in a `with` block."""
        sae = self._sae
        if self._copy is None and sae.product_dtype != sae.W_enc.dtype:
            self._copy = sae.W_enc.detach().to(sae.product_dtype)
        sae.encoder_copy = self._copy
        try:
            yield
        finally:
            sae.encoder_copy = None

    def invalidate_copy(self) -> None:
        """Discard the copy, because other code changed W_enc. It is rebuilt before its next use."""
        self._copy = None
