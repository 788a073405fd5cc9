"""The page of a map: all latents on a canvas, zoomable, in one HTML file without a network."""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from dist_sae.report.page import render_template

_SIDE = 65_535  # places are kept as 16-bit integers
_DECADES, _STEPS = 8, 31  # densities from 1e-8 are kept in steps of a 31st of a decade
_NONE = 255  # colour of latents in no cluster


class Label(NamedTuple):
    """Name of a cluster on the map."""

    text: str
    x: float
    y: float
    size: int
    """Latents."""
    stability: float


class MapPage(NamedTuple):
    """The content of the page."""

    title: str
    places: NDArray[np.float32]
    """Of all latents, [n_latents, 2], about -1 to 1."""
    colour: NDArray[np.int32]
    """Cluster of each latent by which it is coloured; -1 for none."""
    density: NDArray[np.float64]
    parent: NDArray[np.int32]
    """Parent of each latent; -1 for none."""
    tokens: NDArray[np.int32]
    """Tokens of each latent, [n_latents, m]; -1 for none."""
    token_texts: Mapping[int, str]
    labels: Sequence[Sequence[Label]]
    """By level, from coarse to fine, the largest first."""


def render_map(page: MapPage) -> str:
    """Render the page; about 17 bytes of data a latent, as base64."""
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
    """JSON that may stand in a script element."""
    return Markup(json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"))
