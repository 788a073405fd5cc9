"""Finds settings that have no effect, and data that is too small to measure on. Pure."""

import math
from collections.abc import Iterator

from dist_sae.config import Run
from dist_sae.config.dictionary import KSelectionConfig
from dist_sae.data.plan import Plan

_FEW_DOCUMENTS = 30  # from 30 samples on, a mean is roughly normally distributed


def ineffective_settings(run: Run, plan: Plan) -> list[str]:
    """List warnings about settings without effect, before a run costs anything.

    Args:
        run: The run, resolved by its plan.
        plan: The plan of its activation set.

    Returns:
        One line per setting, starting with its key. Empty for most runs.
    """
    return [
        f"{key}: {words}"
        for lines in (_dictionary, _course, _checkpoints)
        for key, words in lines(run)
    ] + [f"{key}: {words}" for key, words in _data(run, plan)]


def _dictionary(run: Run) -> Iterator[tuple[str, str]]:
    sae, window = run.sae, run.dead_after_rows
    # a child with its parent's state also continues the counts of rows
    continued = run.train.parent is not None and run.train.parent.state
    if window >= run.rows and not continued:
        auxk = ", so AuxK has no effect" if isinstance(sae, KSelectionConfig) and sae.auxk else ""
        yield (
            "sae.dead_after_rows",
            f"{window:,} rows, and the run has only {run.rows:,}: no latent can be dead{auxk}, "
            f"and the dead share stays unknown; leave it out, or lower it",
        )
    if isinstance(sae, KSelectionConfig):
        yield from _selection(sae, run.steps)


def _selection(sae: KSelectionConfig, steps: int) -> Iterator[tuple[str, str]]:
    if sae.auxk and not sae.auxk_coefficient:
        yield "sae.auxk_coefficient", f"is 0, so sae.auxk ({sae.auxk}) has no effect"
    if sae.k_start is not None and sae.k_anneal_share * steps <= 1:
        yield (
            "sae.k_start",
            f"reaches k within {sae.k_anneal_share:g} of {steps} steps, so it has no effect; "
            f"raise sae.k_anneal_share",
        )


def _course(run: Run) -> Iterator[tuple[str, str]]:
    train, steps = run.train, run.steps
    if train.warmup_steps >= steps:
        yield (
            "train.warmup_steps",
            f"{train.warmup_steps}, and the run has only {steps} steps: the learning rate never "
            f"reaches {run.lr:g}; lower it",
        )
    elif train.warmup_steps > (1 - train.decay_share) * steps:
        yield (
            "train.warmup_steps",
            f"{train.warmup_steps} of {steps} steps overlap the decay (train.decay_share: "
            f"{train.decay_share:g}), so the rate never reaches {run.lr:g}; lower one of them",
        )
    share = getattr(run.sae, "sparsity_warmup_share", 0.0)
    aims = run.sae.sparsity_key == "target_l0"
    warm_up = "the target L0 starts at sae.initial_l0" if aims else "the penalty rises from 0"
    if train.parent is not None and share:
        yield (
            "sae.sparsity_warmup_share",
            f"{share:g}: {warm_up} again, although the weights come from "
            f"{train.parent.run}; use 0 to skip the warm-up",
        )


def _checkpoints(run: Run) -> Iterator[tuple[str, str]]:
    train, steps = run.train, run.steps
    saves = -(-steps // train.save_every_steps)
    if train.save_every_steps > steps:
        yield (
            "train.save_every_steps",
            f"{train.save_every_steps}, and the run has only {steps} steps: it is saved only at "
            f"the end or when stopped; a crash loses everything",
        )
    if 0 < saves <= train.keep_best:
        yield "train.keep_best", f"{train.keep_best} of {saves} checkpoints: all are kept"
    every = train.keep_every_steps
    if every and every != train.save_every_steps:
        meet = math.lcm(every, train.save_every_steps)
        if meet > steps:
            yield (
                "train.keep_every_steps",
                f"{every}: no save (every {train.save_every_steps} steps) falls on a multiple of "
                f"it; use a multiple of train.save_every_steps",
            )
    if train.log_every_steps > steps:
        yield (
            "train.log_every_steps",
            f"{train.log_every_steps}, and the run has only {steps} steps: metrics are logged only "
            f"at the end",
        )


def _data(run: Run, plan: Plan) -> Iterator[tuple[str, str]]:
    train, there = run.train, plan.pass_rows
    documents = sum(span.count for unit in plan.heldout_units for span in plan.units[unit])
    held_out = sum(plan.rows_of_units[plan.n_train_units :])
    if documents and documents < _FEW_DOCUMENTS:
        yield (
            "activations.heldout_share",
            f"{documents} documents (about {held_out:,} rows) are held out: results "
            f"on so few documents depend on which ones they are; raise it, or add text",
        )
    if train.heldout_rows > held_out > 0:
        yield (
            "train.heldout_rows",
            f"{train.heldout_rows:,}, but only about {held_out:,} are held out: all of them are "
            f"used",
        )
    normaliser_rows = train.normaliser_rows or 0  # filled in by the plan
    if normaliser_rows >= there and len(plan.train_units) > plan.streams:
        yield (
            "train.normaliser_rows",
            f"{normaliser_rows:,}, but there will only be about {there:,}: training waits "
            f"for the last unit; lower it",
        )
    mixed = there * plan.streams * plan.window_units // len(plan.train_units)
    if 2 * train.batch_rows > min(mixed, there):
        yield (
            "train.batch_rows",
            f"{train.batch_rows:,} of the {min(mixed, there):,} rows that are mixed at a time: "
            f"batches contain neighbouring rows of a document; lower it, or raise "
            f"activations.window_units",
        )
    if train.max_passes > 1 and train.parent is None and run.rows < 0.95 * there:
        yield (
            "train.max_passes",
            f"{train.max_passes}, but one pass has about {there:,} rows, more than train.rows: "
            f"units are kept for a second pass that never happens; use 1",
        )
    ahead = run.store.max_ahead_units
    if ahead is not None and ahead >= len(plan.units):
        yield (
            "store.max_ahead_units",
            f"{ahead}, but there are only {len(plan.units)} units, so it has no effect",
        )
