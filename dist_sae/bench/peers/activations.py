"""The rows that all peers train on, from a file or synthetic."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_sae.errors import ConfigError

HELDOUT_ROWS = 8_192

_CHUNK_ROWS = 512
_NOISE = 0.05


def write_synthetic(
    train: Path,
    heldout: Path,
    *,
    n_rows: int,
    d_in: int,
    n_directions: int,
    n_active: int,
    transcoder: bool = False,
) -> None:
    """Write two files of rows, each a sum of a few of the same directions with Zipf frequencies.

    x = c (sum_i a_i v_i + mean + noise). The v_i are unit vectors, drawn by rank with probability
    ~ 1 / (rank + n_active), and the a_i are exponential. E|x|^2 is about d_in. For a transcoder,
    each row is followed by its target y = W_2 relu(W_1 x), with random weights and 4 d_in hidden
    units.
    """
    random = np.random.default_rng(0)
    directions = random.standard_normal((n_directions, d_in), dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    mean = random.standard_normal(d_in, dtype=np.float32) * (n_active / d_in) ** 0.5
    frequencies = 1 / (np.arange(n_directions) + n_active)
    cumulative = np.cumsum(frequencies / frequencies.sum())
    # E|sum|^2 = n_active E[a^2] = 2 n_active, and E|mean|^2 = n_active
    scale = (d_in / (3 * n_active)) ** 0.5

    mlp = np.random.default_rng(1)
    w_1 = mlp.standard_normal((d_in, 4 * d_in), dtype=np.float32) / d_in**0.5
    w_2 = mlp.standard_normal((4 * d_in, d_in), dtype=np.float32) / (2 * d_in) ** 0.5

    def chunks(total: int) -> Iterator[NDArray[np.float32]]:
        for first in range(0, total, _CHUNK_ROWS):
            rows = min(_CHUNK_ROWS, total - first)
            drawn = np.searchsorted(cumulative, random.random((rows, n_active)))
            acts = random.standard_exponential((rows, n_active), dtype=np.float32)
            x = np.einsum("rk,rkd->rd", acts, directions[np.minimum(drawn, n_directions - 1)])
            noise = random.standard_normal((rows, d_in), dtype=np.float32)
            x = scale * (x + mean + _NOISE * noise)
            yield np.hstack([x, np.maximum(x @ w_1, 0) @ w_2]) if transcoder else x

    for path, total in ((train, n_rows), (heldout, HELDOUT_ROWS)):
        written = np.lib.format.open_memmap(
            path, "w+", np.float32, (total, (1 + transcoder) * d_in)
        )
        first = 0
        for chunk in chunks(total):
            written[first : first + len(chunk)] = chunk
            first += len(chunk)
        written.flush()


def copy_heldout_rows(path: Path, heldout: Path, *, n_rows: int, width: int) -> None:
    """Copy the file's last rows to `heldout`. Training reads its first `n_rows` rows in order.

    Raises:
        ConfigError: The file is not a [rows, width] array of floats, or has too few rows.
    """
    try:
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable .npy file ({error})") from error
    if rows.ndim != 2 or rows.shape[1] != width or rows.dtype.kind != "f":  # noqa: PLR2004
        raise ConfigError(
            f"{path}: contains {rows.dtype} of shape {list(rows.shape)}, "
            f"not floats of [rows, {width}]"
        )
    if len(rows) < n_rows + HELDOUT_ROWS:
        raise ConfigError(
            f"{path}: has {len(rows)} rows, but {n_rows} training rows and {HELDOUT_ROWS} held-out "
            "rows are needed; use fewer steps, fewer FVU rows or a smaller batch"
        )
    np.save(heldout, rows[-HELDOUT_ROWS:].astype(np.float32))
