"""The run's fingerprint: the settings that decide the result, not those about how to compute it.

Every checkpoint stores it. A checkpoint is refused if its fingerprint differs from the run file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dist_sae.config import Run, differences, sections_of, validate_run
from dist_sae.config.renamed import with_new_names
from dist_sae.errors import PlanMismatchError

_OLD_DEAD_AFTER_ROWS = 10_000_000  # default of older runs; it depends on train.rows now
_OLD_DEFAULTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "jumprelu": {
        "sparsity": (6e-4, 1e-3, 2e-3),
        "initial_threshold": (0.001,),
        "bandwidth": (0.001,),
    },
    "jumprelu_tanh": {
        "sparsity": (20.0, None),
        "sparsity_warmup_share": (1.0,),
        "initial_l0": (10_000.0,),
    },
    "relu": {"decoder_norm": (0.1,)},
}
_FREE_SETTINGS = {
    "store",
    "sweep",
    "processes",
    "timeouts",
    "evaluate",
    "index",
    "telemetry",
    "cluster",
    "export",
    "train.max_passes",  # more passes change no batch of the earlier ones
    "train.log_every_steps",
    "train.save_every_steps",
    "train.save_in_background",
    "train.keep_checkpoints",
    "train.keep_every_steps",
    "train.keep_best",
    "train.heldout_rows",
}
PLAN_SECTIONS = ("model", "corpus", "activations")
"""Sections that `data.plan` compares with the plan of the activation set instead."""


def run_fingerprint(run: Run) -> dict[str, Any]:
    """Return the settings that decide the result. Every checkpoint stores them."""
    settings = sections_of(run.resolved())
    for free in _FREE_SETTINGS:
        section, _, key = free.partition(".")
        (settings[section] if key else settings).pop(key or section, None)
    return settings


def changes(stored: Mapping[str, Any], run: Run, *, but: Sequence[str] = ()) -> list[str]:
    """List how a run's settings differ from a checkpoint's: `["train.lr: 0.001 -> 0.002"]`.

    Both sides are first resolved by this version: missing keys of older settings get their
    defaults, and values that follow from other settings are filled in.

    Args:
        stored: Result of `run_fingerprint`, perhaps from an older version.
        run: The run, from its run file.
        but: Sections that are not compared.

    Raises:
        ConfigError: This version cannot read the stored settings.
    """
    old = _compared(stored_run(stored, run, run.name))
    new = _compared(as_begun(run, stored))
    for section in but:
        old.pop(section), new.pop(section)
    return differences(old, new)


def check_same_run(stored: Mapping[str, Any], run: Run, place: str, remedy: str = "") -> Run:
    """Return the run with a checkpoint's settings, after checking that the run file agrees.

    Args:
        stored: Result of `run_fingerprint`, perhaps from an older version.
        run: The run, from its run file. Its `PLAN_SECTIONS` are not compared.
        place: Location of the checkpoint, for messages.
        remedy: Advice for the user; by default `restore them or choose another name`.

    Raises:
        PlanMismatchError: The settings differ.
        ConfigError: This version cannot read the stored settings.
    """
    if changed := changes(stored, run, but=PLAN_SECTIONS):
        raise PlanMismatchError(
            f"{place}: contains a run with other settings ({'; '.join(changed)}); "
            f"{remedy or 'restore them or choose another name'}"
        )
    return stored_run(stored, run, place)


def as_begun(run: Run, stored: Mapping[str, Any]) -> Run:
    """Return the run with its original values for settings that its file leaves open."""
    run = run.filled(stored)
    fields = type(run.sae).model_fields
    was_default = {
        key: stored["sae"][key]
        for key, values in _OLD_DEFAULTS.get(run.sae.kind, {}).items()
        if stored["sae"].get(key, key) in values and getattr(run.sae, key) == fields[key].default
    }
    run = run.model_copy(update={"sae": run.sae.model_copy(update=was_default)})
    if run.train.rows == "all":  # no plan yet, so dead_after_rows is open too
        return run
    left_open = run.sae.model_copy(update={"dead_after_rows": None})
    follows = run.model_copy(update={"sae": left_open}).dead_after_rows
    was = stored["sae"]["dead_after_rows"]
    if was != _OLD_DEAD_AFTER_ROWS or run.dead_after_rows != follows:
        return run
    return run.model_copy(update={"sae": run.sae.model_copy(update={"dead_after_rows": was})})


def stored_run(stored: Mapping[str, Any], run: Run, origin: str) -> Run:
    """Build a run from stored settings. Stores and free keys of `train` come from the run file.

    Raises:
        ConfigError: This version cannot read the stored settings.
    """
    stores = {"activations": run.store.activations, "runs": run.store.runs}
    keys = {free.removeprefix("train.") for free in _FREE_SETTINGS if free.startswith("train.")}
    free_settings = run.train.model_dump(mode="json", include=keys)
    settings = with_new_names(stored)
    train = {**settings["train"], **free_settings}
    return validate_run({**settings, "train": train, "store": stores}, origin)


def _compared(run: Run) -> dict[str, Any]:
    settings = run_fingerprint(run)
    one = len(run.reads) == 1 and run.reads == run.writes  # may be given by train.site or reads
    settings["train"]["site"] = run.site if one else None
    sites = {"reads": list(run.reads), "writes": list(run.writes)}
    settings["sae"] |= dict.fromkeys(sites) if one else sites
    return settings
