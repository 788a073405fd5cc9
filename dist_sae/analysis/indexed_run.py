"""The input of an analysis: a run's newest checkpoint with its latent index."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dist_sae.analysis.names import token_names
from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.checkpoint.lineage import Lineage
from dist_sae.checkpoint.trained import find_checkpoint, no_checkpoint_error, trained_run
from dist_sae.config import Run
from dist_sae.data.plan import load_plan, pin_to_plan
from dist_sae.errors import CorpusError, ModelError, PlanMismatchError, StoreError
from dist_sae.index.decoder import Decoder
from dist_sae.index.query import Index, index_of
from dist_sae.models import Tokenizer, build_tokenizer
from dist_sae.storage import open_store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexedRun:
    """A run's trained dictionary with its index."""

    run: Run
    """Settings that the dictionary was trained with."""
    checkpoint: Checkpoint
    index: Index

    @property
    def trained_rows(self) -> int:
        """Number of rows that the dictionary was trained on, including runs that it continues."""
        before = Lineage.from_scalars(self.checkpoint.scalars).rows
        return before + self.checkpoint.step * self.run.train.batch_rows

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer of the model, as recorded in the plan.

        Raises:
            ModelError: The tokenizer cannot be read.
            PlanMismatchError: The activation set has no plan, or a plan with other settings.
        """
        plan = load_plan(open_store(self.run.store.activations, self.run.store.s3), self.run)
        return build_tokenizer(pin_to_plan(self.run, plan))


def open_indexed_run(run: Run) -> IndexedRun:
    """Open the newest checkpoint of a run, and its index.

    Raises:
        ConfigError: There is no checkpoint yet.
        NoIndexError: The checkpoint has no complete index.
        PlanMismatchError: The run was trained with other settings.
    """
    store = open_store(run.store.runs, run.store.s3)
    checkpoint = find_checkpoint(store, run, None)
    if checkpoint is None:
        raise no_checkpoint_error(store, run)
    index = index_of(store, run.name, checkpoint)
    return IndexedRun(trained_run(checkpoint, run), checkpoint, index)


@dataclass(frozen=True)
class IndexedDictionary:
    """A dictionary's index and decoder, and a function that names tokens."""

    index: Index
    decoder: Decoder
    name_tokens: Callable[[Iterable[int]], list[str]]
    """Function that names tokens. It skips negative ones, which are padding."""


def open_indexed_dictionary(run: Run) -> IndexedDictionary:
    """Open the newest checkpoint of a run and its index.

    Raises:
        ConfigError: There is no checkpoint.
        NoIndexError: The checkpoint has no complete index.
        PlanMismatchError: The run was trained with other settings.
    """
    indexed = open_indexed_run(run)
    names = token_names(_tokenizer(indexed))
    return IndexedDictionary(indexed.index, Decoder(indexed.checkpoint), names)


def _tokenizer(indexed: IndexedRun) -> Tokenizer | None:
    """Load the model's tokenizer. If it cannot be read, log a warning and return None."""
    try:
        return indexed.tokenizer()
    except (CorpusError, ModelError, PlanMismatchError, StoreError) as error:
        logger.warning("tokens are shown as numbers: %s", error)
        return None
