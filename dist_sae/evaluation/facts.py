"""Facts about a run, its data and its progress, for evaluations and reports."""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.config import Run
from dist_sae.data.plan import Plan
from dist_sae.data.shard import existing_units, read_manifest
from dist_sae.errors import ObjectNotFoundError
from dist_sae.evaluation.cache import cached
from dist_sae.storage import ObjectStore

logger = logging.getLogger(__name__)

_READERS = 16
_OF_DATA = ("train_documents", "heldout_documents", "refused_documents", "excluded_rows")


def unit_totals(store: ObjectStore, plan: Plan) -> dict[str, Any]:
    """Add up the manifests of the existing units.

    Returns:
        `units`; `train_rows`, `heldout_rows`, `train_documents`, `heldout_documents`,
        `refused_documents` (by the tokenizer), `excluded_rows` by reason, and producers' `seconds`
        by stage.
    """
    units = sorted(unit for unit in existing_units(store) if unit < len(plan.units))

    def add_up() -> dict[str, Any]:
        sums: Counter[str] = Counter()
        excluded: Counter[str] = Counter()
        seconds: defaultdict[str, float] = defaultdict(float)
        with ThreadPoolExecutor(_READERS) as pool:  # S3 takes tens of ms for each
            for manifest in pool.map(lambda unit: read_manifest(store, unit), units):
                part = "train" if manifest.unit in plan.train_units else "heldout"
                sums[f"{part}_rows"] += manifest.rows
                sums[f"{part}_documents"] += manifest.documents
                sums["refused_documents"] += manifest.refused
                excluded.update(manifest.excluded)
                for stage, spent in manifest.seconds.items():
                    seconds[stage] += spent
        names = ("train_rows", "heldout_rows", "train_documents", "heldout_documents")
        counts = {name: sums[name] for name in (*names, "refused_documents")}
        return {"units": len(units), **counts, "excluded_rows": excluded, "seconds": seconds}

    if len(units) < len(plan.units):
        return add_up()
    return cached(store, "produced", {"plan": plan.hash}, add_up)


def run_facts(
    run: Run, plan: Plan, totals: Mapping[str, Any], checkpoint: Checkpoint | None
) -> dict[str, Any]:
    """Describe a run, its data and its progress, as JSON types.

    Args:
        run: The run, with the settings it was trained with.
        plan: Plan of its activation set.
        totals: The result of `unit_totals`.
        checkpoint: Checkpoint with the run's progress, and the number of rows read again because
            streams had ended (unless the checkpoint is from an older version).
    """
    train = run.train
    facts: dict[str, Any] = {
        "run": run.name,
        "run_file": f"{run.store.runs}/{run.name}/run.yaml",
        "kind": run.sae.kind,
        "n_latents": run.sae.n_latents,
        "k": getattr(run.sae, "k", None),
        "site": run.described_sites,
        "seed": train.seed,
        "sae": run.sae.model_dump(mode="json", exclude_none=True),
        "lr": run.lr,
        "batch_rows": train.batch_rows,
        "ema_decay": train.ema_decay,
        "plan": plan.hash,
        **{name: totals[name] for name in _OF_DATA},
    }
    if checkpoint is not None:
        trained = checkpoint.step * train.batch_rows
        facts |= {"step": checkpoint.step, "trained_rows": trained}
        facts["repeated_rows"] = checkpoint.scalars.get("repeated_rows")
        if totals["train_rows"]:
            facts["passes"] = trained / totals["train_rows"]
    return {name: value for name, value in facts.items() if value is not None}


def training_seconds(history: Iterable[Mapping[str, Any]], step: int) -> float:
    """Return the training time up to a step, over all restarts, including waits."""
    return sum(float(record.get("seconds", 0.0)) for record in history if record["step"] <= step)


def evaluation_key(run: str, suffix: str = "") -> str:
    """Return the key of a run's evaluation in the store of runs."""
    return f"{run}/evaluation{suffix}.json"


def read_evaluation(runs: ObjectStore, key: str) -> dict[str, Any] | None:
    """Read an evaluation; return None if it does not exist or is damaged."""
    try:
        found: dict[str, Any] = json.loads(runs.get(key))
    except ObjectNotFoundError:
        return None
    except ValueError as exc:
        logger.warning("%s/%s: is damaged (%s); evaluate again", runs.url, key, exc)
        return None
    return found
