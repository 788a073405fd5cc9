"""The page of a map: all latents on a zoomable canvas, in one HTML file that works offline."""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from dist_sae.report.page import render_template

_SIDE = 65_535  # places are stored as 16-bit integers
_DECADES, _STEPS = 8, 31  # densities from 1e-8 are stored in steps of 1/31 of a decade
_NONE = 255  # color of latents in no cluster


class Label(NamedTuple):
    """The name of a cluster on the map."""

    text: str
    x: float
    y: float
    size: int
    """Number of latents in the cluster."""
    stability: float


class MapPage(NamedTuple):
    """The content of the page."""

    title: str
    places: NDArray[np.float32]
    """Place of each latent, [n_latents, 2], from about -1 to 1."""
    colour: NDArray[np.int32]
    """Cluster that decides each latent's color; -1 for none."""
    density: NDArray[np.float64]
    parent: NDArray[np.int32]
    """Parent of each latent; -1 for none."""
    tokens: NDArray[np.int32]
    """Tokens of each latent, [n_latents, m]; -1 for none."""
    token_texts: Mapping[int, str]
    labels: Sequence[Sequence[Label]]
    """Labels by level, from coarse to fine; within a level, the largest cluster first."""


def render_map(page: MapPage) -> str:
    """Render the page. With three tokens, a latent takes 22 bytes of data, stored as base64."""
    least, most = page.places.min(0), page.places.max(0)
    span = float(max((most - least).max(), 1e-9))
    low = (least + most - span) / 2
    texts = sorted(page.token_texts)
    place_of = np.searchsorted(texts, page.tokens) if texts else np.zeros_like(page.tokens)
    density = np.log10(np.maximum(page.density, 10.0**-_DECADES)) + _DECADES
    arrays = {
        "xy": np.round((page.places - low) / span * _SIDE).astype("<u2"),
        "colour": np.where(page.colour >= 0, page.colour % _NONE, _NONE).astype("u1"),
        "density": np.round(density * _STEPS).clip(0, 255).astype("u1"),
        "parent": page.parent.astype("<i4"),
        "tokens": np.where(page.tokens >= 0, place_of, -1).astype("<i4"),
    }
    content = {
        "n": len(page.places),
        "m": page.tokens.shape[1],
        "decades": _DECADES,
        "steps": _STEPS,
        "texts": [page.token_texts[token] for token in texts],
        "labels": [[_label(each, low, span) for each in level] for level in page.labels],
    }
    data = {name: base64.b64encode(array.tobytes()).decode() for name, array in arrays.items()}
    return render_template(
        "map.html", title=page.title, content=_script(content), data=_script(data)
    )


def _label(label: Label, low: NDArray[np.float32], span: float) -> list[Any]:
    x, y = (float(v - edge) / span * _SIDE for v, edge in zip((label.x, label.y), low, strict=True))
    stability = None if np.isnan(label.stability) else round(label.stability, 2)
    return [label.text, round(x), round(y), label.size, stability]


def _script(content: Any) -> Markup:
    """Encode JSON that is safe inside a script element."""
    return Markup(json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"))
