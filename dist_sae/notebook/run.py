"""A run opened for reading: its checkpoints, rows, texts, index and language model."""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import torch

from dist_sae.checkpoint import run_folder
from dist_sae.checkpoint.encoder import StoredEncoder
from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.checkpoint.trained import (
    no_checkpoint_error,
    normalisers_of,
    read_trained,
    trained_run,
    use_checkpoint,
)
from dist_sae.config import Run, jobs_of
from dist_sae.config.data import HuggingFaceModel
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.plan import PLAN_KEY, Plan, load_plan, pin_to_plan
from dist_sae.data.upkeep import urls
from dist_sae.errors import ArgumentError, ConfigError
from dist_sae.index.texts import Place, Texts, build_example
from dist_sae.notebook.codes import SparseCodes
from dist_sae.notebook.dictionary import RawDictionary
from dist_sae.notebook.rows import RowBatch, find_units, read_rows
from dist_sae.notebook.texts import Origin, RowText, TextReader, TokenLatents, strongest
from dist_sae.storage import open_store

if TYPE_CHECKING:
    from dist_sae.notebook.index import OpenedIndex


def open_run(place: str | os.PathLike[str], overrides: Sequence[str] = ()) -> "OpenedRun":
    """Open a run.

    Args:
        place: The run's folder (`<store.runs>/<name>`) as a path or an `s3://` URL, or the path of
            its run file.
        overrides: Settings to override, like the commands' `--set`. For example
            `["store.s3.endpoint_url=http://127.0.0.1:8333"]`, or `["model.path=/models/smollm2"]`
            if the model has moved.

    Raises:
        ConfigError: The place is not a run, or its settings are not valid. The message has one
            line per problem.
        StoreError: The folder cannot be read.
    """
    argument = os.fspath(place)
    if "://" not in argument:
        argument = os.path.expanduser(argument)
    run = run_folder.open_run(argument, overrides)
    if run.sweep:
        names = ", ".join(job.name for job in jobs_of(run))
        raise ConfigError(f"{argument}: is a sweep; open the folder of one of its runs: {names}")
    return OpenedRun(run)


