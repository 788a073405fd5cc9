"""The law over widths, in trained dictionaries of known worlds (`--long`)."""

import numpy as np
import pytest

from dist_sae.analysis.law import Width, fit
from dist_sae.analysis.truth import match_features
from dist_sae.config.sae import BatchTopKConfig, TopKConfig
from dist_sae.index.decoder import directions
from tests.dictionaries.worlds import World, train


@pytest.mark.system
@pytest.mark.parametrize(
    ("zipf", "recipe", "exponent"),
    [(0.7, TopKConfig, -0.75), (1.0, TopKConfig, -1.04), (1.3, BatchTopKConfig, -1.28)],
)
def test_trained_dictionaries_have_the_exponent_of_their_world(
    request: pytest.FixtureRequest,
    zipf: float,
    recipe: type[TopKConfig | BatchTopKConfig],
    exponent: float,
) -> None:
    """The law's exponent over three trained widths is within .1 of its expected value.

    The dictionaries train with AuxK on 3.1 M rows, for 3 minutes per world. When this was written
    the exponents were -.743, -1.012 and -1.366.

    At s = 1.3 TopK's exponent is -1.09, and more rows would not help. Five of the six most frequent
    features have no latent of their own, because TopK's latents mix them. With TopK 186 of 256
    latents are features, with BatchTopK 245.
    """
    if not request.config.getoption("--long"):
        pytest.skip("trains for minutes; needs --long")
    world = World(d_in=128, n_features=2048, l0=6, zipf=zipf)
    widths = []
    for n in (128, 256, 512):
        config = recipe(n_latents=n, k=6, auxk=64, dead_after_rows=100_000)
        trained = train(world, config, steps=3000, batch=1024, lr=3e-3)
        found = match_features(world.directions, [(0, directions(trained.sae.W_dec.detach()))])
        recovered = np.isin(np.arange(2048), list(found))
        every = np.ones(2048, np.bool_)
        alive = n - trained.dead.count
        widths.append(Width(f"{n}", n, alive, 3_072_000, world.p.numpy(), every, recovered))
        assert len(found) >= 0.8 * n
    law = fit(widths).law
    assert law is not None
    assert law.exponent.value == pytest.approx(exponent, abs=0.1)
