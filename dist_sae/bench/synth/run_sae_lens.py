"""sae-lens's part of `bench synth`: generates the world, trains its dictionaries, scores all.

Runs in sae-lens's Python. Takes the path of a JSON file and prints one JSON line.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sae_lens import SAE, LoggingConfig  # type: ignore[import-not-found]
from sae_lens.config import SAETrainerConfig  # type: ignore[import-not-found]
from sae_lens.registry import get_sae_training_class  # type: ignore[import-not-found]
from sae_lens.synthetic import (  # type: ignore[import-not-found]
    FeatureDictionary,
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    eval_sae_on_synthetic_data,
)
from sae_lens.training.sae_trainer import SAETrainer  # type: ignore[import-not-found]
from torch import Tensor

if TYPE_CHECKING:
    from dist_sae.bench.synth import detection, drawing, orthogonal, rows
else:
    import detection
    import drawing
    import orthogonal
    import rows

_MODEL = "model"
_SECTIONS = {
    "firing_probability": ZipfianFiringProbabilityConfig,
    "hierarchy": HierarchyConfig,
    "orthogonalization": OrthogonalizationConfig,
    "correlation": LowRankCorrelationConfig,
    "mean_firing_magnitudes": LinearMagnitudeConfig,
    "std_firing_magnitudes": FoldedNormalMagnitudeConfig,
}
_CHUNK_ROWS = 1024
_DRAWN_ROWS = 128  # drawn at once; 8 MiB for 16,384 features


def make(spec: dict[str, Any]) -> dict[str, Any]:
    """Build or load the model, and draw the training and held-out rows."""
    folder, model = Path(spec["folder"]), spec["model"]
    if isinstance(model, str):
        world = SyntheticModel.load_from_source(model)
    else:
        sections = {name: kind(**model[name]) for name, kind in _SECTIONS.items()}
        config = SyntheticModelConfig(**(model | sections))
        world = SyntheticModel(config, feature_dict=_features(config))
    world.save(folder / _MODEL)
    np.save(folder / "directions.npy", world.feature_dict.feature_vectors.detach().numpy())
    np.save(folder / "bias.npy", world.feature_dict.bias.detach().numpy())
    sample = drawing.sampler(world.activation_generator, world.hierarchy)
    torch.manual_seed(spec["seed"])
    for part, total in ((rows.TRAINING, spec["rows"]), (rows.HELDOUT, spec["heldout_rows"])):
        writer = rows.RowsWriter()
        for first in range(0, total, _DRAWN_ROWS):
            writer.add(sample(min(_DRAWN_ROWS, total - first)))
        writer.write(folder, part)
    return {"d_in": world.cfg.hidden_dim, "features": world.cfg.num_features}


def _features(config: Any) -> Any:
    """Build sae-lens's features for a configuration. Its own code takes hours for 16,384."""
    settings = config.orthogonalization

    def make_orthogonal(features: Any) -> None:
        vectors = features.feature_vectors
        vectors.data = orthogonal.orthogonalize(vectors.data, settings.num_steps, settings.lr)

    return FeatureDictionary(
        config.num_features,
        config.hidden_dim,
        bias=config.bias,
        initializer=make_orthogonal,
        seed=config.seed,
    )


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Train a dictionary, and save it in the form that users load."""
    torch.manual_seed(spec["seed"])
    training = rows.Rows(Path(spec["folder"]), rows.TRAINING)
    kind, config = get_sae_training_class(spec["kind"])
    sae = kind(config(d_in=training.d_in, d_sae=spec["n_latents"], **spec["settings"]))
    batch, steps = spec["batch"], spec["steps"]
    settings = {
        "total_training_samples": steps * batch,
        "train_batch_size_samples": batch,
        "lr": spec["lr"],
        "lr_end": spec["lr"] / 10,  # required, but unused unless a schedule is set
        "n_checkpoints": 0,
        "checkpoint_path": None,
        "device": "cpu",
        "logger": LoggingConfig(log_to_wandb=False),
    }
    trainer = SAETrainer(
        SAETrainerConfig(**(settings | spec["train"])),
        sae,
        data_provider=training.batches(batch, steps, spec["seed"]),
    )
    since = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - since
    sae.eval()
    sae.save_inference_model(spec["out"])
    return {"seconds": seconds}


class _HeldoutFeatures:
    """Stand-in for the feature generator that returns the held-out rows' features in order."""

    def __init__(self, part: rows.Rows) -> None:
        self._part, self._done = part, 0

    def sample(self, batch_size: int) -> Tensor:
        which = np.arange(self._done, self._done + batch_size)
        self._done += batch_size
        return self._part.feature_strengths(which)


def score(spec: dict[str, Any]) -> dict[str, Any]:
    """Score a saved dictionary on the held-out rows."""
    folder = Path(spec["folder"])
    world, heldout = SyntheticModel.load_from_disk(folder / _MODEL), rows.Rows(folder, rows.HELDOUT)
    sae = SAE.load_from_disk(spec["out"])
    result = eval_sae_on_synthetic_data(
        sae,
        world.feature_dict,
        _HeldoutFeatures(heldout),
        num_samples=len(heldout),
        batch_size=_CHUNK_ROWS,
    )
    parts = np.array_split(np.arange(len(heldout)), -(-len(heldout) // _CHUNK_ROWS))
    codes = (
        (sae.encode(heldout.batch(which)), heldout.feature_strengths(which)) for which in parts
    )
    f1 = detection.f1_at_l0(codes, sae.W_dec, heldout.directions, spec["l0"])
    found: dict[str, Any] = result.to_dict() | {"f1_at_l0": f1}
    return found


_ACTIONS = {"make": make, "train": train, "score": score}


def main(path: str) -> int:
    """Run the action that the file names, and print its result."""
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    result = _ACTIONS[spec["action"]](spec) | {"version": version("sae-lens")}
    sys.stdout.write("\n" + json.dumps(result) + "\n")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