class OpenedRun:
    """A run, read from its files as they are now. Training or production may still be going on.

    Attributes:
        config: The run's settings.
    """

    def __init__(self, config: Run) -> None:
        self.config = config
        self._runs = open_store(config.store.runs, config.store.s3)
        self._store = open_store(config.store.activations, config.store.s3)
        self._encoder: StoredEncoder | None = None  # of the last call of `active_on`

    def __repr__(self) -> str:
        sae = self.config.sae
        kind = f"{sae.kind}, {sae.n_latents} latents, {self.config.described_sites}"
        return f"OpenedRun({self._place}: {kind})"

    def steps(self) -> list[int]:
        """Return the steps that have a complete checkpoint, in ascending order."""
        return Checkpoints(self._runs, self.config.name, 1).steps()

    def dictionary(self, step: int | None = None) -> RawDictionary:
        """Read the whole dictionary of a checkpoint into CPU memory.

        Args:
            step: Step of the checkpoint. None: the newest readable one.

        Raises:
            ConfigError: The run has no checkpoint, or none of that step.
            PlanMismatchError: The run was trained with other settings.
            CorruptObjectError: The checkpoint is damaged.
        """
        self._check(step)
        trained = read_trained(self._runs, self.config, step)
        if trained is None:
            raise no_checkpoint_error(self._runs, self.config)
        return RawDictionary(
            trained.sae,
            trained.normalisers,
            trained.step,
            trained.idle_rows,
            reader=lambda: self._reader,
        )

    def active_on(self, text: str, top: int = 5, step: int | None = None) -> list[TokenLatents]:
        """Find the strongest latents on each token of a text, for a dictionary of any width.

        Unlike `RawDictionary.active_on`, this reads only the encoder from the checkpoint. From a
        routed dictionary it reads only the experts that the tokens are sent to.

        Args:
            text: Any text.
            top: Maximum number of latents per token.
            step: Step of the checkpoint. None: the newest readable one.

        Raises the errors of `dictionary` and of `RawDictionary.active_on`.
        """
        self._check(step)
        rows = self._reader.read(text)

        def find(checkpoint: Checkpoint) -> list[TokenLatents]:
            own = trained_run(checkpoint, self.config)
            normalisers = normalisers_of(own, checkpoint)
            encoder = self._encoder
            if encoder is None or encoder.checkpoint.digest != checkpoint.digest:
                memory_bytes = self.config.evaluate.memory_bytes // 2
                encoder = StoredEncoder(own.sae, normalisers.widths, checkpoint, memory_bytes)
                self._encoder = encoder
            parts = torch.split(rows.acts.cpu(), list(normalisers.widths.reads), 1)
            of_sites = dict(zip(normalisers.reads, parts, strict=True))
            codes = encoder.encode(normalisers.inputs(of_sites))
            shape = (len(rows.acts), own.sae.n_latents)
            return strongest(rows, SparseCodes.of(codes, shape), top)

        found = use_checkpoint(self._runs, self.config, step, find)
        if found is None:
            raise no_checkpoint_error(self._runs, self.config)
        return found

    def rows(
        self,
        units: int | Iterable[int] | None = None,
        *,
        heldout: bool = False,
        batch_rows: int | None = None,
        limit: int | None = None,
        site: str | None = None,
    ) -> Iterator[RowBatch]:
        """Iterate over activation rows in the order of the plan, with token, position, document.

        By default all units that exist are read, and a warning counts the missing ones.

        Args:
            units: Number of a unit, or several. None: all training units.
            heldout: Read the held-out units instead of the training units, if `units` is None.
            batch_rows: Rows per batch. None: one batch per unit.
            limit: Maximum number of rows in total.
            site: A site of the activation set. None: the sites that the dictionary reads,
                concatenated.

        Raises:
            ArgumentError: A unit is not in the plan, or the activation set does not have the site.
            DataExhaustedError: A unit's rows were deleted after use.
            UnitMissingError: One of `units` has not been produced, or no unit at all has been.
            PlanMismatchError: The activation set does not exist, or has other settings.
        """
        sites = (site,) if site else self.config.reads
        for each in sites:
            if each not in self._plan.sites:
                there = ", ".join(self._plan.sites)
                raise ArgumentError(f"site {each}: {self._store.url} has only {there}")
        for name, number in (("batch_rows", batch_rows), ("limit", limit)):
            if number is not None and number < 1:
                raise ArgumentError(f"{name}: {number} is not a positive number")
        activations = ActivationSet(self._store, self._plan, sites, wait=False)
        found = find_units(activations, units, heldout=heldout)
        return read_rows(activations, found, batch_rows, limit)

    def shards(self, *, heldout: bool = False, site: str | None = None) -> list[str]:
        """List the shards of a site for webdataset, as paths or `s3://` URLs.

        Args:
            heldout: List the shards of the held-out units instead of the training units.
            site: A site of the activation set. None: the first site that the dictionary reads.

        Raises:
            ConfigError: The activation set does not have the site.
            DataExhaustedError: None of these units exist.
            PlanMismatchError: The activation set does not exist, or has other settings.
        """
        return urls(self.config, site or self.config.site, heldout=heldout)

    @overload
    def text(self, of: RowBatch, row: int) -> RowText: ...
    @overload
    def text(self, of: Origin) -> RowText: ...

    def text(self, of: RowBatch | Origin, row: int = 0) -> RowText:
        """Read the text around a row from the corpus.

        Args:
            of: A batch of rows of this run, or an example from its index.
            row: Index into the batch. Not used for an example.

        Raises:
            CorpusError: The text no longer exists, or differs from what the model was run on.
            ModelError: The model's tokenizer cannot be loaded.
        """
        if isinstance(of, RowBatch):
            unit = int(of.units[row])
            place = Place(*(int(c[row]) for c in (of.documents, of.positions, of.tokens)))
            documents = of.documents[of.units == unit].tolist()
        else:
            unit, place = of.unit, Place(of.document, of.position, of.token)
            documents = [of.document]
        self._texts.read(unit, documents)
        example = build_example(place, {place[:2]: 0.0}, self._texts)
        pieces = [token.text for token in example.tokens]
        before, after = pieces[: example.peak], pieces[example.peak + 1 :]
        return RowText("".join(before), pieces[example.peak], "".join(after))

    def index(self, name: str | None = None) -> "OpenedIndex":
        """Open a latent index: pages of latents, their examples, neighbours and all activations.

        The index's `search` loads the model's tokenizer, and its `active_on` loads the model.

        Args:
            name: Name of the index. None: the complete index of the latest step.

        Raises:
            NoIndexError: The index does not exist or is not complete.
            CorruptObjectError: The index is damaged, or from another version of dist-sae.
        """
        from dist_sae.notebook.index import OpenedIndex  # needs pyarrow

        return OpenedIndex(
            *(self._runs, self.config.name, name),
            tokenizer=lambda: self._texts.tokenizer,
            active_on=self.active_on,
        )

    def model(self) -> Any:
        """Load the whole language model with its head, as a `transformers` model.

        The model has the run's precision and is on the GPU if there is one.

        Raises:
            ConfigError: The run's activations are synthetic.
            HeadlessError: The model has no head that predicts tokens.
            ModelError: The model cannot be loaded.
        """
        config = self._language_model
        from dist_sae.models.loading import describe  # takes 3 s
        from dist_sae.models.spliced import load_with_head

        model, _ = load_with_head(config, describe(config, self.config.sites))
        model.config.get_text_config().use_cache = True  # `describe` turns it off
        return model

    def tokenizer(self) -> Any:
        """Load the language model's tokenizer from `transformers`. Raises like `model`."""
        config = self._language_model
        from dist_sae.models.loading import load_plain_tokenizer  # takes 3 s

        return load_plain_tokenizer(config)

    def _check(self, step: int | None) -> None:
        if step is not None and step not in (steps := self.steps()):
            there = ", ".join(map(str, steps)) or "none"
            raise ConfigError(
                f"{self._place}: has no checkpoint of step {step}; available steps: {there}"
            )

    @property
    def _place(self) -> str:
        return f"{self._runs.url}/{self.config.name}"

    @property
    def _language_model(self) -> HuggingFaceModel:
        model = self._as_planned.model
        if not isinstance(model, HuggingFaceModel):
            raise ConfigError(
                f"model.kind: {model.kind}: run {self.config.name} has no language model"
            )
        return model.model_copy(update={"tensor_parallel": 1})

    @cached_property
    def _plan(self) -> Plan:
        return load_plan(self._store, self.config)

    @property
    def _as_planned(self) -> Run:
        """The run with the model's commit on the hub, if the activation set is in the store."""
        if self._store.size(PLAN_KEY) is None:
            return self.config
        return pin_to_plan(self.config, self._plan)

    @cached_property
    def _reader(self) -> TextReader:
        return TextReader(self._as_planned)

    @cached_property
    def _texts(self) -> Texts:
        return Texts(self.config, self._plan)
