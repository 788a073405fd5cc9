"""Keys: a pre-activation and its latent as one int64, ordered by (pre-activation, -latent).

Keys make selections exact: among equal pre-activations the lower latent wins, for any chunking and
sharding.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

NO_ENTRY = torch.iinfo(torch.int64).min
"""A key below all others, used as a placeholder for "no entry"."""
_SIGN = 0x7FFF_FFFF
_LOW = 0xFFFF_FFFF


def to_keys(
    pre_acts: Float[Tensor, "*#shape"], latents: Int[Tensor, "*#shape"]
) -> Int[Tensor, "*shape"]:
    """Return the keys of pre-activations (rounded to fp32) and latents (below 2^32)."""
    return (to_ordinals(pre_acts) << 32) | (_LOW - latents)


def from_keys(
    keys: Int[Tensor, "*shape"],
) -> tuple[Float[Tensor, "*shape"], Int[Tensor, "*shape"]]:
    """Return the pre-activations (fp32) and the latents of keys."""
    return from_ordinals(keys >> 32), _LOW - (keys & _LOW)


def to_ordinals(values: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Map values (rounded to fp32) to 32-bit integers in the same order. -0 counts as 0."""
    bits = (values.float() + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & _SIGN)).long()


def from_ordinals(numbers: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the values that `to_ordinals` mapped to these integers."""
    bits = numbers.int()
    return (bits ^ ((bits >> 31) & _SIGN)).view(torch.float32)
