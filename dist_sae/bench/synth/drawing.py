"""A faster way to draw which features fire, with the results of sae-lens's `ActivationGenerator`.

Imports only numpy and torch, because sae-lens's Python, where dist_sae is not installed, imports
this too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def sampler(generator: Any, hierarchy: Any) -> Callable[[int], Tensor]:
    """Return a function that draws n rows of a generator, dense or sparse.

    Uses `TreeSampler` if it applies: the correlation has low rank, and every node has a feature.

    Args:
        generator: sae-lens's `ActivationGenerator`.
        hierarchy: sae-lens's `Hierarchy` of the features, or None.
    """
    roots = hierarchy.roots if hierarchy else ()
    nodes = list(roots)
    for node in nodes:  # the list grows level by level
        nodes.extend(node.children)
    if generator.low_rank_correlation is None or any(n.feature_index is None for n in nodes):
        sample: Callable[[int], Tensor] = generator.sample
        return sample
    return TreeSampler(generator, nodes).sample


class TreeSampler:
    """A sampler for a generator whose features form trees.

    Draws the same random numbers as sae-lens in the same order, so rows are bitwise equal. In
    SynthSAEBench-16k, 7,166 features per row exceed their threshold, but only 35 fire, because the
    parents of most others do not fire. sae-lens computes all 7,166. This class computes a feature
    only where its parent fires.

    Args:
        generator: sae-lens's generator, with a correlation of low rank.
        nodes: All nodes of the trees, level by level, with one feature each. A child fires only
            where its parent fires. If the parent scales its children, their strength is
            proportional to its own. At most one of mutually exclusive children fires.
    """

    def __init__(self, generator: Any, nodes: Sequence[Any]) -> None:
        self._factor, self._scale = generator.low_rank_correlation
        self._thresholds: Tensor = generator.correlation_thresholds
        self._mean: Tensor = generator.mean_firing_magnitudes
        self._std: Tensor = generator.std_firing_magnitudes
        shape = len(self._mean), max((len(node.children) for node in nodes), default=0)
        self._children = torch.full(shape, -1)
        self._order = torch.zeros(shape[0], dtype=torch.int64)
        self._excludes, self._scales = (torch.zeros(shape[0], dtype=torch.bool) for _ in range(2))
        for number, node in enumerate(nodes):
            children = [child.feature_index for child in node.children]
            feature = node.feature_index
            self._children[feature, : len(children)] = torch.tensor(children, dtype=torch.int64)
            self._order[feature] = number
            self._excludes[feature] = node.mutually_exclusive_children
            self._scales[feature] = node.scale_children_by_parent
        of_families = (len(node.children) for node in nodes if node.mutually_exclusive_children)
        self._siblings = max(of_families, default=0)
        free = torch.ones(shape[0], dtype=torch.bool)
        free[self._children[self._children >= 0]] = False
        self._free = free.nonzero()[:, 0]
        """Features without a parent."""

    def sample(self, rows: int) -> Tensor:
        """Draw the strength of each feature, as sparse [rows, features]."""
        n_features = len(self._mean)
        common = torch.randn(rows, self._factor.shape[1])
        field = torch.randn(rows, n_features).mul_(self._scale).add_(common @ self._factor.T)
        exceeds = field > self._thresholds
        places = np.flatnonzero(exceeds.numpy())
        noise = torch.randn(len(places))

        def strength(row: Tensor, feature: Tensor) -> Tensor:
            number = np.searchsorted(places, (row * n_features + feature).numpy())
            strengths = self._mean[feature] + noise[number] * self._std[feature]
            return strengths.relu()

        row, number = exceeds[:, self._free].nonzero(as_tuple=True)
        feature = self._free[number]
        value = strength(row, feature)
        found = list[tuple[Tensor, Tensor, Tensor]]()
        while len(row) or not found:
            fires = value > 0
            row, feature, value = row[fires], feature[fires], value[fires]
            found.append((row, feature, value))
            children = self._children[feature]  # [features that fire, children]
            fires = exceeds[row[:, None], children] & (children >= 0)
            parent, child = fires.nonzero(as_tuple=True)
            values = torch.zeros(children.shape)
            values[parent, child] = strength(row[parent], children[parent, child])
            self._exclude(values, row, feature)
            parent, child = values.nonzero(as_tuple=True)
            share = torch.where(self._scales[feature], value / self._mean[feature], 1)[parent]
            value = values[parent, child] * share
            row, feature = row[parent], children[parent, child]
        row, feature, value = (torch.cat(part) for part in zip(*found, strict=True))
        places_found, size = torch.stack([row, feature]), (rows, n_features)
        return torch.sparse_coo_tensor(places_found, value, size, check_invariants=True)

    def _exclude(self, values: Tensor, row: Tensor, feature: Tensor) -> None:
        """Keep one random child per row and feature where children exclude each other, in place."""
        several = self._excludes[feature] & ((values > 0).sum(1) > 1)
        conflicts = several.nonzero()[:, 0]
        order = row[conflicts] * len(self._mean) + self._order[feature[conflicts]]
        conflicts = conflicts[order.argsort()]  # in sae-lens's order
        scores = torch.rand(len(conflicts), self._siblings)
        competing = values[conflicts, : self._siblings]
        scores[competing == 0] = -1
        winner = scores.argmax(1, keepdim=True) if len(scores) else conflicts[:, None]
        kept = torch.zeros_like(competing).scatter_(1, winner, competing.gather(1, winner))
        values[conflicts, : self._siblings] = kept
