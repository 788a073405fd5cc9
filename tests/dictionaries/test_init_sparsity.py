"""How sparse new dictionaries of penalized recipes are, and where their thresholds start."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dist_sae.config.dictionary import DictionaryConfig
from dist_sae.config.sae import GatedConfig, JumpReLUConfig, JumpReLUTanhConfig, ReLUConfig
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.init import initialise_from_data
from tests.dictionaries.recipes import CONFIGS, D_IN, PENALISED, sae_rows


def batch(rows: int) -> Tensor:
    return 1 + torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(100))


@pytest.mark.parametrize(("initial_l0", "expected"), [(30.0, 30.0), (100.0, 100.0), (1e4, 256.0)])
@pytest.mark.parametrize("kind", PENALISED)
def test_penalised_recipes_begin_with_so_many_active_latents(
    kind: str, initial_l0: float, expected: float
) -> None:
    """Penalized recipes start with initial_l0 active latents per row, at most half of all latents.

    Each latent starts active on the same number of rows, whatever the encoder's scale.
    """
    changed = {"initial_l0": initial_l0, "n_latents": 512}
    sae: Dictionary = build_sae(CONFIGS[kind].model_copy(update=changed), D_IN)  # type: ignore[arg-type]
    x = batch(2000)
    sae.initialise(sae_rows(x), seed=1)
    initialise_from_data(sae, [sae_rows(x)])
    codes = sae.encode(x)
    assert len(codes.acts) / len(x) == pytest.approx(expected, rel=0.01)
    counts = torch.bincount(codes.latents, minlength=512)
    # counts may differ where two rows are within rounding
    assert (counts != counts.mode().values).sum() <= 2
    found = {name: tensor.detach().clone() for name, tensor in sae.named_parameters()}
    torch.testing.assert_close(normalize(found["W_enc"]), normalize(found["W_dec"]))
    lengths = found["W_enc"].norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(512))
    assert lengths[0] != pytest.approx(1, abs=0.05)
    norm = 0.5 if kind == "relu" else 1.0
    torch.testing.assert_close(found["W_dec"].norm(dim=1), torch.full((512,), norm))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (JumpReLUConfig(n_latents=512, sparsity=0.01), 10),  # a tenth of the total variance
        # the total variance is 16, and .16 is a hundredth of that
        (JumpReLUTanhConfig(n_latents=512, sparsity=0.16), 10),
        (JumpReLUTanhConfig(n_latents=512), 50),
        (JumpReLUTanhConfig(n_latents=512, sparsity=None), 200),
        (JumpReLUConfig(n_latents=512, target_l0=13), 26),  # twice the target
        (JumpReLUConfig(n_latents=512, target_l0=400), 256),
        (ReLUConfig(n_latents=512, sparsity=0.8), 16),
        (GatedConfig(n_latents=512, sparsity=1.6), 16),
        (JumpReLUConfig(n_latents=512, sparsity=0.0), 256),
    ],
)
def test_the_number_at_the_start_follows_from_the_penalty(
    config: DictionaryConfig, expected: int
) -> None:
    sae: Dictionary = build_sae(config, D_IN)  # type: ignore[arg-type]
    x = batch(2000)
    sae.initialise(sae_rows(x), seed=1)
    assert len(sae.encode(x).acts) / len(x) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("config", "expected", "is_scaled"),
    [
        (JumpReLUConfig(n_latents=64, sparsity=0.04), 0.2, True),
        (JumpReLUConfig(n_latents=64, initial_threshold=0.3), 0.3, False),
        (JumpReLUTanhConfig(n_latents=64, initial_threshold=0.1), 0.1 / 4, False),
    ],
)
def test_thresholds_begin_where_a_code_repays_its_cost(
    config: DictionaryConfig, expected: float, *, is_scaled: bool
) -> None:
    """The initial threshold is the activation at which a code repays its penalty.

    The rows have norm 4, so a code f explains at most f^2 of 16, and the threshold satisfies .2^2 =
    lambda. Computed thresholds scale with the encoder, whose rows had unit norm. Given thresholds
    do not. The scaling is applied once, whichever directions the latents start from.
    """
    sae: Dictionary = build_sae(config, D_IN)  # type: ignore[arg-type]
    sae.initialise(sae_rows(batch(24)), seed=1)
    for from_data in (False, True):
        if from_data:
            initialise_from_data(sae, [sae_rows(batch(24))])
        found = {name: tensor.detach().clone() for name, tensor in sae.named_parameters()}
        scale = found["W_enc"].norm(dim=1) if is_scaled else torch.ones(64)
        torch.testing.assert_close(found["theta"], expected * scale)
