"""The encoder of a trained dictionary, read from the store on demand, for the few rows of a text.

The encoder product is computed chunk by chunk of latents (`select.products`), so each chunk is read
only when the product reaches it. In routed dictionaries only the experts that rows are sent to are
read. The decoder is never read.
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
    """An encoder that reads its weights on demand, and computes the same codes as one in memory.

    In a local store, each part is checked once and then memory-mapped, so the operating system
    caches it while memory is free. Parts from other stores are cached as long as they fit. Parts
    that do not fit are fetched again each time.

    Args:
        config: The recipe.
        widths: Widths of the sites. A number means an autoencoder of a single site of that width.
        checkpoint: The checkpoint with the weights.
        memory_bytes: Size of the cache of parts.

    Attributes:
        checkpoint: The checkpoint with the weights.

    Raises:
        CorruptObjectError, ObjectNotFoundError: The checkpoint is damaged or has been deleted.
            `encode` raises these errors too.
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
        """Compute the codes of inputs; see `Dictionary.encode`."""
        return self._sae.encode(x)


class _Rows:
    """A range of rows of a stored matrix. Implements `select.EncoderRows`."""

    dtype = torch.float32

    def __init__(self, parts: "_Parts", rows: range) -> None:
        self._parts = parts
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: slice | Tensor) -> "_Rows":
        assert isinstance(place, slice), "only training selects single latents"
        return _Rows(self._parts, self._rows[place])

    def to(self, dtype: torch.dtype) -> Tensor:
        return self._parts.read(self._rows).to(dtype)


class _Parts:
    """Cache of the parts of a stored matrix."""

    def __init__(self, checkpoint: Checkpoint, name: str, memory_bytes: int) -> None:
        self._checkpoint = checkpoint
        self._name = name
        self._free_bytes = memory_bytes
        self._cache: dict[str, Tensor] = {}

    def read(self, rows: range) -> Tensor:
        """Return a range of rows: a view if they are all in one part, else a copy."""
        found = self._checkpoint.pieces(self._name, rows.start, rows[-1] + 1, self._read_part)
        some = [part[(rows.start - first) % rows.step :: rows.step] for first, part in found]
        return some[0] if len(some) == 1 else torch.cat(some)

    def _read_part(self, part: Part) -> Tensor:
        rows = self._cache.get(part.key)
        if rows is None:
            rows = self._checkpoint.mapped(part)
            taken = 0
            if rows is None:
                rows = self._checkpoint.rows(part)
                taken = rows.nbytes
            if taken <= self._free_bytes:
                self._free_bytes -= taken
                self._cache[part.key] = rows
        return rows
