"""Measurements of what one dictionary's reconstructions miss, and of the parts of the error."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from dist_sae import logs
from dist_sae.analysis.error_parts import ENOUGH_ROWS, LinearPart, Moments, Parts, PartsEvaluator
from dist_sae.analysis.pursuit import affordable_rows, most_latents, pursue
from dist_sae.analysis.tail import COLUMNS, LEAST_ALIVE, Floats, Law, Span, energies, fit_law
from dist_sae.checkpoint.pages import PagedDictionary
from dist_sae.checkpoint.trained import Trained
from dist_sae.comparison.matched import use_newest
from dist_sae.config import Run
from dist_sae.config.data import HuggingFaceModel
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.consumers import kept_units
from dist_sae.data.plan import Plan, load_plan
from dist_sae.data.shard import read_block
from dist_sae.dictionaries.interface import Inference, Inferred, Rows
from dist_sae.errors import ConfigError, CorpusError, ModelError, PlanMismatchError
from dist_sae.evaluation.cross_entropy import cross_entropies
from dist_sae.index.query import index_of
from dist_sae.storage import ObjectStore, open_store

logger = logging.getLogger(__name__)

PURSUED_ROWS = 1024
_CONTROL_ROWS = 256
_RESAMPLES = 1000


class Tail(NamedTuple):
    """Results of a sparse solver on some judged rows, as shares of their variance."""

    residual: Span
    """Share that no sparse sum of decoder rows describes. The interval runs from the lowest to the
    highest end of the 95 % intervals (bootstrap over documents) at .9, 1 and 1.1 times the
    threshold of `pursuit`."""
    unique: Span
    """Share of unique energy in the half of the alive latents with the least energy: the share that
    the other half cannot describe. It is the solver's extra error without these latents, over their
    energy. The interval is the range over the three thresholds."""
    fvu: float
    """FVU of the encoder's reconstructions of the same rows."""
    explained: float
    """Share of |x - b_dec|^2 that the solver explains."""
    chance: float
    """The share that the solver explains after a random rotation of the rows: what a decoder that
    was not trained on them would explain."""
    latents: float
    """Mean number of latents that the solver uses on a row."""
    capped: float
    """Share of the rows on which the solver uses its maximum number of latents."""
    rows: int

    @property
    def interference(self) -> float:
        """Error of the encoder beyond the tail: wrong codes, and the limit on active latents."""
        return self.fvu - self.residual.value


class Study(NamedTuple):
    """Measurements of one dictionary's errors."""

    name: str
    plan: str
    """Hash of the activation set's plan."""
    n_latents: int
    alive: int
    indexed_rows: int
    l0: float
    parts: Parts
    judged_rows: int
    judged_documents: int
    linear: LinearPart
    densities: Floats
    """Firing frequencies of the alive latents, the largest first."""
    energies: Floats
    """Energies of the alive latents, the largest first. With a tail, they are scaled to sum to the
    share of the variance that the solver explains."""
    tail: Tail | None
    """None for dictionaries that do not reconstruct their inputs."""
    losses: Mapping[str, float]
    """Rise of the cross-entropy, in nats per token, from the whole error and from each part alone.
    Also the number of tokens."""
    left_out: tuple[str, ...]
    """Measurements that were left out, each with the reason."""

    @property
    def frequency_law(self) -> Law | None:
        """Power law of firing frequency by rank; None if too few latents are alive."""
        return fit_law(self.densities) if self.alive >= LEAST_ALIVE else None

    @property
    def energy_law(self) -> Law | None:
        """Power law of energy by rank; None without a tail or if too few latents are alive."""
        return fit_law(self.energies) if self.tail and self.alive >= LEAST_ALIVE else None


