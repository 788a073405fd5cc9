"""Input of an analysis of one index: the newest checkpoint, its index and names of tokens."""

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

from dist_sae.analysis.names import token_names
from dist_sae.analysis.subject import Subject, open_subject
from dist_sae.config import Run
from dist_sae.errors import CorpusError, ModelError, PlanMismatchError, StoreError
from dist_sae.index.decoder import Decoder
from dist_sae.index.query import Index
from dist_sae.models import Tokenizer

logger = logging.getLogger(__name__)


class Indexed(NamedTuple):
    """A trained dictionary and its latent index."""

    latents: Index
    decoder: Decoder
    name: Callable[[Iterable[int]], list[str]]
    """Function that names tokens. It skips negative ones, which are padding."""


def open_indexed(run: Run) -> Indexed:
    """Open the newest checkpoint of a run and its index.

    Raises:
        ConfigError: There is no checkpoint.
        NoIndexError: The checkpoint has no complete index.
        PlanMismatchError: The run was trained with other settings.
    """
    subject = open_subject(run)
    names = token_names(_tokenizer(subject))
    return Indexed(subject.index, Decoder(subject.checkpoint), names)


def _tokenizer(subject: Subject) -> Tokenizer | None:
    """Load the model's tokenizer. If it cannot be read, log a warning and return None."""
    try:
        return subject.tokenizer()
    except (CorpusError, ModelError, PlanMismatchError, StoreError) as error:
        logger.warning("tokens are shown as numbers: %s", error)
        return None
