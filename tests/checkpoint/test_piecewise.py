"""safetensors files in pieces: the library's bytes, in memory that does not grow with width."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dist_sae.checkpoint import layout, maintenance, piecewise, warm_start
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.piecewise import PiecewiseTensor, safetensors_pieces, transposed
from dist_sae.checkpoint.state import IDLE_ROWS
from dist_sae.checkpoint.trained import find_checkpoint
from dist_sae.config import Run, load_run
from dist_sae.config.fingerprint import run_fingerprint
from dist_sae.dictionaries import build_sae
from dist_sae.errors import CorruptObjectError
from dist_sae.interop import raw
from dist_sae.interop.export import export
from dist_sae.storage import open_store
from tests.memory import MIB, peak_bytes
from tests.runs import write_run
from tests.world import save

D_IN = 256
TENSORS = {
    "b": torch.arange(7, dtype=torch.float32),
    "a": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "threshold": torch.tensor([3.0, 2.0], dtype=torch.float64),
    "half": torch.ones(3, 1, dtype=torch.bfloat16),
    "scalar": torch.tensor(3.0),
    "idle_rows": torch.arange(6, dtype=torch.int32),
}


def cut(name: str, tensor: torch.Tensor) -> PiecewiseTensor:
    pieces = (tensor,) if not tensor.shape else torch.split(tensor, 2)
    return PiecewiseTensor(name, tensor.dtype, tuple(tensor.shape), lambda: pieces)


def test_a_file_has_the_bytes_that_the_library_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piecewise, "PIECE_BYTES", 5)
    pieces = list(safetensors_pieces([cut(*item) for item in TENSORS.items()], {"a": '"\u00e9\n'}))
    assert max(map(len, pieces[1:])) <= 5
    assert b"".join(pieces) == safetensors.torch.save(TENSORS, {"a": '"\u00e9\n'})


@pytest.mark.parametrize("columns", [1, 2, 5, 9])
def test_a_transpose_is_made_of_columns(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(piecewise, "TRANSPOSED_BYTES", columns * 7 * 4)
    made = transposed(
        "x", (5, 7), lambda taken: (rows[:, taken] for rows in torch.split(matrix, 3))
    )
    pieces = [piece.clone() for piece in made.pieces()]
    assert max(map(len, pieces)) == min(columns, 5)
    assert torch.equal(torch.cat(pieces), matrix.T)


def write(folder: Path, n_latents: int) -> Run:
    """Write a checkpoint of n latents in parts of 1 MiB, without having it in memory."""
    sae = {"kind": "jumprelu", "n_latents": n_latents, "init": "random"}
    run = load_run(write_run(folder, sae=sae))
    checkpoints = Checkpoints(open_store(run.store.runs), run.name, 1)
    row = torch.arange(1.0, D_IN + 1).expand(n_latents, D_IN)
    vector = torch.ones(n_latents)
    tensors = {"W_enc": row, "W_dec": row, "b_enc": vector, "theta": vector, "b_dec": row[0]}
    scalars = {
        "scale": 0.5,
        "mean": [0.0] * D_IN,
        "variance": 1.0,
        "rows": 1,
        "run": run_fingerprint(run),
    }
    save(checkpoints, 5, {**tensors, IDLE_ROWS: vector.long()}, scalars)
    return run


def small_blocks() -> None:
    """Reduce buffer sizes. Runs in a separate process, so nothing needs to be restored."""
    piecewise.TRANSPOSED_BYTES, piecewise.PIECE_BYTES = 4 * MIB, MIB
    raw.MEMORY_BYTES = 8 * MIB


def exported(run: Run) -> None:
    small_blocks()
    export(run)


def converted(run: Run) -> None:
    small_blocks()
    output = Path(run.store.runs) / "whole.safetensors"
    maintenance.convert(run, output, step=None, moments=False)


def left_to_another_run(run: Run) -> None:
    small_blocks()
    other = run.model_copy(update={"name": "other"})
    maintenance.convert_to_run(run, other, step=None)


@pytest.mark.system
@pytest.mark.parametrize(
    ("program", "bound"), [(exported, 28), (converted, 8), (left_to_another_run, 16)]
)
def test_memory_does_not_grow_with_the_width(
    program: Callable[[Run], None], bound: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peak memory is bounded for weights of 8 MiB and of 32 MiB.

    Parts are 1 MiB, and eight of them are copied at a time. Export uses 8 MiB for weights, 4 MiB
    for the transpose, and 24 bytes per latent.
    """
    monkeypatch.setattr(layout, "PART_BYTES", MIB)
    tiny, small, large = (write(tmp_path / str(n), n) for n in (1024, 8192, 32_768))
    peaks = [peak_bytes(program, (tiny,), (run,)) for run in (small, large)]
    assert peaks[1] - peaks[0] < 8 * MIB
    assert peaks[1] < bound * MIB


def loaded(run: Run) -> None:
    checkpoint = find_checkpoint(open_store(run.store.runs), run, None)
    assert checkpoint is not None
    warm_start.load(build_sae(run.sae, D_IN), checkpoint)


def test_a_warm_start_holds_a_part_beside_the_dictionary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "PART_BYTES", MIB)
    tiny, large = (write(tmp_path / str(n), n) for n in (1024, 65_536))
    assert peak_bytes(loaded, (tiny,), (large,)) < (2 * 64 + 8) * MIB


def test_rows_that_nobody_wrote_are_no_zeros(tmp_path: Path) -> None:
    run = write(tmp_path, 64)
    checkpoints = Checkpoints(open_store(run.store.runs), run.name, 1)
    checkpoint = checkpoints.open(5)
    W_enc = checkpoint.manifest.tensors["W_enc"].model_copy(update={"shape": (65, D_IN)})
    tensors = {**checkpoint.manifest.tensors, "W_enc": W_enc}
    checkpoints.commit(5, [tensors], checkpoint.scalars)
    output = tmp_path / "whole.safetensors"
    with pytest.raises(CorruptObjectError, match="W_enc is missing rows from 64 on"):
        maintenance.convert(run, output, step=None, moments=False)
    assert not output.exists()
