"""SCIENCE D5 in small: the trainer finds a dictionary that is known."""

import torch

from dist_sae.config.data import SyntheticModel
from dist_sae.config.sae import TopKConfig
from dist_sae.models.synthetic import SyntheticSource
from dist_sae.sae import build_sae
from dist_sae.sae.base import identity_sum
from dist_sae.sae.dead import DeadLatents, fired
from dist_sae.sae.init import initialise
from dist_sae.sae.schedules import learning_rate

D_IN, N, L0, BATCH, STEPS = 64, 128, 3, 512, 700


def test_topk_recovers_a_flat_world() -> None:
    """As many latents as features, all equally frequent: nearly every feature gets a latent.

    The initial dictionary must not know the truth (largest cosine < .8), and 40 steps must not do,
    or the test would pass for a wrong reason. A latent or two may be dead in the end: AuxK gives no
    gradient to one whose pre-activation is negative on every row.
    """
    world = SyntheticSource(SyntheticModel(d_in=D_IN, n_features=N, l0=L0, zipf=0.0))
    sae = build_sae(TopKConfig(n_latents=N, k=L0, auxk=16, dead_after_rows=10_000), D_IN)
    optimizer = torch.optim.Adam(sae.parameters(), eps=6.25e-10)
    dead = DeadLatents(N, 10_000)
    recovered = {}
    for step in range(STEPS):
        x = world.intensities(step * BATCH, BATCH) @ world.directions
        x = x * (D_IN / L0) ** 0.5
        if step == 0:
            initialise(sae, x, seed=0, global_sum=identity_sum)
            assert float(best_cosines(sae.W_dec, world.directions).max()) < 0.8
        output = sae.objective(x, float(D_IN), dead.mask, identity_sum)
        output.terms.total.backward()  # type: ignore[no-untyped-call]
        sae.constrain_gradients()
        lr = learning_rate(step, STEPS, peak=1e-2, warmup_steps=20, decay_share=0.3)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        sae.constrain_parameters()
        dead.update(fired(output.codes, N), BATCH)
        recovered[step] = int((best_cosines(sae.W_dec, world.directions) > 0.9).sum())
    assert recovered[40] < 0.5 * N
    assert recovered[STEPS - 1] >= 0.9 * N  # 121 of 128 when this was written


def best_cosines(W_dec: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """For every true direction, the cosine with the latent nearest to it."""
    return (truth @ W_dec.detach().T).max(dim=1).values
