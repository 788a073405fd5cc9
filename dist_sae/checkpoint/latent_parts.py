"""A trained dictionary part by part: consecutive latents, as a checkpoint stores them."""

import gc
from collections.abc import Container, Iterator

import torch

from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.checkpoint.state import weights_of
from dist_sae.config.sae import SaeConfig
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.base import Dictionary


class LatentParts:
    """Reads parts of a dictionary for inference, into the same memory.

    Args:
        config: The whole dictionary's recipe, without experts.
        checkpoint: Its checkpoint.
    """

    def __init__(self, config: SaeConfig, checkpoint: Checkpoint) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._names = weights_of(checkpoint)
        self._decoder = checkpoint.manifest.tensors[self._names["W_dec"]]
        self._part: Dictionary | None = None

    @torch.no_grad()
    def read(self, leave_out: Container[str] = ()) -> Iterator[tuple[slice, Dictionary]]:
        """Yield latents and their dictionary, which the next part overwrites.

        Args:
            leave_out: Tensors that are not needed, and not read.

        Raises:
            CorruptObjectError: The checkpoint is damaged.
        """
        for stored in self._decoder.parts:
            part = self._memory(stored.stop - stored.start)
            for name, tensor in part.tensors():
                if name not in leave_out:
                    first = stored.start if part.is_per_latent(name) else 0
                    self._checkpoint.fill(tensor, self._names[name], first)
            part.constrain()
            yield slice(stored.start, stored.stop), part

    def _memory(self, n_latents: int) -> Dictionary:
        if self._part is None or self._part.n_latents != n_latents:
            self._part = None
            gc.collect()  # a dictionary refers to itself: else the last one would stay for a while
            recipe = self._config.model_copy(update={"n_latents": n_latents})
            self._part = build_sae(recipe, self._decoder.shape[1])
            self._part.requires_grad_(requires_grad=False)
        return self._part
