"""What every architecture shares: the codes, the outputs, the parameters.

One process, no I/O, no torch.distributed. Both weights are `[n_latents, d_in]`: dim 0 is the one
that is sharded, and a decoder row lies in one piece.
"""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class Codes(NamedTuple):
    """The selected latents of each row and how strongly they are active (0: not at all)."""

    acts: Float[Tensor, "batch k"]
    latents: Int[Tensor, "batch k"]


class LossTerms(NamedTuple):
    """The loss of a batch, in parts. Scalars; sums over this rank's rows of the *global* mean."""

    fvu: Float[Tensor, ""]
    """sum |x - x_hat|^2 / (rows * variance of the data set)."""
    auxk: Float[Tensor, ""]
    """sum |e - e_hat|^2 / (rows * variance of e), e the error that the main latents leave."""
    total: Float[Tensor, ""]
    """What is minimised."""


class Output(NamedTuple):
    """A batch's loss and what is counted from it."""

    terms: LossTerms
    codes: Codes


@runtime_checkable
class GlobalSum(Protocol):
    """Sums a tensor over all ranks of the data axis; no gradient flows through it."""

    def __call__(self, tensor: Tensor) -> Tensor: ...


def identity_sum(tensor: Tensor) -> Tensor:
    """`GlobalSum` of one process."""
    return tensor


@runtime_checkable
class Sae(Protocol):
    """A dictionary that can be trained and read."""

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        """Codes of scaled activations, in the parameters' precision, without gradients."""
        ...

    def decode(self, codes: Codes) -> Float[Tensor, "batch d_in"]:
        """x_hat = acts W_dec + b_dec."""
        ...

    def objective(
        self,
        x: Float[Tensor, "batch d_in"],
        variance: float,
        dead: Bool[Tensor, " n_latents"],
        global_sum: GlobalSum,
    ) -> Output:
        """The loss of this rank's rows.

        Args:
            x: Scaled activations.
            variance: Of the data set, in the same scale.
            dead: Latents that have not fired for long.
            global_sum: Over the ranks that share the batch; the same number of rows on each.
        """
        ...

    def constrain_gradients(self) -> None:
        """What the recipe does to the gradients before the update."""
        ...

    def constrain_parameters(self) -> None:
        """What the recipe does to the parameters after the update."""
        ...