def study(run: Run, fit_rows: int | None = None, *, losses: bool = True) -> Study:
    """Measure what a run's newest dictionary misses, in bounded memory at any width.

    The linear maps are fitted to training rows and judged on held-out rows. If the training rows
    were deleted after use, the maps are fitted to every other held-out unit.

    Args:
        run: Run with a checkpoint and a latent index of it.
        fit_rows: Rows that the linear maps are fitted to; None takes 50 for each input dimension.
        losses: Whether to measure cross-entropies, if the activation set has a language model.

    Raises:
        ConfigError: There are too few rows, or no checkpoint.
        NoIndexError: The checkpoint has no complete latent index.
    """
    store = open_store(run.store.activations, run.store.s3)
    plan = load_plan(store, run)
    patience = float(run.timeouts.missing_seconds)
    activations = ActivationSet(store, plan, run.sites, patience_seconds=patience)
    fitted, judged = _split(store, plan, run)

    def measure(trained: Trained) -> Study:
        trained.check_plan(plan.hash)
        return _Measuring(run, trained, activations).study(fitted, judged, fit_rows, losses=losses)

    return use_newest(run, measure)


def _split(store: ObjectStore, plan: Plan, run: Run) -> tuple[range, range]:
    """Return the units to fit the maps to, and the units to judge them on."""
    heldout = plan.heldout_units
    if not len(heldout):
        raise ConfigError(
            f"{run.name}: activations.heldout_share is 0, so there are no rows to measure on; "
            f"produce a set with held-out rows"
        )
    kept = kept_units(store, plan)
    if len(kept):
        return kept, heldout
    if len(heldout) == 1:
        raise ConfigError(
            f"{run.name}: all training units were deleted after use, and a single held-out "
            f"unit cannot be split; produce a set with store.retention: keep"
        )
    return heldout[::2], heldout[1::2]


