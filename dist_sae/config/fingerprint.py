"""The run's fingerprint: the settings that decide its result, as against how it is computed.

Every checkpoint carries it. Whoever reads a checkpoint compares the fingerprint with the run file
at hand and refuses it if they differ.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dist_sae.config import Run, differences, sections_of, validate_run
from dist_sae.config.renamed import with_new_names
from dist_sae.errors import PlanMismatchError

_OLD_DEAD_AFTER_ROWS = 10_000_000  # the default of runs that began before it followed train.rows
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
    "train.max_passes",  # later passes follow earlier ones: no batch before them changes
    "train.log_every_steps",
    "train.save_every_steps",
    "train.save_in_background",
    "train.keep_checkpoints",
    "train.keep_every_steps",
    "train.keep_best",
    "train.heldout_rows",
}
PLAN_SECTIONS = ("model", "corpus", "activations")
"""Compared with the plan of the activation set, which knows their content; see `data.plan`."""


def run_fingerprint(run: Run) -> dict[str, Any]:
    """The settings that decide the result; every checkpoint carries them."""
    settings = sections_of(run.resolved())
    for free in _FREE_SETTINGS:
        section, _, key = free.partition(".")
        (settings[section] if key else settings).pop(key or section, None)
    return settings


def changes(stored: Mapping[str, Any], run: Run, *, but: Sequence[str] = ()) -> list[str]:
    """List how a run's settings differ from a checkpoint's: `["train.lr: 0.001 -> 0.002"]`.

    Both are compared as this version reads them: a key that older settings lack has its default,
    and a value that follows from others is written out.

    Args:
        stored: What `run_fingerprint` gave, perhaps in an older version.
        run: As the run file says.
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
    """The run that a checkpoint's settings are of, once a run file is known to mean the same.

    Args:
        stored: What `run_fingerprint` gave, perhaps in an older version.
        run: As the run file says. `PLAN_SECTIONS` are not compared here.
        place: Where the settings are from, for messages.
        remedy: What to do, if not `restore them or choose another name`.

    Raises:
        PlanMismatchError: They differ.
        ConfigError: This version cannot read the stored settings.
    """
    if changed := changes(stored, run, but=PLAN_SECTIONS):
        raise PlanMismatchError(
            f"{place}: holds a run with other settings ({'; '.join(changed)}); "
            f"{remedy or 'restore them or choose another name'}"
        )
    return stored_run(stored, run, place)


def as_begun(run: Run, stored: Mapping[str, Any]) -> Run:
    """The run with the numbers that it began with, where its file leaves them open."""
    run = run.filled(stored)
    fields = type(run.sae).model_fields
    was_default = {
        key: stored["sae"][key]
        for key, values in _OLD_DEFAULTS.get(run.sae.kind, {}).items()
        if stored["sae"].get(key, key) in values and getattr(run.sae, key) == fields[key].default
    }
    run = run.model_copy(update={"sae": run.sae.model_copy(update=was_default)})
    if run.train.rows == "all":  # neither has a plan yet
        return run
    left_open = run.sae.model_copy(update={"dead_after_rows": None})
    follows = run.model_copy(update={"sae": left_open}).dead_after_rows
    was = stored["sae"]["dead_after_rows"]
    if was != _OLD_DEAD_AFTER_ROWS or run.dead_after_rows != follows:
        return run
    return run.model_copy(update={"sae": run.sae.model_copy(update={"dead_after_rows": was})})


def stored_run(stored: Mapping[str, Any], run: Run, origin: str) -> Run:
    """The run of stored settings; the stores and the free keys of `train` come from a run file.

    Raises:
        ConfigError: This version cannot read them.
    """
    stores = {"activations": run.store.activations, "runs": run.store.runs}
    keys = {free.removeprefix("train.") for free in _FREE_SETTINGS if free.startswith("train.")}
    free_settings = run.train.model_dump(mode="json", include=keys)
    settings = with_new_names(stored)
    train = {**settings["train"], **free_settings}
    return validate_run({**settings, "train": train, "store": stores}, origin)


def _compared(run: Run) -> dict[str, Any]:
    settings = run_fingerprint(run)
    one = len(run.reads) == 1 and run.reads == run.writes  # however it is written
    settings["train"]["site"] = run.site if one else None
    sites = {"reads": list(run.reads), "writes": list(run.writes)}
    settings["sae"] |= dict.fromkeys(sites) if one else sites
    return settings
