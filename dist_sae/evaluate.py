"""`dist-sae evaluate`: the newest checkpoint on held-out text, beside what it must beat."""

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_sae.checkpoint.lineage import Lineage
from dist_sae.checkpoint.trained import Trained, read_trained
from dist_sae.config import Run
from dist_sae.config.data import HuggingFaceModel
from dist_sae.config.sae import RoutedConfig
from dist_sae.data.consumers import kept_units
from dist_sae.data.heldout import rows_of
from dist_sae.data.loader import Units
from dist_sae.data.plan import load_plan
from dist_sae.errors import ConfigError, NonFiniteError
from dist_sae.evaluation.cross_entropy import cross_entropies
from dist_sae.sae.base import Dictionary
from dist_sae.sae.metrics import Fit, duplicate_shares
from dist_sae.storage import UNMETERED, Meter, open_store

logger = logging.getLogger(__name__)

_PCA_ROWS = 100_000
_EXPORTED = {"l0_latents": "l0"} | {
    name: name for name in ("step", "rows", "fvu", "pca_fvu", "dead_share", "ce_recovered")
}
"""Metrics, and what they are called in the result."""
_DENSITY_EDGES = [-7 + 0.25 * i for i in range(29)]  # log10, to 0


def evaluate(run: Run, meter: Meter = UNMETERED) -> dict[str, Any]:
    """Measure the newest checkpoint and leave the result in `<run>/evaluation.json`.

    Args:
        run: The run.
        meter: Takes the metrics.

    Returns:
        `trained_rows`; `dead_share`, of routed dictionaries by expert too; on `rows` held-out rows
        `fvu`, `l0`, `pca_fvu` (of a PCA of training rows with as many components as latents are
        active), `duplicate_share` (of latents with a near copy, and that have one in another
        expert), densities, and for language models the cross-entropies in nats per token (`ce_of`
        next or masked ones; `ce_left_out` says why there are none) with the site left alone
        (`ce_clean`), replaced by the reconstruction (`ce_spliced`), by zero (`ce_zero`) and by the
        mean (`ce_mean`), with the shares recovered.

    Raises:
        ConfigError: There is no checkpoint, or nothing is held out.
        PlanMismatchError: The run was trained with other settings, or on another activation set.
    """
    runs = open_store(run.store.runs, run.store.s3, meter)
    store = open_store(run.store.activations, run.store.s3, meter)
    plan = load_plan(store, run)
    run = plan.resolve(run)
    trained = read_trained(runs, run)
    if trained is None:
        raise ConfigError(
            f"{runs.url}/{run.name}: holds no checkpoint yet; run `dist-sae train` first"
        )
    trained.check_plan(plan.hash)
    if not len(plan.heldout_units):
        raise ConfigError("activations.heldout_share: is 0, so there is nothing to evaluate on")
    units = Units(store, plan, run.site, threading.Event())
    step, sae, scale, mean = trained.step, trained.sae, trained.scale, trained.mean

    fit = Fit.empty(run.sae.n_latents)
    for x in _scaled_rows(units, plan.heldout_units, scale, run.evaluate.rows):
        fit = fit.add(x, sae.infer(x), mean)
    components = min(max(1, round(fit.l0)), len(mean))
    # where no training unit is left PCA sees the held-out rows, which can only flatter it
    kept = kept_units(store, plan) or plan.heldout_units
    pca = _principal_components(units, kept, scale, components)
    pca_error = torch.zeros((), dtype=torch.float64)
    for x in _scaled_rows(units, plan.heldout_units, scale, run.evaluate.rows):
        centred = x - mean
        pca_error += (centred - centred @ pca @ pca.T).double().square().sum()
    result = {
        "step": step,
        "trained_rows": step * run.train.batch_rows,
        "rows": fit.rows,
        "fvu": fit.fvu,
        "l0": fit.l0,
        **_dead_shares(run, trained, trained.idle_rows.masked_fill(fit.counts > 0, 0)),
        "pca_fvu": float(pca_error / fit.squared_total),
        "pca_components": components,
        **_duplicates(run, sae),
        **_density_histogram(fit),
    }
    if isinstance(run.model, HuggingFaceModel) and run.evaluate.contexts:
        result |= cross_entropies(run, run.model, plan, sae, scale, mean)
    bad = [name for name, value in result.items() if isinstance(value, float) and value != value]  # noqa: PLR0124
    if bad:
        raise NonFiniteError(f"{runs.url}/{run.name}: {', '.join(bad)} came out as NaN")
    runs.put(f"{run.name}/evaluation.json", json.dumps(result, indent=1).encode())
    for metric, name in _EXPORTED.items():
        if result.get(name) is not None:
            meter.set(f"dist_sae_evaluate_{metric}", result[name])
    return result


def _scaled_rows(
    units: Units, numbers: range, scale: float, limit: int
) -> Iterator[Float[Tensor, "rows d_in"]]:
    for acts in rows_of(units, numbers, limit):
        yield acts * scale


def _principal_components(
    units: Units, numbers: range, scale: float, components: int
) -> Float[Tensor, "d_in components"]:
    """The leading directions of the rows of units, about their mean."""
    rows, total, products = 0, torch.zeros(()), torch.zeros(())
    for x in _scaled_rows(units, numbers, scale, _PCA_ROWS):
        rows += len(x)
        total = total + x.double().sum(0)
        products = products + (x.T @ x).double()
    mean = total / rows
    covariance = products / rows - torch.outer(mean, mean)
    directions: Tensor = torch.linalg.eigh(covariance).eigenvectors
    return directions[:, -components:].float()


def _dead_shares(
    run: Run, trained: Trained, idle_rows: Int[Tensor, " n_latents"]
) -> dict[str, Any]:
    """None while fewer rows than `dead_after_rows` were counted: nobody can know yet."""
    counted = Lineage.from_scalars(trained.checkpoint.scalars).counted_rows
    if counted + trained.step * run.train.batch_rows < run.dead_after_rows:
        return {"dead_share": None}
    dead = (idle_rows >= run.dead_after_rows).double()
    shares: dict[str, Any] = {"dead_share": float(dead.mean())}
    if isinstance(run.sae, RoutedConfig):
        shares["dead_share_by_expert"] = dead.view(run.sae.experts, -1).mean(1).tolist()
    return shares


def _duplicates(run: Run, sae: Dictionary) -> dict[str, float]:
    experts = run.sae.experts if isinstance(run.sae, RoutedConfig) else 1
    anywhere, elsewhere = duplicate_shares(sae.W_dec, experts)
    across = {"duplicate_share_across_experts": elsewhere} if experts > 1 else {}
    return {"duplicate_share": anywhere, **across}


def _density_histogram(fit: Fit) -> dict[str, Any]:
    """How many latents fire how often, on a log scale."""
    fired = fit.densities[fit.counts > 0].log10()
    edges = torch.tensor(_DENSITY_EDGES, dtype=torch.float64)
    counts = torch.histogram(fired.clamp(float(edges[0]), float(edges[-1])), edges).hist
    return {
        "density_log10_edges": _DENSITY_EDGES,
        "density_counts": counts.long().tolist(),
        "never_fired": int((fit.counts == 0).sum()),
    }
