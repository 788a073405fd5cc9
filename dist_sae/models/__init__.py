"""Where activations come from."""

from typing import assert_never

from dist_sae.config import Run
from dist_sae.config.data import (
    ActivationsConfig,
    HuggingFaceModel,
    ModelConfig,
    SyntheticCorpus,
    SyntheticModel,
)
from dist_sae.models.base import ActivationSource, Tokenizer
from dist_sae.models.synthetic import SyntheticSource, SyntheticTokenizer

__all__ = ["ActivationSource", "Tokenizer", "build_source", "build_tokenizer", "check_sites"]


def build_tokenizer(run: Run) -> Tokenizer:
    """The tokenizer of a run's model; loads no weights."""
    match run.model:
        case HuggingFaceModel():
            from dist_sae.models.loading import load_tokenizer  # takes 3 s

            return load_tokenizer(run.model)
        case SyntheticModel():
            assert isinstance(run.corpus, SyntheticCorpus)  # the run file sees to that
            return SyntheticTokenizer(run.corpus.document_rows)
        case _:
            assert_never(run.model)


def check_sites(model: ModelConfig, activations: ActivationsConfig) -> dict[str, int]:
    """The width of each site of a model that can be recorded, in contexts as long.

    Raises:
        ModelError: It cannot.
    """
    match model:
        case HuggingFaceModel():
            from dist_sae.models.check import check  # takes 3 s

            return check(model, activations)
        case SyntheticModel():
            return dict.fromkeys(activations.sites, model.d_in)
        case _:
            assert_never(model)


def build_source(model: ModelConfig, sites: tuple[str, ...]) -> ActivationSource:
    """The model, ready to give activations at `sites`; layers above the deepest are not loaded.

    With `model.tensor_parallel` this rank's part of it. Collective over the default process group.
    """
    match model:
        case HuggingFaceModel():
            from dist_sae.models.huggingface import HuggingFaceSource

            return HuggingFaceSource(model, sites)
        case SyntheticModel():
            return SyntheticSource(model)
        case _:
            assert_never(model)
