"""Named worlds: configurations of sae-lens's synthetic models, and the trainers compared."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from dist_sae.errors import ConfigError

DIST_SAE, SAE_LENS = "dist_sae", "sae-lens"


class Trainer(NamedTuple):
    """A trainer with its settings."""

    library: str
    """`DIST_SAE` or `SAE_LENS`."""
    kind: str
    """`sae.kind`, or the name of sae-lens's architecture."""
    settings: dict[str, Any]
    """Settings of the dictionary. Keys that begin with `train.` are settings of the trainer."""

    def __str__(self) -> str:
        return " ".join([self.kind, *(f"{key}={value}" for key, value in self.settings.items())])


class World(NamedTuple):
    """A world, and the defaults of a comparison in it."""

    name: str
    model: dict[str, Any] | str
    """Arguments of sae-lens's configuration, or the folder of a model that sae-lens saved."""
    n_latents: int
    rows: int
    trainers: tuple[Trainer, ...]
    l0: float
    """L0 at which all dictionaries are compared, below the L0 that their settings aim for."""


def _model(features: int, width: int, roots: int, steps: int) -> dict[str, Any]:
    """Return SynthSAEBench-16k's configuration (arXiv:2602.14687), at another size."""
    return {
        "num_features": features,
        "hidden_dim": width,
        "firing_probability": {"exponent": 0.5, "max_prob": 0.4, "min_prob": 5e-4},
        "hierarchy": {
            "total_root_nodes": roots,
            "branching_factor": 4,
            "max_depth": 3,
            "mutually_exclusive_portion": 1.0,
            "mutually_exclusive_min_depth": 0,
            "compensate_probabilities": True,
            "scale_children_by_parent": True,
        },
        "orthogonalization": {"num_steps": steps, "lr": 3e-4},
        "correlation": {"rank": 25, "correlation_scale": 0.1},
        "mean_firing_magnitudes": {"start": 5.0, "end": 4.0},
        "std_firing_magnitudes": {"mean": 0.5, "std": 0.5},
        "bias": 0.5,
        "seed": 42,
    }


def _trainers(k: int, ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[Trainer, ...]:
    """Return trainers of each kind in both libraries.

    Scores are comparable only at similar L0, which a penalty's coefficient does not fix.

    Args:
        k: Active latents per row, for kinds with a setting for them.
        ours: Settings of our `relu`: the coefficient of its penalty.
        theirs: sae-lens's coefficients of `standard` (`l1`) and `jumprelu` (`l0`), and the
            `widths` of its nested dictionaries.
    """
    norm = {"decoder_init_norm": 1.0}  # sae-lens's kinds score lower at its default of 0.1
    return (
        Trainer(DIST_SAE, "topk", {"k": k}),
        Trainer(SAE_LENS, "topk", {"k": k} | norm),
        Trainer(DIST_SAE, "batchtopk", {"k": k}),
        Trainer(SAE_LENS, "batchtopk", {"k": k} | norm),
        Trainer(DIST_SAE, "relu", ours),
        Trainer(SAE_LENS, "standard", {"l1_coefficient": theirs["l1"]}),
        Trainer(DIST_SAE, "jumprelu", {"target_l0": k}),
        Trainer(SAE_LENS, "jumprelu", {"l0_coefficient": theirs["l0"]}),
        Trainer(DIST_SAE, "matryoshka", {"k": k}),
        Trainer(
            SAE_LENS,
            "matryoshka_batchtopk",
            {"k": k, "matryoshka_widths": theirs["widths"]} | norm,
        ),
    )


_WORLDS = {
    world.name: world
    for world in (
        World(
            "small",
            _model(2048, 128, 16, 100),
            256,
            409_600,
            _trainers(
                8, {"sparsity": 5.0}, {"l1": 5.0, "l0": 3.0, "widths": [8, 24, 56, 120, 256]}
            ),
            l0=6,
        ),
        World(
            "16k",
            _model(16_384, 768, 128, 100),
            4096,
            1_048_576,
            _trainers(
                20,
                {"sparsity": 2.5},
                {"l1": 2.5, "l0": 3.0, "widths": [128, 384, 896, 1920, 4096]},
            ),
            l0=15,
        ),
    )
}
NAMES = tuple(_WORLDS)


def find_world(name: str) -> World:
    """Return the world with this name, or of this folder with a model that sae-lens saved.

    Raises:
        ConfigError: The name is neither a known world nor a folder with such a model.
    """
    if name in _WORLDS:
        return _WORLDS[name]
    folder = os.path.abspath(os.path.expanduser(name))
    if not os.path.exists(os.path.join(folder, "synthetic_model_config.json")):
        raise ConfigError(
            f"--world {name}: neither {' nor '.join(NAMES)}, nor a folder with sae-lens's "
            f"synthetic_model_config.json"
        )
    return _WORLDS["16k"]._replace(name=os.path.basename(folder), model=folder)


def parse_trainer(library: str, words: Sequence[str]) -> Trainer:
    """Parse `KIND KEY=VALUE ...`, with values in YAML.

    Raises:
        ConfigError: A setting is not KEY=VALUE, or its value is not YAML.
    """
    import yaml

    kind, *settings = words
    parsed = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise ConfigError(f"{kind} {setting}: write KIND KEY=VALUE ..., as in batchtopk k=20")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError as exc:
            raise ConfigError(f"{kind} {setting}: not a YAML value") from exc
    return Trainer(library, kind, parsed)
