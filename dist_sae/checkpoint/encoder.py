"""The encoder of a trained dictionary, read where it is stored: for the few rows of a text.

The encoder product goes from chunk to chunk of latents (`select.products`), in routed dictionaries
through those experts alone that rows are sent to. So a chunk is read when the product gets there.
The decoder is never read.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dist_sae.checkpoint.layout import Checkpoint, Part
from dist_sae.checkpoint.state import weights_of
from dist_sae.config.sae import SaeConfig
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.interface import Codes, Widths


class StoredEncoder:
    """Encodes as the whole dictionary in memory does, with a checkpoint's encoder.

    Each part is read and checked once. In a local folder it is then mapped: the kernel holds it
    while memory is free, and reads it again from the file. Parts from another store are kept while
    they fit; those beyond are fetched anew each time.

    Args:
        config: The recipe.
        widths: Widths of the sites; a number is that of the one site of an autoencoder.
        checkpoint: Has the weights.
        memory_bytes: Bytes for kept parts.

    Attributes:
        checkpoint: The same.

    Raises:
        CorruptObjectError, ObjectNotFoundError: The checkpoint is damaged or has been deleted;
            `encode` raises them as well.
    """

    def __init__(
        self, config: SaeConfig, widths: Widths | int, checkpoint: Checkpoint, memory_bytes: int
    ) -> None:
        self.checkpoint = checkpoint
        with torch.device("meta"):
            self._sae = sae = build_sae(config, widths)
        stored = weights_of(checkpoint)
        parts = _Parts(checkpoint, stored["W_enc"], memory_bytes)
        sae.encoder_copy = _Rows(parts, range(sae.n_latents))
        small = {
            name: checkpoint.read(stored[name]).to(tensor.dtype)
            for name, tensor in sae.tensors()
            if name not in sae.decoder | {"W_enc"}
        }
        sae.load_state_dict(small, strict=False, assign=True)
        with torch.no_grad():
            sae.constrain()

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        """Codes of inputs: see `Dictionary.encode`."""
        return self._sae.encode(x)


class _Rows:
    """Some rows of a stored matrix: `select.EncoderRows`."""

    dtype = torch.float32

    def __init__(self, parts: "_Parts", rows: range) -> None:
        self._parts = parts
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: slice | Tensor) -> "_Rows":
        assert isinstance(place, slice), "only training picks out latents"
        return _Rows(self._parts, self._rows[place])

    def to(self, dtype: torch.dtype) -> Tensor:
        return self._parts.read(self._rows).to(dtype)


class _Parts:
    """The parts of a stored matrix, kept as far as they fit."""

    def __init__(self, checkpoint: Checkpoint, name: str, memory_bytes: int) -> None:
        self._checkpoint = checkpoint
        self._name = name
        self._room = memory_bytes
        self._kept: dict[str, Tensor] = {}

    def read(self, rows: range) -> Tensor:
        """Some rows; a view where one part has them. No others are copied."""
        found = self._checkpoint.pieces(self._name, rows.start, rows[-1] + 1, self._of)
        some = [part[(rows.start - first) % rows.step :: rows.step] for first, part in found]
        return some[0] if len(some) == 1 else torch.cat(some)

    def _of(self, part: Part) -> Tensor:
        rows = self._kept.get(part.key)
        if rows is None:
            rows = self._checkpoint.mapped(part)
            taken = 0
            if rows is None:
                rows = self._checkpoint.rows(part)
                taken = rows.nbytes
            if taken <= self._room:
                self._room -= taken
                self._kept[part.key] = rows
        return rows
