"""Run files of small worlds, shared by all tests."""

import json
from pathlib import Path
from typing import Any

import yaml

from dist_sae.config import Run

DOCUMENT_ROWS = 16
WORLD: dict[str, Any] = {
    "name": "world",
    "model": {"kind": "synthetic", "d_in": 16, "n_features": 48, "l0": 3},
    "corpus": {"kind": "synthetic", "documents": 200, "document_rows": 32},
    "activations": {
        "sites": ["synthetic"],
        "context_tokens": 32,
        "unit_rows": 350,
        "block_rows": 100,
        "streams": 4,
        "window_units": 2,
        "dtype": "fp32",
    },
    "sae": {"kind": "topk", "n_latents": 64, "k": 3, "auxk": 16, "dead_after_rows": 480},
    "train": {
        "rows": 9600,
        "max_passes": 2,
        "batch_rows": 160,
        "lr": 3e-3,
        "products": "fp32",
        "normaliser_rows": 2000,
        "log_every_steps": 1,
        "save_every_steps": 1000,
    },
}
"""A small world that is trained on by real processes."""
TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {"kind": "synthetic", "d_in": 8, "n_features": 32, "l0": 2},
    "corpus": {"kind": "synthetic", "documents": 125, "document_rows": 64},
    "activations": {
        "sites": ["synthetic"],
        "streams": 4,
        "unit_rows": 2048,
        "block_rows": 512,
        "context_tokens": 64,
        "dtype": "fp32",
    },
    "sae": {"kind": "topk", "n_latents": 32, "k": 2, "auxk": 4, "dead_after_rows": 4096},
    "train": {"rows": 4096, "batch_rows": 256, "normaliser_rows": 2048},
}
"""8,000 rows in 125 documents: 4 training units of about 1,900 rows and one held-out unit."""
NUMBERED: dict[str, Any] = {
    "name": "world",
    "model": {"kind": "synthetic", "d_in": 2},
    "corpus": {"kind": "synthetic", "documents": 128, "document_rows": DOCUMENT_ROWS},
    "activations": {
        "sites": ["synthetic"],
        "context_tokens": DOCUMENT_ROWS,
        "streams": 4,
        "unit_rows": 120,
        "block_rows": 32,
        "window_units": 3,
        "heldout_share": 0.05,
        "dtype": "fp32",
        "exclude": {"first_positions": 0, "over_norm": None},
    },
    "sae": {"kind": "topk", "n_latents": 8, "k": 2, "auxk": 4},
    "train": {"rows": 1024, "batch_rows": 64},
}
"""128 documents of 16 rows, 16 training units, 4 streams, no excluded rows."""


def build_settings(folder: Path, world: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """Build the settings of a world with stores in `folder`, with some keys replaced.

    A section with another `kind` replaces the whole section.
    """
    data: dict[str, Any] = json.loads(json.dumps(world))
    data["store"] = {"activations": str(folder / "activations"), "runs": str(folder / "runs")}
    for section, values in sections.items():
        old = data.get(section, {})
        same = isinstance(values, dict) and values.get("kind", old.get("kind")) == old.get("kind")
        data[section] = {**old, **values} if same else values
    return data


def write_run(folder: Path, world: dict[str, Any] = WORLD, **sections: Any) -> Path:
    """Write the run file of a world into its folder."""
    path = folder / "run.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.dump(build_settings(folder, world, sections), Dumper=yaml.CSafeDumper))
    return path


def make_run(folder: Path, world: dict[str, Any] = NUMBERED, **sections: Any) -> Run:
    """Build the run of a world without writing a file."""
    return Run.model_validate(build_settings(folder, world, sections))
