"""A checkpoint's decoder, read part by part."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.checkpoint.state import weights_of

_ROWS = 4096


class Decoder:
    """Decoder rows in fp32, from the running mean of the weights if the checkpoint has one.

    Args:
        checkpoint: The checkpoint of the trained dictionary.
        alive: Called before each part is read.
        cache_bytes: Most bytes of rows to cache. If all rows fit, the first call of `windows`
            caches them, and the decoder is not read again.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        alive: Callable[[], None] = lambda: None,
        cache_bytes: int = 0,
    ) -> None:
        self._checkpoint = checkpoint
        self._alive = alive
        self.cache_bytes = cache_bytes
        self._cached: _Window | None = None
        self._name = weights_of(checkpoint)["W_dec"]
        self.n_latents, self.d_out = checkpoint.manifest.tensors[self._name].shape

    def parts(self, latents: range | None = None) -> Iterator[tuple[int, Float[Tensor, "n d_out"]]]:
        """Yield (first latent, rows) for each part of a range of latents, by default all.

        Raises:
            CorruptObjectError: The checkpoint is damaged.
        """
        latents = range(self.n_latents) if latents is None else latents
        self._alive()
        if self._cached is not None:
            yield latents.start, self._cached[1][latents.start : latents.stop]
            return
        for first, rows in self._checkpoint.pieces(self._name, latents.start, latents.stop):
            self._alive()
            yield first, rows.float()

    def directions(self) -> Iterator[tuple[int, Float[Tensor, "n d_out"]]]:
        """Yield (first latent, directions of unit length) for each part."""
        for first, rows in self.parts():
            yield first, directions(rows)

    def windows(self, n_bytes: int) -> Iterator["_Window"]:
        """Yield (first latent, rows, their lengths) for windows of parts that fit into `n_bytes`.

        A window has at least one part. If all rows fit into `cache_bytes`, they become one window,
        which is cached.
        """
        if self._cached is None and 4 * self.n_latents * self.d_out <= self.cache_bytes:
            whole = torch.empty(self.n_latents, self.d_out)
            for first, rows in self.parts():
                whole[first : first + len(rows)] = rows
            self._cached = (0, whole, lengths(whole))
        if self._cached is not None:
            yield self._cached
            return
        held, start = list[Tensor](), 0
        for first, rows in self.parts():
            if held and sum(part.nbytes for part in held) + rows.nbytes > n_bytes:
                window, held = torch.cat(held), []
                yield start, window, lengths(window)
                del window
                start = first
            held.append(rows)
        if held:
            window = torch.cat(held)
            yield start, window, lengths(window)


_Window = tuple[int, Float[Tensor, "n d_out"], Float[Tensor, "n 1"]]


def lengths(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
    """Compute the lengths of rows in fp64. Rows of zeros get a tiny positive number."""
    pieces = torch.split(rows, _ROWS)  # limits the size of the fp64 copies
    norms = torch.cat([piece.double().norm(dim=1, keepdim=True).float() for piece in pieces])
    return norms.clamp_min_(torch.finfo(torch.float32).tiny)


def directions(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Scale rows to unit length. Rows of zeros stay zero."""
    unit: Tensor = rows / lengths(rows)
    return unit
