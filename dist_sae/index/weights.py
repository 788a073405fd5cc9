"""Columns of the table of latents that depend on the dictionary alone."""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from dist_sae.checkpoint.state import load_weights, weights_of
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.axis import PageAxis
from dist_sae.index.cells import Cells
from dist_sae.index.context import IndexContext
from dist_sae.index.decoder import Decoder
from dist_sae.index.neighbours import Neighbours, neighbours
from dist_sae.index.outputs import LATENTS, OutputTokens


def open_decoder(context: IndexContext, alive: Callable[[], None] = lambda: None) -> Decoder:
    """Open the decoder. It may cache as many bytes as a rank's encoder took.

    With one rank per worker, that is the whole decoder.
    """
    decoder = Decoder(context.checkpoint, alive)
    whole_bytes = 4 * decoder.n_latents * decoder.d_out
    decoder.cache_bytes = whole_bytes // context.run.index.latent_shards
    return decoder


def weight_columns(
    context: IndexContext,
    latents: range,
    decoder: Decoder,
    cells: Cells | None,
    outputs: OutputTokens,
    device: torch.device,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, pa.Array]:
    """Compute norms, biases, nearest latents and output tokens of a range of latents, by column.

    If several sites are written, `norms` has the length of each site's part of a decoder row.

    Args:
        context: The index.
        latents: The range of latents.
        decoder: See `neighbours`.
        cells: See `neighbours`.
        outputs: Finds the output tokens.
        device: Device for the search of nearest latents.
        alive: Called before each part of the decoder.
    """
    checkpoint, normalisers = context.checkpoint, context.normalisers
    stored = weights_of(checkpoint)

    def read(name: str) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = (
            checkpoint.read(stored[name], latents.start, latents.stop).float().numpy()
        )
        return rows

    norms, ends = [], []
    for rows in _decoder(context, latents):
        parts = [rows[:, columns] for columns in normalisers.columns.values()]
        norms.append(np.stack([np.linalg.norm(part.numpy(), axis=1) for part in (rows, *parts)]))
        ends.append(outputs.of(rows))
    whole, *of_sites = np.concatenate(norms, axis=1)
    columns: dict[str, NDArray[np.float32]] = {
        "decoder_norm": whole,
        "encoder_norm": np.linalg.norm(read("W_enc"), axis=1),
        "encoder_bias": read("b_enc"),
    }
    arrays = {name: pa.array(column, pa.float32()) for name, column in columns.items()}
    if len(of_sites) > 1:
        arrays["norms"] = pa.array(list(np.stack(of_sites, axis=1)), pa.list_(pa.float32()))
    arrays |= _nearest(context, latents, decoder, cells, device, alive)
    for end in ends[0]:
        tokens, effects = (
            np.concatenate([part[end][i].numpy() for part in ends]) for i in range(2)
        )
        arrays[f"{end}_tokens"] = pa.array(list(tokens.astype(np.int32)), pa.list_(pa.int32()))
        arrays[f"{end}_logits"] = pa.array(list(effects), pa.list_(pa.float32()))
    return arrays


def _decoder(context: IndexContext, latents: range) -> Iterator[Float[Tensor, "some d_out"]]:
    """Yield the decoder rows of some latents, part by part."""
    sae, checkpoint = context.run.sae, context.checkpoint
    unit = 1 if sae.has_latent_rows else sae.group_size
    first, stop = latents.start // unit * unit, -(-latents.stop // unit) * unit
    page = build_sae(sae, context.normalisers.widths, PageAxis(page=range(first, stop)))
    load_weights(page, checkpoint, leave_out={"W_enc"})
    for some in torch.split(torch.arange(latents.start - first, latents.stop - first), LATENTS):
        yield page.decoder_rows(some).detach()


def _nearest(
    context: IndexContext,
    latents: range,
    decoder: Decoder,
    cells: Cells | None,
    device: torch.device,
    alive: Callable[[], None],
) -> dict[str, pa.Array]:
    near = (
        neighbours(context.checkpoint, latents, m, cells, device, alive, decoder)
        if (m := context.neighbours)
        else Neighbours(torch.empty(len(latents), 0).int(), torch.empty(len(latents), 0))
    )
    kept = near.latents >= 0
    ends = np.concatenate([[0], kept.sum(1).cumsum(0).numpy()])
    return {
        name: pa.ListArray.from_arrays(ends, values[kept].numpy())
        for name, values in (("nearest", near.latents), ("nearest_cosine", near.cosines))
    }
