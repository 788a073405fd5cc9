"""Import of delphi's explanations and detection scores (eai-delphi 0.1.3) of an index.

Delphi reads a cache that was exported from the index, and writes to a run's folder in `results/`:

    explanations/<site>_latent<n>.txt        a JSON string
    scores/detection/<site>_latent<n>.txt    a JSON list with a dict per example: `activating`,
                                             `prediction` and `distance`, which is the decile of an
                                             activating example, and otherwise the distance of a
                                             neighbor, or -1 for a random example
"""

import json
import re
from pathlib import Path
from typing import Any

from dist_sae.errors import ConfigError
from dist_sae.explaining.scoring import Verdict
from dist_sae.explaining.stored import LatentExplanation, SetSettings
from dist_sae.index.layout import DECILES
from dist_sae.index.query import Index

LIBRARY = "delphi"
_UNREAD = {"Explanation could not be parsed.", "No explanation found"}
_NO_NEIGHBOUR = -1.0


def delphi_settings(index: Index) -> SetSettings:
    """Return the settings of a set of explanations by delphi."""
    return SetSettings(
        explainer=LIBRARY,
        judge=LIBRARY,
        checkpoint=index.manifest.checkpoint,
        prompts=0,
    )


def read_delphi(folder: Path, index: Index) -> list[LatentExplanation]:
    """Read delphi's explanations of an index's latents, in ascending order.

    Args:
        folder: The folder of a delphi run, which contains `explanations/`.
        index: The index that delphi's cache was exported from.

    Raises:
        ConfigError: There are no explanations of this site, or a file cannot be read.
    """
    site = index.manifest.site
    shape = re.compile(re.escape(site) + r"_latent(\d+)\.txt", re.ASCII)
    files = {
        int(found[1]): file
        for file in (folder / "explanations").glob("*.txt")
        if (found := shape.fullmatch(file.name))
    }
    if not files:
        raise ConfigError(
            f"{folder}: has no explanations/{site}_latent<n>.txt; name the folder of one run, "
            f"below delphi's results/"
        )
    if (most := max(files)) >= index.n_latents:
        raise ConfigError(
            f"{files[most]}: the index has latents 0 to {index.n_latents - 1}; does it "
            f"belong to another dictionary?"
        )
    return [_explained(latent, files[latent], folder) for latent in sorted(files)]


def _explained(latent: int, file: Path, folder: Path) -> LatentExplanation:
    text = _json(file)
    if not isinstance(text, str):
        raise ConfigError(f"{file}: is not a JSON string")
    if text in _UNREAD:
        return LatentExplanation(latent, None, text, ())
    scores = folder / "scores" / "detection" / file.name
    examples = _json(scores) if scores.exists() else []
    if not isinstance(examples, list):
        raise ConfigError(f"{scores}: is not a JSON list")
    return LatentExplanation(latent, text, "", [_verdict(scores, each) for each in examples])


def _verdict(file: Path, example: Any) -> Verdict:
    try:
        active, prediction, distance = (
            example[name] for name in ("activating", "prediction", "distance")
        )
        yes = None if prediction is None else bool(prediction)
        if active:
            tenth = int(distance)
            return Verdict("active", tenth if 0 <= tenth < DECILES else None, yes)
        return Verdict("random" if distance == _NO_NEIGHBOUR else "near", None, yes)
    except (KeyError, TypeError, ValueError) as exc:
        raise ConfigError(
            f"{file}: an example lacks {exc}; delphi 0.1.3 writes activating, prediction, distance"
        ) from exc


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{file}: cannot be read: {exc}") from exc
