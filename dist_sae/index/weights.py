"""Columns of an index's latents that follow from the dictionary alone."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.checkpoint.state import weights_of
from dist_sae.index.cells import Cells
from dist_sae.index.neighbours import Neighbours, neighbours
from dist_sae.index.outputs import Outputs


def weight_columns(
    checkpoint: Checkpoint,
    latents: range,
    m: int,
    cells: Cells | None,
    outputs: Outputs,
    device: torch.device,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, pa.Array]:
    """Norms, biases, nearest latents and output tokens of a range of latents, by column.

    Args:
        m: Nearest latents of each; 0 leaves them out.
        cells: See `neighbours`.
        outputs: Finds the output tokens.
        device: Computes the nearest latents.
        alive: As in `neighbours`.
    """
    stored = weights_of(checkpoint)

    def read(name: str) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = (
            checkpoint.read(stored[name], latents.start, latents.stop).float().numpy()
        )
        return rows

    decoder = read("W_dec")
    columns: dict[str, NDArray[np.float32]] = {
        "decoder_norm": np.linalg.norm(decoder, axis=1),
        "encoder_norm": np.linalg.norm(read("W_enc"), axis=1),
        "encoder_bias": read("b_enc"),
    }
    arrays = {name: pa.array(column, pa.float32()) for name, column in columns.items()}
    near = (
        neighbours(checkpoint, latents, m, cells, device, alive)
        if m
        else Neighbours(torch.empty(len(latents), 0).int(), torch.empty(len(latents), 0))
    )
    kept = near.latents >= 0
    ends = np.concatenate([[0], kept.sum(1).cumsum(0).numpy()])
    for name, values in (("nearest", near.latents), ("nearest_cosine", near.cosines)):
        arrays[name] = pa.ListArray.from_arrays(ends, values[kept].numpy())
    for end, found in outputs.of(torch.from_numpy(decoder)).items():
        arrays[f"{end}_tokens"] = pa.array(list(found.tokens.int().numpy()), pa.list_(pa.int32()))
        arrays[f"{end}_logits"] = pa.array(list(found.effects.numpy()), pa.list_(pa.float32()))
    return arrays
