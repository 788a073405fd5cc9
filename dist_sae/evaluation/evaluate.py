"""`dist-sae evaluate`: measures a checkpoint on held-out text and compares it with baselines."""

import json
import logging
import time
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dist_sae import __version__, logs
from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.checkpoint.lineage import Lineage
from dist_sae.checkpoint.pages import PagedDictionary
from dist_sae.checkpoint.trained import (
    Trained,
    find_checkpoint,
    no_checkpoint_error,
    suffix,
    use_trained,
)
from dist_sae.config import Run
from dist_sae.config.data import HuggingFaceModel
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.plan import Plan, load_plan
from dist_sae.dictionaries.metrics import Fit, duplicate_shares
from dist_sae.dictionaries.normaliser import SiteNormalisers
from dist_sae.distributed.mesh import SINGLE_PROCESS, Mesh
from dist_sae.environment import hardware, versions
from dist_sae.errors import ConfigError, NonFiniteError
from dist_sae.evaluation.cross_entropy import cross_entropies
from dist_sae.evaluation.facts import (
    evaluation_key,
    read_evaluation,
    run_facts,
    training_seconds,
    unit_totals,
)
from dist_sae.evaluation.latent_scaling import LatentScaling, is_applicable
from dist_sae.evaluation.pca import WIDEST, pca_fvu
from dist_sae.storage import UNMETERED, Meter, ObjectStore, open_store
from dist_sae.telemetry.history import read_history
from dist_sae.telemetry.metrics import gauges

logger = logging.getLogger(__name__)

_DENSITY_EDGES = [-7 + 0.25 * i for i in range(29)]  # log10 of density, up to 0


def evaluate(
    run: Run, meter: Meter = UNMETERED, step: int | None = None, mesh: Mesh = SINGLE_PROCESS
) -> dict[str, Any]:
    """Measure a checkpoint and write the result to `<run>/evaluation.json`. Collective.

    An existing evaluation with the same settings is reused. The result for a step other than the
    newest is written to `<run>/evaluation-step-<step>.json`.

    Args:
        run: The run.
        meter: Receives the metrics.
        step: Step of the checkpoint; None takes the newest.
        mesh: Ranks that share the dictionary, and the language model if it is split.

    Returns:
        The subject (`evaluation.facts`), `hardware`, `versions` and `evaluate_seconds`, and:

        - `dead_share`, for routed dictionaries also by expert.
        - `fvu`, `l0` and densities on `rows` held-out rows.
        - `pca_fvu`: FVU of a PCA of training rows with as many components as latents are active. It
          reads the written sites, which a transcoder does not.
        - `duplicate_share`: latents with a near copy; for routed dictionaries also latents with
          one in another expert.
        - For a crosscoder of two sites, the shares of its latents that belong to both sites or to
          one (`LatentScaling.result`).
        - For language models, cross-entropies in nats per token with the written sites unchanged
          (`ce_clean`), replaced by the reconstruction (`ce_spliced`), by zero (`ce_zero`) and by
          the mean (`ce_mean`); the shares recovered; and 95 % `intervals` of these numbers. `ce_of`
          is next or masked tokens. If there are none, `ce_left_out` is the reason.

        If several sites are written, they are all replaced at once, by reconstructions from the
        plain model's activations at the sites that are read. `fvu_by_site` and `ce_by_site` are for
        each site alone, with the others unchanged. If the dictionary is causal over layers, its
        replacement model is measured too (`ce_replacement`, `ce_recovered_replacement`). It reads
        its own activations, after the replacements in earlier layers, so errors accumulate.

        The dictionary computes in fp32 without TF32 on every device. So the numbers depend on the
        weights and not on the machine, up to the order of sums.

    Raises:
        ConfigError: There is no checkpoint, or no rows are held out.
        PlanMismatchError: The run was trained with other settings, or on another activation set.
        UnitMissingError: A unit is missing, and no producer has shown a sign of life for
            `timeouts.missing_seconds`.
    """
    runs = open_store(run.store.runs, run.store.s3, meter)
    store = open_store(run.store.activations, run.store.s3, meter)
    plan = load_plan(store, run)
    if not len(plan.heldout_units):
        raise ConfigError("activations.heldout_share: is 0, so there are no rows to evaluate on")
    result = mesh.on_first_rank(lambda: _known(runs, store, run, plan, step))
    if result is None:
        if mesh.world > 1 and step is None:  # all must read the same one
            step = mesh.on_first_rank(lambda: _newest(runs, run), int | None)
        patience = float(run.timeouts.missing_seconds)  # its default is an int
        activations = ActivationSet(store, plan, run.sites, patience_seconds=patience)

        def measure(trained: Trained) -> dict[str, Any]:
            trained.check_plan(plan.hash)
            since = time.monotonic()
            result = _measure(runs, run, trained, activations, mesh)
            result["evaluate_seconds"] = time.monotonic() - since
            key = evaluation_key(run.name, trained.suffix)
            if mesh.is_first:
                runs.put(key, json.dumps(result, indent=1).encode())
            return result

        place = {"axis": mesh.axis, "device": mesh.device}
        memory_bytes = run.evaluate.memory_bytes
        result = use_trained(runs, run, step, measure, memory_bytes=memory_bytes, **place)
        if result is None:
            raise no_checkpoint_error(runs, run)
    for name, value, labels in gauges("evaluate", result):
        meter.set(name, value, **labels)
    return result


