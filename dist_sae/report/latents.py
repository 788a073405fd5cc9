"""Latents as pages show them: an index's numbers, and the texts around the activations."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dist_sae.data.orders import permutation
from dist_sae.explaining.explanations import ScoredExplanation, explanations_of_all
from dist_sae.index.examples import activations_near, drop_overlapping, read_documents
from dist_sae.index.query import Firing, Index, LatentPage, TokenEffect
from dist_sae.index.texts import Example, Place, Texts, build_example

_LEAST_FIRINGS = 8


class LatentView(NamedTuple):
    """A latent with its texts. Activations are in the scale of the checkpoint."""

    page: LatentPage
    denser_than: float
    """Share of the latents that fire on fewer rows."""
    examples: list[Example]
    """Texts around the largest activations, which do not overlap."""
    sampled: dict[int, list[Example]]
    """Texts by decile of the activations, from the highest decile to 0, the lowest."""
    top_tokens: list[tuple[str, float]]
    """Text of each token whose logit the latent raises most, and the effect on the logit."""
    bottom_tokens: list[tuple[str, float]]
    explanations: list[ScoredExplanation]
    """Explanations by `dist-sae explain`."""


def view_latents(
    index: Index,
    latents: Iterable[int],
    texts: Texts | None,
    most_examples: int = 6,
    of_decile: int = 1,
) -> list[LatentView]:
    """Read latents from an index, with the texts around their activations.

    Args:
        index: The index.
        latents: Numbers of the latents.
        texts: Texts of the run; if None, views have no examples, and token numbers for tokens.
        most_examples: Most examples of the largest activations per latent.
        of_decile: Most examples of each decile.

    Raises:
        LatentNotFoundError: The dictionary has no such latent.
        CorpusError: The text is gone, or differs from the text that activations were computed from.
    """
    pages = [index.latent(latent) for latent in latents]
    explanations_by_latent = explanations_of_all([page.latent for page in pages], index)
    largest = [
        list(drop_overlapping(page.largest))[:most_examples] if texts else [] for page in pages
    ]
    sampled = [_of_deciles(page.examples, of_decile) if texts else {} for page in pages]
    wanted = [
        [*ours, *chain.from_iterable(others.values())]
        for ours, others in zip(largest, sampled, strict=True)
    ]
    if texts:
        read_documents(texts, [firing for firings in wanted for firing in firings])
    views = []
    for page, explanations, ours, others, firings in zip(
        pages, explanations_by_latent, largest, sampled, wanted, strict=True
    ):
        known = activations_near(index, page.latent, firings)

        def example(firing: Firing, known: Mapping[tuple[int, int], float] = known) -> Example:
            assert texts
            place = Place(firing.document, firing.position, firing.token)
            return build_example(place, known, texts)

        view = LatentView(
            page=page,
            denser_than=index.denser_than(page),
            examples=list(map(example, ours)),
            sampled={decile: list(map(example, some)) for decile, some in others.items()},
            top_tokens=_named(page.top_tokens, texts),
            bottom_tokens=_named(page.bottom_tokens, texts),
            explanations=explanations,
        )
        views.append(view)
    return views


def token_text(token: int, texts: Texts | None) -> str:
    """Return the text of a single token, or its number if there are no texts."""
    return texts.tokenizer.text([token])[0] if texts else f"#{token}"


def choose_latents(firings: NDArray[np.int64], n: int, seed: int) -> list[int]:
    """Choose `n` latents that fire, spread evenly over log density, densest first."""
    counts = torch.from_numpy(firings)
    # shuffled, so that of equally dense latents the lower numbers are not preferred
    shuffled = torch.from_numpy(permutation(len(counts), seed, 5))
    able = shuffled[counts[shuffled] >= _LEAST_FIRINGS]
    able = able[counts[able].argsort(descending=True, stable=True)]
    if len(able) <= n:
        return [int(latent) for latent in able]
    density = counts[able].double().log()
    chosen: list[int] = []
    for target in torch.linspace(float(density[0]), float(density[-1]), n):
        distance = (density - target).abs()
        distance[chosen] = math.inf
        nearest = (distance <= distance.min() + 1e-9).nonzero()[:, 0]
        chosen.append(int(nearest[0]))
    return [int(able[i]) for i in sorted(chosen)]


def _named(outputs: Sequence[TokenEffect], texts: Texts | None) -> list[tuple[str, float]]:
    return [(token_text(output.token, texts), output.logit) for output in outputs]


def _of_deciles(firings: Iterable[Firing], n: int) -> dict[int, list[Firing]]:
    """Return the `n` largest stored examples of each decile, the highest decile first."""
    found = defaultdict[int, list[Firing]](list)
    for firing in firings:  # the largest activations (-1), then deciles in ascending order
        if firing.decile >= 0:
            found[firing.decile].insert(0, firing)
    return {decile: found[decile][:n] for decile in sorted(found, reverse=True)}
