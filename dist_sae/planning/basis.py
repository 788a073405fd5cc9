"""Inputs of a forecast: the run with numbers for all settings, its units, its widths."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dist_sae.config import Run, sections_of, validate_run
from dist_sae.config.data import HuggingFaceModel, SyntheticModel, layer_of
from dist_sae.data.corpus import Corpus
from dist_sae.data.deal import choose_layout
from dist_sae.data.make_plan import LAYOUT_SETTINGS, make_plan
from dist_sae.data.plan import PLAN_KEY, Plan, load_plan
from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.dictionaries.interface import Widths
from dist_sae.errors import ConfigError
from dist_sae.logs import PacedProgress
from dist_sae.producing.planner import count_rows
from dist_sae.storage import open_store

_MOST_DOCUMENTS = 100_000  # that stand for a corpus of which only the rows are given
_DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


class Model(NamedTuple):
    """The part of the language model that a producer runs."""

    widths: Mapping[str, int]
    """Width of each site of the activation set."""
    parameters: int
    """Parameters that a token meets on its way to the deepest site, without the embedding."""
    stored_bytes: int
    """Bytes of the loaded part, the embedding included."""


class Basis(NamedTuple):
    """A run before it is made."""

    run: Run
    """With numbers for all settings that a plan decides."""
    model: Model
    unit_rows: Sequence[int]
    """Rows of each training unit, in the order of the plan."""
    heldout_unit_rows: Sequence[int]
    pass_rows: int
    """Rows that one pass gives to training."""
    source: str
    """Where the rows are known from."""

    @property
    def widths(self) -> Widths:
        """Widths of the sites that the dictionary reads and writes."""
        of = self.model.widths
        return Widths(*(tuple(of[s] for s in sites) for sites in (self.run.reads, self.run.writes)))

    @property
    def axis(self) -> LatentAxis:
        """The place of the first rank."""
        shards = self.run.processes.latent_shards
        return LatentAxis(0, shards, 0, self.run.replicas)

    @property
    def rank_rows(self) -> int:
        """Rows of a batch that one rank loads."""
        return self.run.train.batch_rows // self.run.processes.trainers

    @property
    def replica_rows(self) -> int:
        """Rows of a batch that meet each latent shard."""
        return self.run.train.batch_rows // self.run.replicas

    @property
    def stored_rows(self) -> int:
        """Rows of the activation set, held-out ones included."""
        return sum(self.unit_rows) + sum(self.heldout_unit_rows)


def find_basis(
    run: Run, rows: int | None = None, width: int | None = None, parameters: int | None = None
) -> Basis:
    """Find a run's sizes: from its plan, else from its corpus, else from the rows given.

    Args:
        run: As the file has it.
        rows: Rows of the activation set. Then neither the store nor the corpus is looked at.
        width: Width of every site. Then the model is not looked at.
        parameters: See `Model.parameters`; goes with `width`.

    Raises:
        ConfigError: There are too few rows, or settings contradict each other.
        CorpusError: The text cannot be read.
        ModelError: The model cannot be described.
        StoreError: The store cannot be reached.
    """
    model = _described(run, width, parameters)
    if rows is not None:
        return _of_rows(run, model, rows)
    store = open_store(run.store.activations, run.store.s3)
    if store.size(PLAN_KEY) is not None:
        return _of_plan(run, model, load_plan(store, run), f"the plan at {store.url}")
    corpus, pace = Corpus(run.corpus, run.store.s3), PacedProgress("estimate")
    index = corpus.index()
    plan = make_plan(run, index, count_rows(run, corpus, index, pace))
    return _of_plan(run, model, plan, "the corpus, which is not planned yet")


def _of_plan(run: Run, model: Model, plan: Plan, source: str) -> Basis:
    units, n = plan.rows_of_units, plan.n_train_units
    return Basis(plan.resolve(run), model, units[:n], units[n:], plan.pass_rows, source)


def _of_rows(run: Run, model: Model, rows: int) -> Basis:
    """Lay out documents of one length that have so many rows, as a plan would."""
    activations, train = run.activations, run.train
    heldout = int(rows * activations.heldout_share)
    documents = max(1, min(_MOST_DOCUMENTS, (rows - heldout) // activations.context_tokens))
    layout = choose_layout(
        np.full(documents, (rows - heldout) // documents),
        streams=activations.streams,
        window_units=activations.window_units,
        unit_rows=activations.unit_rows,
        trainers=run.processes.trainers,
        batch_rows=train.batch_rows,
    )
    of_stream = layout.targets((rows - heldout) // layout.streams)
    shares = of_stream * (rows - heldout) // (layout.streams * of_stream.sum())
    units = np.repeat(shares, layout.streams).tolist()
    if sum(units) < train.batch_rows:
        raise ConfigError(
            f"--rows: {rows} leave {sum(units)} rows to train on, less than one batch "
            f"(train.batch_rows {train.batch_rows}); give more"
        )
    there = sum(units) * train.max_passes // train.batch_rows * train.batch_rows
    first = sum(units[: layout.streams * layout.window_units])
    filled: Mapping[str, Any] = {
        "activations": {name: getattr(layout, name) for name in LAYOUT_SETTINGS},
        "train": {"rows": there, "normaliser_rows": max(1, min(1_000_000, int(0.9 * first)))},
    }
    run = validate_run(sections_of(run.filled(filled)), "with the layout of --rows")
    if run.rows > sum(units) * train.max_passes:
        raise ConfigError(
            f"--rows: {rows} are fewer than train.rows ({run.rows}) asks for in "
            f"{train.max_passes} passes; give more, or lower train.rows"
        )
    heldout_units = [layout.unit_rows] * max(1, round(heldout / layout.unit_rows))
    return Basis(run, model, units, heldout_units if heldout else [], sum(units), "--rows")


def _described(run: Run, width: int | None, parameters: int | None) -> Model:
    sites = run.activations.sites
    match run.model:
        case SyntheticModel():
            return Model(dict.fromkeys(sites, run.model.d_in), 0, 0)
        case HuggingFaceModel() if width is not None:
            met = parameters or 0
            return Model(dict.fromkeys(sites, width), met, met * _DTYPE_BYTES[run.model.dtype])
        case HuggingFaceModel():
            return _of_hub(run.model, sites)


def _of_hub(model: HuggingFaceModel, sites: Sequence[str]) -> Model:
    from dist_sae.models.loading import describe  # takes 3 s
    from dist_sae.models.sites import blocks, width

    widths: dict[str, int] = {}
    met = held = 0
    for part, names in model.by_model(sites):
        skeleton = describe(part, tuple(names)).skeleton
        widths |= {names[name]: width(skeleton, name) for name in names}
        deepest = max(map(layer_of, names))
        layers = blocks(skeleton)[: deepest + 1]
        own = sum(p.numel() for p in layers.parameters())
        met += own
        held += own + skeleton.get_input_embeddings().weight.numel()
    return Model({site: widths[site] for site in sites}, met, held * _DTYPE_BYTES[model.dtype])