def _newest(runs: ObjectStore, run: Run) -> int | None:
    checkpoint = find_checkpoint(runs, run, None)
    return checkpoint and checkpoint.step


def _known(
    runs: ObjectStore, store: ObjectStore, run: Run, plan: Plan, step: int | None
) -> dict[str, Any] | None:
    """Read an earlier result if it is for the same checkpoint and settings, else return None."""
    checkpoint = find_checkpoint(runs, run, step)
    if checkpoint is None:
        return None
    key = evaluation_key(run.name, suffix(runs, run, checkpoint.step))
    found = read_evaluation(runs, key)
    if found is None:
        return None
    if found.get("made_from") != _made_from(
        run, checkpoint, plan, unit_totals(store, plan)["units"]
    ):
        return None
    logger.info("reusing the evaluation of step %d: %s/%s", checkpoint.step, runs.url, key)
    return found


def _made_from(run: Run, checkpoint: Checkpoint, plan: Plan, units: int) -> dict[str, Any]:
    """Collect everything that a result depends on."""
    return {
        "checkpoint": checkpoint.digest,
        "plan": plan.hash,
        "units": units,  # number of existing units, because producers may still be running
        "rows": run.evaluate.rows,
        "contexts": run.evaluate.contexts,
        "dist_sae": __version__,
    }


