"""Conversion of old checkpoints, which store logarithms of thresholds."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_sae.checkpoint.layout import Checkpoints, Piece
from dist_sae.storage import open_store
from tests.checkpoint.test_state import advance, make_run, make_state, tensors
from tests.dictionaries.recipes import D_IN


def as_stored_once(name: str, rows: Tensor, theta: Tensor) -> tuple[str, Tensor]:
    """Convert back by theta = exp(l) / sqrt(d_in), and its gradient dL/dl = dL/dtheta theta."""
    if not name.endswith("theta"):
        return name, rows
    old = name.replace("theta", "log_threshold")
    if name.startswith("exp_avg_sq"):
        return old, rows * theta * theta
    return old, rows * theta if name.startswith("exp_avg") else (rows * D_IN**0.5).log()


@pytest.mark.parametrize("kind", ["jumprelu", "jumprelu_tanh"])
def test_a_run_goes_on_from_an_older_checkpoint(tmp_path: Path, kind: str) -> None:
    """Weights, running mean and both moments are restored from an old checkpoint.

    The checkpoint may also be a copy, as made for a warm start.
    """
    run = make_run(tmp_path, kind)
    state = make_state(run, kind)
    advance(state, range(4))
    expected = tensors(state)
    pieces = []
    for name, rows, first, total in state.pieces():
        pieces.append(Piece(*as_stored_once(name, rows, expected["theta"]), first, total))
    checkpoints = Checkpoints(open_store(str(tmp_path)), "run", keep=1)
    checkpoints.commit(4, [checkpoints.write(4, pieces)], {})
    copies = Checkpoints(open_store(str(tmp_path)), "copy", keep=1)
    older = checkpoints.open(4)
    copies.commit(4, [copies.copy(older, older.manifest.tensors)], {})

    for checkpoint in (older, copies.open(4)):
        again = make_state(run, kind)
        again.read(checkpoint)()
        for name, tensor in tensors(again).items():
            torch.testing.assert_close(tensor, expected[name], msg=name)
        torch.testing.assert_close(checkpoint.read("theta", 5, 9), expected["theta"][5:9])
