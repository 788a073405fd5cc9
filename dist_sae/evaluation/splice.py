"""Edits of a model's activations while it runs: replacement by reconstructions or constants."""

from collections.abc import Callable, Iterable, Mapping

from jaxtyping import Bool, Float
from torch import Tensor

from dist_sae.data.row_filters import kept_by_norm
from dist_sae.dictionaries.interface import Inference
from dist_sae.dictionaries.normaliser import SiteNormalisers

Acts = Float[Tensor, "batch seq d"]
Edits = dict[str, Callable[[Acts], Acts]]
"""For each site, the function that replaces the model's activations there."""
Values = Callable[[str, Float[Tensor, "rows d"]], Float[Tensor, "rows d"]]
"""Computes the raw rows that replace a site's, given the site and its rows in this pass."""


class Splice:
    """Edits for passes of a model over one batch.

    Edits change only the rows that training uses, and leave attention sinks and special tokens
    as they are. Sinks are rows of unusual norm in the plain model at any site, so with several
    sites, a pass with the edits of `read` must come first.

    Args:
        keep: Mask of the rows that no rule about tokens excludes.
        over_norm: See `kept_by_norm`.
        sae: The dictionary.
        normalisers: Normalisers of the dictionary's sites.
    """

    def __init__(
        self,
        keep: Bool[Tensor, "batch seq"],
        over_norm: float | None,
        sae: Inference,
        normalisers: SiteNormalisers,
    ) -> None:
        self._keep = keep
        self._over_norm = over_norm
        self._sae = sae
        self._normalisers = normalisers
        self._usual: Bool[Tensor, "batch seq"] | None = None
        """Mask of the rows to change; None if no pass has read the plain model's activations."""
        self._plain: dict[str, Tensor] = {}
        """The plain model's activations at the sites that are read."""
        self._x_hat: dict[str, Tensor] | None = None

    def read(self) -> Edits:
        """Return edits that change nothing but record the activations at all sites."""
        self._usual = self._keep.clone()

        def note(site: str, acts: Tensor) -> Tensor:
            assert self._usual is not None
            self._usual = self._usual.to(acts.device)
            self._usual[self._keep.to(acts.device)] &= self._usual_norm(acts)
            if site in self._normalisers.reads:
                self._plain[site] = acts
            return acts

        return _edits(self._normalisers.by_site, note)

    def replace(self, sites: Iterable[str], values: Values) -> Edits:
        """Return edits that replace the rows of some sites."""

        def change(site: str, acts: Tensor) -> Tensor:
            usual = self._rows(acts)
            edited = acts.clone()
            edited[usual] = values(site, acts[usual].float()).to(acts.dtype)
            return edited

        return _edits(sites, change)

    def reconstruct(self, sites: Iterable[str]) -> Edits:
        """Return edits that replace the written sites by reconstructions from the plain model.

        The dictionary reads the activations that an earlier pass with `read` recorded.
        """

        def values(site: str, _: Tensor) -> Tensor:
            if self._x_hat is None:
                self._x_hat = self._reconstruct(
                    {site: acts[self._usual].float() for site, acts in self._plain.items()}
                )
            return self._x_hat[site]

        return self.replace(sites, values)

    def reconstruct_live(self) -> Edits:
        """Return edits that replace the written sites by reconstructions from this very pass.

        The dictionary reads this pass's activations. Sites that the pass has not reached yet are
        read as zeros, so what the dictionary writes at a site must not depend on them.
        """
        normalisers, read = self._normalisers, dict[str, Tensor]()

        def change(site: str, acts: Tensor) -> Tensor:
            usual = self._rows(acts)
            rows = acts[usual].float()
            if site in normalisers.reads:
                read[site] = rows
            if site not in normalisers.writes:
                return acts
            unread = {
                other: rows.new_zeros(len(rows), len(normalisers.by_site[other].mean))
                for other in normalisers.reads
            }
            edited = acts.clone()
            edited[usual] = self._reconstruct(unread | read)[site].to(acts.dtype)
            return edited

        return _edits(normalisers.by_site, change)

    def _rows(self, acts: Tensor) -> Bool[Tensor, "batch seq"]:
        """Return a mask of the rows to change at a site with these activations."""
        if self._usual is not None:
            return self._usual
        keep = self._keep.to(acts.device)
        usual = keep.clone()
        usual[keep] = self._usual_norm(acts)
        return usual

    def _usual_norm(self, acts: Tensor) -> Bool[Tensor, " rows"]:
        return kept_by_norm(acts[self._keep.to(acts.device)], self._over_norm)

    def _reconstruct(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Reconstruct all written sites, in the model's scale, on the rows' device."""
        normalisers = self._normalisers
        device = next(iter(rows.values())).device
        x_hat = self._sae.infer(normalisers.inputs(rows, device)).x_hat.to(device)
        return {
            site: x_hat[:, columns] / normalisers.by_site[site].scale
            for site, columns in normalisers.columns.items()
        }


def _edits(sites: Iterable[str], change: Callable[[str, Acts], Acts]) -> Edits:
    def at(site: str) -> Callable[[Acts], Acts]:
        return lambda acts: change(site, acts)

    return {site: at(site) for site in sites}