def _measure(
    runs: ObjectStore, run: Run, trained: Trained, activations: ActivationSet, mesh: Mesh
) -> dict[str, Any]:
    own, pages, normalisers = trained.run, trained.pages, trained.normalisers
    plan, columns, device = activations.plan, normalisers.columns, pages.device
    mean = normalisers.mean.float().to(device)
    fit = Fit.empty(own.sae.n_latents, columns.values(), device)
    scaled = is_applicable(own.sae, normalisers.widths)
    scaling = LatentScaling(own.sae.n_latents, device) if scaled else None
    progress = logs.RateLimitedProgress("evaluate", enabled=mesh.is_first)
    there = min(run.evaluate.rows, sum(plan.rows_of_units[unit] for unit in plan.heldout_units))
    blocks = activations.heldout_rows(run.evaluate.rows)
    for rows in pages.grouped(normalisers.rows(block, device) for block in blocks):
        inferred = pages.infer(rows.inputs)
        fit = fit.add(rows.targets, inferred, mean)
        if scaling:
            scaling.add(rows.targets, inferred.x_hat, pages.encode_pages(rows.inputs))
        progress(fit.rows, max(there, fit.rows))
    progress.end(fit.rows)
    fit = fit.on_cpu()
    by_site = dict(zip(columns, fit.fvu_by_site, strict=True)) if len(columns) > 1 else None
    made = mesh.on_first_rank(lambda: unit_totals(activations.store, plan))
    result = {
        **run_facts(own, plan, made, trained.checkpoint),
        "training_seconds": training_seconds(read_history(runs, run.name), trained.step),
        "rows": fit.rows,
        "fvu": fit.fvu,
        **({"fvu_by_site": by_site} if by_site else {}),
        "l0": fit.l0,
        **_dead_shares(own, trained, trained.idle_rows.masked_fill(fit.counts > 0, 0)),
        **_pca(activations, normalisers, run.evaluate.rows, round(fit.l0), mesh),
        **_duplicates(own, pages),
        **(scaling.result(own.writes, fit.counts > 0, mesh.axis) if scaling else {}),
        **_density_histogram(fit),
    }
    if isinstance(run.model, HuggingFaceModel) and run.evaluate.contexts:
        result |= cross_entropies(
            activations, run, pages, normalisers, mesh, causal=own.sae.is_causal
        )
    bad = [name for name, value in result.items() if isinstance(value, float) and value != value]  # noqa: PLR0124
    if bad:
        raise NonFiniteError(f"{runs.url}/{run.name}: {', '.join(bad)} came out as NaN")
    made_from = _made_from(run, trained.checkpoint, plan, made["units"])
    return result | {"hardware": hardware(), "versions": versions(), "made_from": made_from}


def _dead_shares(
    run: Run, trained: Trained, idle_rows: Int[Tensor, " n_latents"]
) -> dict[str, Any]:
    """Compute shares of dead latents; None until `dead_after_rows` rows have been counted."""
    counted = Lineage.from_scalars(trained.checkpoint.scalars).counted_rows
    if counted + trained.step * run.train.batch_rows < run.dead_after_rows:
        return {"dead_share": None}
    dead = (idle_rows >= run.dead_after_rows).double()
    shares: dict[str, Any] = {"dead_share": float(dead.mean())}
    if run.sae.n_experts:
        shares["dead_share_by_expert"] = dead.view(run.sae.n_experts, -1).mean(1).tolist()
    return shares


def _pca(
    activations: ActivationSet, normalisers: SiteNormalisers, rows: int, l0: int, mesh: Mesh
) -> dict[str, Any]:
    """Measure a PCA with about as many components as active latents, if it is not too wide."""
    width = normalisers.widths.d_out
    if width > WIDEST:
        logger.info(
            "pca_fvu is left out: targets are %d wide, above the limit of %d", width, WIDEST
        )
        return {}
    components = min(max(1, l0), width)
    pca = partial(pca_fvu, activations, normalisers, rows, components, mesh.device)
    return {"pca_fvu": mesh.on_first_rank(pca, float), "pca_components": components}


def _duplicates(run: Run, pages: PagedDictionary) -> dict[str, float]:
    if not run.sae.has_latent_rows:
        return {}
    experts = run.sae.n_experts or 1
    anywhere, elsewhere = duplicate_shares(lambda: pages.parts("W_dec"), pages.n_latents, experts)
    across = {"duplicate_share_across_experts": elsewhere} if experts > 1 else {}
    return {"duplicate_share": anywhere, **across}


def _density_histogram(fit: Fit) -> dict[str, Any]:
    """Compute a histogram of latents by log10 of their density."""
    fired = fit.densities[fit.counts > 0].log10()
    edges = torch.tensor(_DENSITY_EDGES, dtype=torch.float64)
    counts = torch.histogram(fired.clamp(float(edges[0]), float(edges[-1])), edges).hist
    return {
        "density_log10_edges": _DENSITY_EDGES,
        "density_counts": counts.long().tolist(),
        "never_fired": int((fit.counts == 0).sum()),
    }
