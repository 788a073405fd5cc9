"""A pre-activation and its latent as one int64, in the order of (pre-activation, -latent).

This makes selections exact: of equal pre-activations the lower latent wins, whatever the chunks and
shards.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

NOTHING = torch.iinfo(torch.int64).min
"""A key below all others, where there is nothing to choose."""
_SIGN = 0x7FFF_FFFF
_LOW = 0xFFFF_FFFF


def to_keys(
    pre_acts: Float[Tensor, "*#shape"], latents: Int[Tensor, "*#shape"]
) -> Int[Tensor, "*shape"]:
    """Keys of pre-activations (rounded to fp32) and latents (below 2^32)."""
    return (ordered(pre_acts) << 32) | (_LOW - latents)


def from_keys(
    keys: Int[Tensor, "*shape"],
) -> tuple[Float[Tensor, "*shape"], Int[Tensor, "*shape"]]:
    """Return the pre-activations (fp32) and the latents of keys."""
    return from_ordered(keys >> 32), _LOW - (keys & _LOW)


def ordered(values: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Integers in the order of the values (rounded to fp32), within 32 bits; -0 is 0."""
    bits = (values.float() + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & _SIGN)).long()


def from_ordered(numbers: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The values of `ordered`."""
    bits = numbers.int()
    return (bits ^ ((bits >> 31) & _SIGN)).view(torch.float32)
