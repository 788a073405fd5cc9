"""`dist-sae export`: a checkpoint as the two files that SAELens loads (`SAE.load_from_disk`)."""

import json
import logging
from typing import Any

from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.checkpoint.piecewise import safetensors_pieces
from dist_sae.checkpoint.trained import (
    find_checkpoint,
    none_yet,
    suffix,
    trained_run,
    use_checkpoint,
)
from dist_sae.config import Run, differences
from dist_sae.data.identity import plan_settings
from dist_sae.errors import ConfigError, ObjectNotFoundError
from dist_sae.interop import sae_lens
from dist_sae.storage import UNMETERED, Meter, ObjectStore, open_store

logger = logging.getLogger(__name__)

_CONFIG = "cfg.json"
_WEIGHTS = "sae_weights.safetensors"


def export(run: Run, meter: Meter = UNMETERED, step: int | None = None) -> str:
    """Write `<run>/export/cfg.json` and `sae_weights.safetensors`; returns their folder.

    An export of the same checkpoint and settings is not written again. A step that is not the
    newest has a folder of its own, `<run>/export-step-<step>/`. No weight is ever in memory as a
    whole.

    Args:
        run: The run.
        meter: Takes the metrics.
        step: Step of the checkpoint; None for the newest.

    Raises:
        ConfigError: There is no checkpoint, or SAELens cannot hold its dictionary.
        PlanMismatchError: The run was trained with other settings.
    """
    if reason := sae_lens.problem(run):
        raise ConfigError(
            f"{reason}; use the checkpoint, `dist-sae checkpoints convert` makes one file of it"
        )
    runs = open_store(run.store.runs, run.store.s3, meter)
    checkpoint = find_checkpoint(runs, run, step)
    if checkpoint is None:
        raise none_yet(runs, run)
    own = trained_run(checkpoint, run).model_copy(update={"export": run.export})
    typed = run.filled(checkpoint.scalars["run"])  # what the file leaves open is no difference
    if changed := differences(plan_settings(own), plan_settings(typed)):
        logger.warning("the export names what the run was trained on, not %s", "; ".join(changed))
    folder = f"{run.name}/export{suffix(runs, run, checkpoint.step)}"
    config = sae_lens.config(own, checkpoint)
    if sae_lens.needs_bridge(config):
        logger.info(
            "TransformerLens has rows of %s in TransformerBridge, as %s; HookedTransformer has "
            "other rows, or none, under its names",
            own.described_sites,
            config["metadata"]["hook_name"],
        )
    if _is_there(runs, folder, config):
        logger.info("step %d was exported before: %s/%s", checkpoint.step, runs.url, folder)
        return f"{runs.url}/{folder}"

    def write(checkpoint: Checkpoint) -> None:
        weights = sae_lens.weights(own, checkpoint)
        runs.put_stream(f"{folder}/{_WEIGHTS}", lambda: safetensors_pieces(weights))
        text = json.dumps(sae_lens.config(own, checkpoint), indent=2)
        runs.put(f"{folder}/{_CONFIG}", text.encode())

    use_checkpoint(runs, run, step, write)
    return f"{runs.url}/{folder}"


def _is_there(runs: ObjectStore, folder: str, config: dict[str, Any]) -> bool:
    """True if the export exists with this configuration, which is written last."""
    try:
        there = json.loads(runs.get(f"{folder}/{_CONFIG}"))
    except (ObjectNotFoundError, ValueError):
        return False
    return bool(there == config) and runs.size(f"{folder}/{_WEIGHTS}") is not None
