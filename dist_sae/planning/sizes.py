"""Inputs of a forecast: the run with all settings resolved, its units and its widths."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dist_sae.config import Run, jobs_of
from dist_sae.config.data import HuggingFaceModel, SyntheticModel, layer_of
from dist_sae.config.dictionary import KSelectionConfig
from dist_sae.data.corpus import Corpus
from dist_sae.data.deal import choose_layout
from dist_sae.data.make_plan import LAYOUT_SETTINGS, make_plan
from dist_sae.data.plan import PLAN_KEY, Plan, check_rows, load_plan
from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.dictionaries.interface import Widths
from dist_sae.errors import ConfigError
from dist_sae.logs import RateLimitedProgress
from dist_sae.planning.simulate import plan_from_units
from dist_sae.producing.planner import count_rows, row_bytes
from dist_sae.storage import open_store
from dist_sae.training.memory import StateBytes, state_bytes

_MOST_DOCUMENTS = 100_000  # in the made-up plan, if only the number of rows is given
_DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


class Model(NamedTuple):
    """Sizes of the part of the language model that a producer runs."""

    widths: Mapping[str, int]
    """Width of each site of the activation set."""
    parameters: int
    """Parameters of the layers up to the deepest site, without the embedding."""
    stored_bytes: int
    """Bytes of the loaded part, including the embedding."""


class RunSizes(NamedTuple):
    """Sizes of a planned run, or of a job of a sweep."""

    run: Run
    """The run, with all settings resolved that depend on a plan."""
    model: Model
    unit_rows: Sequence[int]
    """Rows of each training unit, in the order of the plan."""
    heldout_unit_rows: Sequence[int]
    pass_rows: int
    """Training rows of one pass."""
    source: str
    """Where the number of rows comes from, for the report."""

    @property
    def widths(self) -> Widths:
        """Widths of the sites that the dictionary reads and writes."""
        of = self.model.widths
        return Widths(*(tuple(of[s] for s in sites) for sites in (self.run.reads, self.run.writes)))

    @property
    def axis(self) -> LatentAxis:
        """The first rank's place among shards and replicas."""
        return LatentAxis(0, self.run.processes.latent_shards, 0, self.run.replicas)

    @property
    def state(self) -> StateBytes:
        """Bytes of a rank's weights and training state."""
        return state_bytes(self.run, self.widths, self.axis)

    @property
    def active(self) -> float:
        """Active latents per row: k, or the initial number in a penalised recipe."""
        sae = self.run.sae
        if isinstance(sae, KSelectionConfig):
            return sae.k
        found: float = getattr(sae, "target_l0", None) or sae.l0_at_start(self.widths.d_in)
        return min(found, sae.n_latents / 2)

    @property
    def rank_rows(self) -> int:
        """Rows of a batch that one rank loads."""
        return self.run.train.batch_rows // self.run.processes.trainers

    @property
    def replica_rows(self) -> int:
        """Rows of a batch that each latent shard encodes."""
        return self.run.train.batch_rows // self.run.replicas

    @property
    def units(self) -> Sequence[int]:
        """Rows of all units, held-out ones last."""
        return [*self.unit_rows, *self.heldout_unit_rows]

    def row_bytes(self, sites: Collection[str] | None = None) -> int:
        """Return the bytes of a stored row, over these sites or over all."""
        widths = self.model.widths
        return row_bytes(self.run.activations.dtype, {s: widths[s] for s in sites or widths})

    @property
    def streams(self) -> int:
        """Streams of the activation set."""
        assert self.run.activations.streams is not None, "the plan sets streams"
        return self.run.activations.streams

    @property
    def first_windows(self) -> int:
        """Number of units that training needs to start: one window of each stream."""
        return min(len(self.unit_rows), self.streams * self.run.activations.window_units)

    @property
    def sharing(self) -> int:
        """Number of trainer ranks that share a stream. Each of them reads all of it."""
        return max(1, self.run.processes.trainers // self.streams)


def sites_of(jobs: Sequence[RunSizes]) -> set[str]:
    """Return all sites that any of the jobs reads or writes."""
    return {site for job in jobs for site in job.run.sites}


def find_sizes(
    run: Run, rows: int | None = None, width: int | None = None, parameters: int | None = None
) -> list[RunSizes]:
    """Find the sizes of a run, or of each job, from its plan, its corpus, or a number of rows.

    Args:
        run: The run file.
        rows: Rows of the activation set. If given, neither the store nor the corpus is read.
        width: Width of every site. If given, the model is not read.
        parameters: See `Model.parameters`; used only with `width`.

    Raises:
        ConfigError: There are fewer rows than a batch, or settings contradict each other.
        DataExhaustedError: A run needs more rows than the activation set has.
        CorpusError: The text cannot be read.
        ModelError: The model cannot be described.
        StoreError: The store cannot be reached.
    """
    model = _model_sizes(run, width, parameters)
    if rows is not None:
        plan, source = _plan_of_rows(run, rows), "--rows"
    else:
        store = open_store(run.store.activations, run.store.s3)
        if store.size(PLAN_KEY) is not None:
            plan, source = load_plan(store, run), f"the plan at {store.url}"
        else:
            corpus, pace = Corpus(run.corpus, run.store.s3), RateLimitedProgress("estimate")
            index = corpus.index()
            plan = make_plan(run, index, count_rows(run, corpus, index, pace))
            source = "the corpus, which is not planned yet"
    jobs = [plan.resolve(job) for job in jobs_of(run)]
    for job in jobs:
        check_rows(job, plan)
    units = plan.rows_of_units[: plan.n_train_units]
    heldout = plan.rows_of_units[plan.n_train_units :]
    return [RunSizes(job, model, units, heldout, plan.pass_rows, source) for job in jobs]


def _plan_of_rows(run: Run, rows: int) -> Plan:
    """Make a plan with this many rows, from documents of equal length."""
    activations, batch_rows = run.activations, run.train.batch_rows
    heldout = int(rows * activations.heldout_share)
    documents = max(1, min(_MOST_DOCUMENTS, (rows - heldout) // activations.context_tokens))
    layout = choose_layout(
        np.full(documents, (rows - heldout) // documents),
        streams=activations.streams,
        window_units=activations.window_units,
        unit_rows=activations.unit_rows,
        trainers=run.processes.trainers,
        batch_rows=batch_rows,
    )
    of_stream = layout.targets((rows - heldout) // layout.streams)
    shares = of_stream * (rows - heldout) // (layout.streams * of_stream.sum())
    units = np.repeat(shares, layout.streams).tolist()
    if sum(units) < batch_rows:
        raise ConfigError(
            f"--rows: {rows} leave {sum(units)} rows for training, less than one batch "
            f"(train.batch_rows {batch_rows}); pass more"
        )
    n_heldout = max(1, round(heldout / layout.unit_rows)) if heldout else 0
    own = {name: getattr(layout, name) for name in LAYOUT_SETTINGS}
    return plan_from_units(units, [layout.unit_rows] * n_heldout, **own)


def _model_sizes(run: Run, width: int | None, parameters: int | None) -> Model:
    sites = run.activations.sites
    match run.model:
        case SyntheticModel():
            return Model(dict.fromkeys(sites, run.model.d_in), 0, 0)
        case HuggingFaceModel() if width is not None:
            n = parameters or 0
            return Model(dict.fromkeys(sites, width), n, n * _DTYPE_BYTES[run.model.dtype])
        case HuggingFaceModel():
            return _model_sizes_from_hub(run.model, sites)


def _model_sizes_from_hub(model: HuggingFaceModel, sites: Sequence[str]) -> Model:
    from dist_sae.models.loading import describe  # importing this takes 3 s
    from dist_sae.models.sites import blocks, width

    widths: dict[str, int] = {}
    parameters = stored = 0
    for part, names in model.by_model(sites):
        skeleton = describe(part, tuple(names)).skeleton
        widths |= {names[name]: width(skeleton, name) for name in names}
        layers = blocks(skeleton)[: max(map(layer_of, names)) + 1]
        own = sum(p.numel() for p in layers.parameters())
        parameters += own
        stored += own + skeleton.get_input_embeddings().weight.numel()
    return Model(
        {site: widths[site] for site in sites}, parameters, stored * _DTYPE_BYTES[model.dtype]
    )
