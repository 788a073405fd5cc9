"""Gated dictionaries: which loss term trains which parameters."""

import torch
from torch import Tensor

from tests.dictionaries.recipes import CONFIGS, gradients, make, rows, sae_rows, step


def test_the_decoder_learns_nothing_from_the_gates() -> None:
    """Gate losses do not train the decoder, and the reconstruction does not train the gates.

    One other implementation forgets to detach the decoder in the gates' auxiliary loss.
    """
    sae = make(CONFIGS["gated"])

    def learnt_from(term: str) -> dict[str, Tensor]:
        return gradients(sae, getattr(sae.objective(sae_rows(rows()), step()).terms, term))

    for term in ("auxk", "sparsity"):
        found = learnt_from(term)
        assert found["b_enc"].norm() > 0
        for name in ("W_dec", "b_dec", "r_mag", "b_mag"):
            assert not found[name].any(), name
    found = learnt_from("fvu")
    assert found["b_mag"].norm() > 0
    torch.testing.assert_close(found["b_enc"], torch.zeros_like(found["b_enc"]))
