"""The decoder of a checkpoint, part by part."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.checkpoint.state import weights_of

_ROWS = 4096


class Decoder:
    """Decoder rows in fp32, with the running mean of the weights if there is one.

    Args:
        checkpoint: The trained dictionary.
        alive: Called before each part is read.
    """

    def __init__(self, checkpoint: Checkpoint, alive: Callable[[], None] = lambda: None) -> None:
        self._checkpoint = checkpoint
        self._alive = alive
        self._name = weights_of(checkpoint)["W_dec"]
        self.n_latents, self.d_out = checkpoint.manifest.tensors[self._name].shape

    def parts(self, latents: range | None = None) -> Iterator[tuple[int, Float[Tensor, "n d_out"]]]:
        """Yield the first latent and the rows of each part of a range of latents, or of all.

        Raises:
            CorruptObjectError: The checkpoint is damaged.
        """
        latents = range(self.n_latents) if latents is None else latents
        self._alive()
        for first, rows in self._checkpoint.pieces(self._name, latents.start, latents.stop):
            self._alive()
            yield first, rows.float()

    def directions(self, n_bytes: int = 0) -> Iterator[tuple[int, Float[Tensor, "n d_out"]]]:
        """Yield the first latent and the unit directions of as many parts as fit into `n_bytes`.

        A window has at least one part.
        """
        held, start = list[Tensor](), 0
        for first, rows in self.parts():
            if held and sum(part.nbytes for part in held) + rows.nbytes > n_bytes:
                window, held = torch.cat(held), []
                yield start, window
                del window
                start = first
            held.append(directions(rows))
        if held:
            yield start, torch.cat(held)


def directions(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows of unit length; rows of zeros stay."""
    pieces = torch.split(rows, _ROWS)  # bounds the copies in fp64
    norms = torch.cat([piece.double().norm(dim=1, keepdim=True).float() for piece in pieces])
    unit: Tensor = rows / norms.clamp_min_(torch.finfo(torch.float32).tiny)
    return unit
