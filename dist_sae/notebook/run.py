"""A run, opened to be read: its checkpoints, its rows, its texts and its model."""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import torch

from dist_sae.checkpoint import folder
from dist_sae.checkpoint.encoder import StoredEncoder
from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.checkpoint.trained import (
    none_yet,
    normalisers_of,
    read_trained,
    trained_run,
    use_checkpoint,
)
from dist_sae.config import Run, jobs_of
from dist_sae.config.data import HuggingFaceModel
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.plan import PLAN_KEY, Plan, as_planned, load_plan
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
        place: The run's folder (`<store.runs>/<name>`), as a path or an `s3://` URL, or its run
            file.
        overrides: As `--set` of the commands: `["store.s3.endpoint_url=http://127.0.0.1:8333"]`,
            or `["model.path=/models/smollm2"]` if the model has moved.

    Raises:
        ConfigError: It is neither; a line for every problem.
        StoreError: The folder cannot be read.
    """
    argument = os.fspath(place)
    if "://" not in argument:
        argument = os.path.expanduser(argument)
    run = folder.open_run(argument, overrides)
    if run.sweep:
        names = ", ".join(job.name for job in jobs_of(run))
        raise ConfigError(f"{argument}: is a sweep; open the folder of one of its runs: {names}")
    return OpenedRun(run)


class OpenedRun:
    """A run as its files are now; a trainer or producers may still be at work on them.

    Attributes:
        config: The run file.
    """

    def __init__(self, config: Run) -> None:
        self.config = config
        self._runs = open_store(config.store.runs, config.store.s3)
        self._store = open_store(config.store.activations, config.store.s3)
        self._encoder: StoredEncoder | None = None  # that of the last text

    def __repr__(self) -> str:
        sae = self.config.sae
        kind = f"{sae.kind}, {sae.n_latents} latents, {self.config.described_sites}"
        return f"OpenedRun({self._place}: {kind})"

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return Checkpoints(self._runs, self.config.name, 1).steps()

    def dictionary(self, step: int | None = None) -> RawDictionary:
        """Read the whole dictionary of a checkpoint into memory, on the CPU.

        Args:
            step: Step of the checkpoint; None takes the newest readable one.

        Raises:
            ConfigError: There is no checkpoint, or none of that step.
            PlanMismatchError: The run was trained with other settings.
            CorruptObjectError: The checkpoint is damaged.
        """
        self._check(step)
        trained = read_trained(self._runs, self.config, step)
        if trained is None:
            raise none_yet(self._runs, self.config)
        return RawDictionary(
            trained.sae,
            trained.normalisers,
            trained.step,
            trained.idle_rows,
            reader=lambda: self._reader,
        )

    def active_on(self, text: str, top: int = 5, step: int | None = None) -> list[TokenLatents]:
        """Find the strongest latents on each token: `RawDictionary.active_on` at any width.

        Of the checkpoint it reads only the encoder, as far as it is needed (`StoredEncoder`): in
        routed dictionaries, the experts that the text's tokens are sent to.

        Args:
            text: Any text.
            top: Most latents of a token.
            step: Step of the checkpoint; None takes the newest readable one.

        Raises: As `dictionary` and `RawDictionary.active_on`.
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
            raise none_yet(self._runs, self.config)
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

        Only units that are there are read; how many are not is logged as a warning.

        Args:
            units: Numbers of units; None takes all training units.
            heldout: Take the held-out units instead, if `units` is None.
            batch_rows: Rows of a batch; None gives a batch per unit.
            limit: Most rows in all.
            site: A site of the activation set; None takes those that the dictionary reads, side by
                side.

        Raises:
            ArgumentError: The plan has no such unit, or the set no such site.
            DataExhaustedError: A unit's rows were deleted after use.
            UnitMissingError: A unit, or every unit, has not been produced.
            PlanMismatchError: There is no activation set, or one of other settings.
        """
        sites = (site,) if site else self.config.reads
        for each in sites:
            if each not in self._plan.sites:
                there = ", ".join(self._plan.sites)
                raise ArgumentError(f"site {each}: {self._store.url} has {there}")
        for name, number in (("batch_rows", batch_rows), ("limit", limit)):
            if number is not None and number < 1:
                raise ArgumentError(f"{name}: {number} is not a positive number")
        activations = ActivationSet(self._store, self._plan, sites, wait=False)
        found = find_units(activations, units, heldout=heldout)
        return read_rows(activations, found, batch_rows, limit)

    def shards(self, *, heldout: bool = False, site: str | None = None) -> list[str]:
        """List the shards of a site as webdataset reads them: paths, or `s3://` URLs.

        Args:
            heldout: List the held-out units' instead of those to train on.
            site: A site of the activation set; None takes the first that the dictionary reads.

        Raises:
            ConfigError: The activation set has no such site.
            DataExhaustedError: There are no such units.
            PlanMismatchError: There is no activation set, or one of other settings.
        """
        return urls(self.config, site or self.config.site, heldout=heldout)

    @overload
    def text(self, of: RowBatch, row: int) -> RowText: ...
    @overload
    def text(self, of: Origin) -> RowText: ...

    def text(self, of: RowBatch | Origin, row: int = 0) -> RowText:
        """Read the text around a row, from the corpus.

        Args:
            of: Rows of this run, or an example of its index.
            row: Index into the rows.

        Raises:
            CorpusError: The text is gone, or is not what the activations were made from.
            ModelError: The model's tokenizer is gone.
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

        Its `search` and `active_on` need the model's tokenizer, and the model.

        Args:
            name: Its name; None takes the complete one of the last step.

        Raises:
            NoIndexError: There is none, or it is not complete.
            CorruptObjectError: It is damaged, or of another version of dist-sae.
        """
        from dist_sae.notebook.index import OpenedIndex  # needs pyarrow

        return OpenedIndex(
            *(self._runs, self.config.name, name),
            tokenizer=lambda: self._texts.tokenizer,
            active_on=self.active_on,
        )

    def model(self) -> Any:
        """Load the whole language model with its head, as `transformers` has it.

        In the run's precision, on the GPU if there is one.

        Raises:
            ConfigError: The run's activations are not of a language model.
            HeadlessError: The model predicts no tokens.
            ModelError: The model cannot be loaded.
        """
        config = self._language_model
        from dist_sae.models.loading import describe  # takes 3 s
        from dist_sae.models.spliced import load_with_head

        model, _ = load_with_head(config, describe(config, self.config.sites))
        model.config.get_text_config().use_cache = True  # `describe` turns it off
        return model

    def tokenizer(self) -> Any:
        """Load the language model's tokenizer, as `transformers` has it; raises like `model`."""
        config = self._language_model
        from dist_sae.models.loading import load_plain_tokenizer  # takes 3 s

        return load_plain_tokenizer(config)

    def _check(self, step: int | None) -> None:
        if step is not None and step not in (steps := self.steps()):
            there = ", ".join(map(str, steps)) or "none"
            raise ConfigError(f"{self._place}: has no checkpoint of step {step}; it has: {there}")

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
        """The run with the model's commit on the hub pinned, if its activation set is at hand."""
        if self._store.size(PLAN_KEY) is None:
            return self.config
        return as_planned(self.config, self._plan)

    @cached_property
    def _reader(self) -> TextReader:
        return TextReader(self._as_planned)

    @cached_property
    def _texts(self) -> Texts:
        return Texts(self.config, self._plan)
