"""A world whose features form trees, like SynthSAEBench, and SynthSAEBench's scores.

The published benchmark has 16,384 features in 768 dimensions, 128 roots, four children per feature
to depth three, p from 0.4 to 5e-4, a copula of rank 25 and scale 0.1, and mean strengths from 5 to
4. `TreeWorld(768, 16_384, roots=128)` is the same, except that its directions are random and not
made more orthogonal. Its L0 is 34.5.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.interface import Codes
from tests.dictionaries.worlds import mean_matched_cosine

_ZIPF, _MOST, _LEAST = 0.5, 0.4, 5e-4
_RANK, _COPULA = 25, 0.1
_SPREAD = 0.5  # standard deviation of strengths
_BLOCK = 2000  # rows that are drawn together


class TreeWorld:
    """A world of correlated features that fire only if their parent does.

    At most one child of a parent fires at a time. Rows are scaled to E|x|^2 = d_in.

    Args:
        d_in: Width of the rows.
        n_features: Number of features. Those outside of trees are the rarest.
        roots: Number of trees. Their features are the most frequent, level by level.
        branching: Number of children of each feature that is not a leaf.
        depth: Number of levels below the roots.
        seed: Seed for features and rows.
    """

    def __init__(
        self,
        d_in: int,
        n_features: int,
        roots: int,
        branching: int = 4,
        depth: int = 3,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(7_000_003 + seed)
        self.directions = normalize(torch.randn(n_features, d_in, generator=generator))
        order = torch.arange(1, n_features + 1, dtype=torch.float64) ** -_ZIPF
        p = _LEAST + (_MOST - _LEAST) * (order - order[-1]) / (order[0] - order[-1])
        in_trees = roots * (branching ** (depth + 1) - 1) // (branching - 1)
        children = slice(roots, in_trees)
        above = p[torch.arange(in_trees - roots) // branching]
        siblings = p[children].view(-1, branching).sum(1).repeat_interleave(branching)
        # p of a child if its parent fires, raised because siblings displace it
        draw = p.clone()
        draw[children] = p[children] / above * (1 + (siblings - p[children]) / above)
        factor = _COPULA * torch.randn(n_features, _RANK, generator=generator)
        alone = (1 - factor.square().sum(1)).clamp(min=0.01).sqrt()
        self._factor = factor / alone[:, None]
        self._threshold = torch.special.ndtri(1 - draw.clamp(max=0.999)).float() / alone
        self._mean = torch.linspace(5, 4, n_features)
        self._top = torch.cat([torch.arange(roots), torch.arange(in_trees, n_features)])
        self._roots, self._branching, self._depth = roots, branching, depth
        self.d_in = self.widths = d_in
        self._seed, self._scale = seed, 1.0
        x, _ = self.draw(0, 20_000)
        self._scale = float((d_in / x.square().sum(1).mean()) ** 0.5)

    def batch(self, number: int, rows: int) -> Tensor:
        return self.draw(1 + number, rows)[0]

    def draw(self, number: int, rows: int) -> tuple[Tensor, Tensor]:
        """Draw rows. Returns them, and which feature fires in which row, [2, firings]."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        blocks = [
            self._draw(start, min(_BLOCK, rows - start), generator)
            for start in range(0, rows, _BLOCK)
        ]
        xs, firings = zip(*blocks, strict=True)
        return torch.cat(xs), torch.cat(firings, 1)

    def labelled(self, rows: int) -> tuple[Tensor, Tensor]:
        """Draw rows that training has not seen. Returns them, and what fires, [rows, features]."""
        x, (row, what) = self.draw(0, rows)
        truth = torch.zeros(rows, len(self.directions), dtype=torch.bool)
        truth[row, what] = True
        return x, truth

    def children(self, feature: int) -> slice:
        """Return the children of a feature that is not a leaf."""
        first = self._roots + self._branching * feature
        return slice(first, first + self._branching)

    def _draw(self, start: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        common = torch.randn(rows, _RANK, generator=generator)
        noise = torch.randn(rows, len(self._top), generator=generator)
        noise += common @ self._factor[self._top].T
        row, place = (noise > self._threshold[self._top]).nonzero(as_tuple=True)
        what = self._top[place]
        found = [torch.stack([row, what])]
        row, what = row[what < self._roots], what[what < self._roots]
        for _ in range(self._depth):
            some = torch.arange(self._branching)
            children = self._roots + self._branching * what[:, None] + some
            noise = torch.randn(children.shape, generator=generator)
            noise += torch.einsum("er,ebr->eb", common[row], self._factor[children])
            fires = noise > self._threshold[children]
            first = (torch.rand(children.shape, generator=generator) * fires).argmax(1)
            any_fires = fires.any(1)
            row, what = row[any_fires], children[any_fires, first[any_fires]]
            found.append(torch.stack([row, what]))
        row, what = torch.cat(found, 1)
        strength = self._mean[what] + _SPREAD * torch.randn(len(row), generator=generator)
        x = torch.zeros(rows, self.d_in)
        x.index_add_(0, row, strength.clamp(min=0)[:, None] * self.directions[what])
        return x * self._scale, torch.stack([row + start, what])


def active(codes: Codes, n_latents: int) -> Tensor:
    """Return where a code is above 0, [rows, latents]."""
    of_row = torch.bucketize(torch.arange(len(codes.acts)), codes.starts, right=True) - 1
    fires = torch.zeros(len(codes.starts), n_latents, dtype=torch.bool)
    fires[of_row[codes.acts > 0], codes.latents[codes.acts > 0]] = True
    return fires


class Scores(NamedTuple):
    """SynthSAEBench's scores, on rows that training has not seen."""

    f1: float
    """Mean F1 of latents as detectors of their nearest features."""
    mcc: float
    """Mean cosine of latents and features, paired one to one."""
    uniqueness: float
    """Number of features that are some latent's nearest, divided by the number of latents."""
    fvu: float
    l0: float


@torch.no_grad()
def scores(world: TreeWorld, sae: Dictionary, rows: int = 10_000) -> Scores:
    x, truth = world.labelled(rows)
    nearest = (normalize(sae.W_dec) @ world.directions.T).abs().argmax(1)
    codes = sae.encode(x)
    fires = active(codes, sae.n_latents)
    both = (fires & truth[:, nearest]).sum(0)
    f1 = 2 * both / (fires.sum(0) + truth[:, nearest].sum(0)).clamp(min=1)
    left, centred = x - sae.decode(codes, x), x - x.mean(0)
    return Scores(
        float(f1.mean()),
        mean_matched_cosine(world.directions, sae.W_dec)[0],
        len(set(nearest.tolist())) / len(nearest),
        float(left.square().sum() / centred.square().sum()),
        float(fires.sum()) / rows,
    )


@torch.no_grad()
def absorption(world: TreeWorld, sae: Dictionary, roots: int, rows: int = 10_000) -> float:
    """Return the share of recall that a root's latent loses when a child fires, mean over roots.

    A root's latent is the nearest one. Recall is lost to absorption: a child's latent that also
    points along the root fires instead of the root's latent.
    """
    x, truth = world.labelled(rows)
    fires = active(sae.encode(x), sae.n_latents)
    nearest = (normalize(sae.W_dec) @ world.directions[:roots].T).argmax(0)
    lost = []
    for root, latent in enumerate(nearest):
        with_child = truth[:, world.children(root)].any(1)
        alone = truth[:, root] & ~with_child
        recall = [fires[where, latent].double().mean() for where in (alone, with_child)]
        lost.append(1 - (recall[1] / recall[0]).clamp(max=1))
    return float(torch.stack(lost).mean())
