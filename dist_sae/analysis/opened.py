"""What an analysis of one index reads: the newest checkpoint, its index and names of tokens."""

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

from dist_sae.analysis.names import token_names
from dist_sae.checkpoint.trained import find_checkpoint, none_yet, trained_run
from dist_sae.config import Run
from dist_sae.data.plan import as_planned, load_plan
from dist_sae.errors import CorpusError, ModelError, PlanMismatchError, StoreError
from dist_sae.index.decoder import Decoder
from dist_sae.index.query import Index, index_of
from dist_sae.models import Tokenizer, build_tokenizer
from dist_sae.storage import open_store

logger = logging.getLogger(__name__)


class Indexed(NamedTuple):
    """A trained dictionary and its latent index."""

    latents: Index
    decoder: Decoder
    name: Callable[[Iterable[int]], list[str]]
    """Names tokens, leaving out those below 0."""


def open_indexed(run: Run) -> Indexed:
    """Open the newest checkpoint of a run and its index.

    Raises:
        ConfigError: There is no checkpoint.
        NoIndexError: The checkpoint has no complete index.
        PlanMismatchError: The run was trained with other settings.
    """
    runs = open_store(run.store.runs, run.store.s3)
    if (checkpoint := find_checkpoint(runs, run, None)) is None:
        raise none_yet(runs, run)
    index = index_of(runs, run.name, checkpoint)
    names = token_names(_tokenizer(trained_run(checkpoint, run)))
    return Indexed(index, Decoder(checkpoint), names)


def _tokenizer(run: Run) -> Tokenizer | None:
    """The tokenizer of the model; None, which is logged, if it cannot be read."""
    try:
        plan = load_plan(open_store(run.store.activations, run.store.s3), run)
        return build_tokenizer(as_planned(run, plan))
    except (CorpusError, ModelError, PlanMismatchError, StoreError) as error:
        logger.warning("tokens are shown as numbers: %s", error)
        return None
