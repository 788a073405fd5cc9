"""Columns of an index's latents that follow from the dictionary alone."""

import numpy as np
import pyarrow as pa

from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.checkpoint.state import weights_of
from dist_sae.index.layout import LATENTS


def weight_columns(checkpoint: Checkpoint, latents: range) -> dict[str, pa.Array]:
    """Norms, biases, nearest latents and output tokens of a range of latents, by column."""
    stored = weights_of(checkpoint)

    def read(name: str) -> np.ndarray:
        return checkpoint.read(stored[name], latents.start, latents.stop).float().numpy()

    columns: dict[str, np.ndarray] = {
        "decoder_norm": np.linalg.norm(read("W_dec"), axis=1),
        "encoder_norm": np.linalg.norm(read("W_enc"), axis=1),
        "encoder_bias": read("b_enc"),
    }
    arrays = {name: pa.array(column, pa.float32()) for name, column in columns.items()}
    empty: list[list[int]] = [[] for _ in latents]
    for field in LATENTS:
        if pa.types.is_list(field.type):
            arrays[field.name] = pa.array(empty, field.type)
    return arrays