class _Measuring:
    """Measurements of one dictionary on the rows of its activation set."""

    def __init__(self, run: Run, trained: Trained, activations: ActivationSet) -> None:
        self._run = run  # for its section `evaluate`, which may differ from the checkpoint's
        self._trained = trained
        self._pages = trained.pages
        self._activations = activations
        self._mean = trained.normalisers.mean
        self._documents: list[Tensor] = []

    def study(self, fitted: range, judged: range, fit_rows: int | None, *, losses: bool) -> Study:
        run, normalisers = self._run, self._trained.normalisers
        store = open_store(run.store.runs, run.store.s3)
        index = index_of(store, run.name, self._trained.checkpoint)
        linear = self._fit(fitted, fit_rows or ENOUGH_ROWS * normalisers.widths.d_in)
        evaluator = PartsEvaluator(linear, self._mean)
        limit = run.evaluate.rows
        every = max(1, limit // PURSUED_ROWS)
        active, rows, sample = 0, 0, []
        for batch, found, error in self._errors(judged, limit, "measure the parts of the error"):
            evaluator.add(batch.inputs, batch.targets, error)
            active += int(found.firings.sum())
            places = torch.arange(len(error))[-rows % every :: every]
            sample.append((batch.targets[places], error[places].double().square().sum(1)))
            rows += len(error)
        documents = torch.cat(self._documents)
        l0 = active / rows
        tables = [energies(table) for table in index.latents(COLUMNS)]
        densities, energy = (np.concatenate(column) for column in zip(*tables, strict=True))
        alive = densities > 0
        autoencoder = run.sae.has_latent_rows and normalisers.reads == normalisers.writes
        left_out = []
        tail = None
        if autoencoder:
            targets, squares = (torch.cat(column) for column in zip(*sample, strict=True))
            tail = self._tail(targets, squares, documents[::every], l0, energy, alive)
            energy = energy * (1 - tail.residual.value) / max(float(energy.sum()), 1e-300)
        else:
            left_out.append(
                f"no tail: sae.kind {run.sae.kind} does not reconstruct what it reads, so a solver "
                f"cannot replace its encoder"
            )
        rises: dict[str, float] = {}
        if losses and autoencoder:
            try:
                rises = self._losses(linear)
            except (CorpusError, ModelError, PlanMismatchError) as exc:
                left_out.append(f"no cross-entropies: {exc}")
        return Study(
            name=run.name,
            plan=self._activations.plan.hash,
            n_latents=run.sae.n_latents,
            alive=int(alive.sum()),
            indexed_rows=index.rows,
            l0=l0,
            parts=evaluator.result(documents),
            judged_rows=rows,
            judged_documents=len(set(documents.tolist())),
            linear=linear,
            densities=np.sort(densities[alive])[::-1],
            energies=np.sort(energy[alive])[::-1],
            tail=tail,
            losses=rises,
            left_out=tuple(left_out),
        )

    def _fit(self, units: range, limit: int) -> LinearPart:
        normalisers = self._trained.normalisers
        centre = torch.cat([normalisers.by_site[site].mean for site in normalisers.reads])
        moments = Moments(centre, normalisers.widths.d_out)
        for batch, _, error in self._errors(units, limit, "fit the linear part"):
            moments.add(batch.inputs, error)
        try:
            return moments.fit()
        except ValueError as exc:
            raise ConfigError(f"{self._trained.run.name}: {exc}") from exc

    def _errors(
        self, units: range, limit: int, what: str
    ) -> Iterator[tuple[Rows, Inferred, Float[Tensor, "rows d_out"]]]:
        """Yield rows, their inferred codes and x_hat - targets; collect their documents."""
        self._documents = []
        progress = logs.RateLimitedProgress(what)
        rows = 0
        for batch in self._pages.grouped(self._read(units, limit)):
            found = self._pages.infer(batch.inputs)
            yield batch, found, found.x_hat - batch.targets
            rows += len(batch.inputs)
            progress(rows, max(limit, rows))
        progress.end(rows)

    def _read(self, units: Iterable[int], limit: int) -> Iterator[Rows]:
        activations, normalisers = self._activations, self._trained.normalisers
        for unit in units:
            shards = activations.shards(activations.manifest(unit))
            for number in range(len(next(iter(shards.values())).blocks)):
                read = partial(read_block, activations.store, number=number)
                block = {site: read(shard=shard) for site, shard in shards.items()}
                acts = {site: rows.acts[:limit].float() for site, rows in block.items()}
                documents = next(iter(block.values())).documents[:limit]
                self._documents.append(documents)
                limit -= len(documents)
                yield normalisers.rows(acts)
                if limit <= 0:
                    return

    def _tail(
        self,
        targets: Tensor,
        squares: Tensor,
        documents: Tensor,
        l0: float,
        energy: Floats,
        alive: NDArray[np.bool_],
    ) -> Tail:
        pages, most = self._pages, most_latents(l0)
        kept = torch.arange(min(len(targets), affordable_rows(l0, targets.shape[1])))
        targets, squares, documents = targets[kept], squares[kept], documents[kept]
        y = targets - self._offset(targets)
        parts = partial(pages.parts, "W_dec")
        usable = torch.from_numpy(alive)
        residuals = pursue(y, parts, usable, most)
        ordered = np.argsort(np.where(alive, -energy, np.inf), kind="stable")
        half = np.zeros_like(alive)
        half[ordered[: int(alive.sum()) // 2]] = True
        by_half = pursue(y, parts, torch.from_numpy(half), most)
        generator = torch.Generator().manual_seed(0)
        turned, _ = torch.linalg.qr(torch.randn(y.shape[1], y.shape[1], generator=generator))
        y_control = y[:_CONTROL_ROWS] @ turned
        control = pursue(y_control, parts, usable, most)
        total = (targets.double() - self._mean).square().sum(1)
        middle = len(residuals.squares) // 2
        shares, by_half_shares = (
            each.squares.double().sum(1) / total.sum() for each in (residuals, by_half)
        )
        rarer = 1 - float(energy[half].sum() / max(energy[alive].sum(), 1e-300))
        unique = unique_share(shares, by_half_shares, rarer)
        return Tail(
            residual=residual_share(residuals.squares.double(), total, documents),
            unique=unique,
            fvu=float(squares.sum() / total.sum()),
            explained=1 - float(residuals.squares[middle].sum() / y.square().sum()),
            chance=1 - float(control.squares[middle].sum() / y_control.square().sum()),
            latents=float(residuals.latents[middle].mean()),
            capped=float((residuals.latents[middle] >= most).float().mean()),
            rows=len(y),
        )

    def _offset(self, x: Tensor) -> Tensor:
        """Return the part of x_hat that does not come from a latent."""
        pages = self._pages.pages()
        offset = next(iter(pages)).offset(x).detach().clone()
        return offset.expand_as(x)

    def _losses(self, linear: LinearPart) -> dict[str, float]:
        """Measure the rises of the cross-entropy; empty without a language model."""
        run = self._run
        if not isinstance(run.model, HuggingFaceModel) or not run.evaluate.contexts:
            return {}
        whole: dict[str, Inference] = {
            "whole": self._pages,
            "nonlinear": _Nonlinear(self._pages, linear),
            "linear": _Linear(self._pages, linear),
        }
        rises: dict[str, float] = {}
        for name, sae in whole.items():
            found: dict[str, Any] = cross_entropies(
                self._activations, run, sae, self._trained.normalisers
            )
            if "ce_left_out" in found:
                raise ModelError(found["ce_left_out"])
            rises[name] = found["ce_spliced"] - found["ce_clean"]
            rises["tokens"] = found["tokens"]
        return rises


class _Nonlinear:
    """The dictionary without the linear part of its error: x_hat - e_linear."""

    def __init__(self, pages: PagedDictionary, linear: LinearPart) -> None:
        self._pages, self._linear = pages, linear

    def infer(self, x: Float[Tensor, "batch d_in"]) -> Inferred:
        found = self._pages.infer(x)
        return found._replace(x_hat=found.x_hat - self._linear.linear_error(x))


class _Linear:
    """Inputs with only the linear part of the dictionary's error: x + e_linear."""

    def __init__(self, pages: PagedDictionary, linear: LinearPart) -> None:
        self._pages, self._linear = pages, linear

    def infer(self, x: Float[Tensor, "batch d_in"]) -> Inferred:
        return self._pages.infer(x)._replace(x_hat=x + self._linear.linear_error(x))


def unique_share(
    residual: Float[Tensor, " strictness"], by_half: Float[Tensor, " strictness"], rarer: float
) -> Span:
    """Return the share of unique energy, from 0 to 1: see `Tail.unique`.

    Args:
        residual: The solver's error, as a share of the variance.
        by_half: The solver's error without the half of the latents with the least energy.
        rarer: That half's share of the energy of all latents.
    """
    found = ((by_half - residual) / ((1 - residual) * max(rarer, 1e-300))).clamp(0, 1)
    return Span(float(found[len(found) // 2]), float(found.min()), float(found.max()))


def residual_share(
    squares: Float[Tensor, "strictness rows"],
    total: Float[Tensor, " rows"],
    documents: Tensor,
) -> Span:
    """Return the share of the variance that a pursuit cannot explain: see `Tail.residual`.

    Args:
        squares: Squared error of each row, for each threshold.
        total: Squared distance of each row from the mean.
        documents: Document of each row.
    """
    _, which = torch.unique(documents, return_inverse=True)
    n = int(which.max()) + 1
    columns = torch.cat([squares, total[None]])
    sums = torch.zeros(len(columns), n, dtype=torch.float64).index_add_(1, which, columns)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(n, (_RESAMPLES, n), generator=generator)
    resampled = torch.stack([sums[:, draw].sum(1) for draw in drawn])
    shares = resampled[:, :-1] / resampled[:, -1:]
    low, high = shares.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    value = float(squares[len(squares) // 2].sum() / total.sum())
    return Span(value, min(value, float(low.min())), max(value, float(high.max())))
