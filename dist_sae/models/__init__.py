"""Sources of activations: language models and synthetic ones."""

from typing import assert_never

from dist_sae.config import Run
from dist_sae.config.data import (
    ActivationsConfig,
    HuggingFaceModel,
    ModelConfig,
    SyntheticCorpus,
    SyntheticModel,
)
from dist_sae.models.base import ActivationSource, JoinedSources, Tokenizer
from dist_sae.models.synthetic import SyntheticSource, SyntheticTokenizer

__all__ = ["ActivationSource", "Tokenizer", "build_source", "build_tokenizer", "check_sites"]


def build_tokenizer(run: Run) -> Tokenizer:
    """Build the tokenizer of a run's model, without loading weights."""
    match run.model:
        case HuggingFaceModel():
            from dist_sae.models.loading import load_tokenizer  # importing this takes 3 s

            return load_tokenizer(run.model)
        case SyntheticModel():
            assert isinstance(run.corpus, SyntheticCorpus)  # `Run` has validated this
            return SyntheticTokenizer(run.corpus.document_rows)
        case _:
            assert_never(run.model)


def check_sites(model: ModelConfig, activations: ActivationsConfig) -> dict[str, int]:
    """Check that a model can be recorded with these settings, and return the width of each site.

    Raises:
        ModelError: The model cannot be recorded.
    """
    match model:
        case HuggingFaceModel():
            from dist_sae.models.check import check, check_same_tokens  # importing this takes 3 s

            check_same_tokens(model)
            widths: dict[str, int] = {}
            for part, sites in model.by_model(activations.sites):
                found = check(part, activations.model_copy(update={"sites": tuple(sites)}))
                widths |= {sites[name]: width for name, width in found.items()}
            return {site: widths[site] for site in activations.sites}
        case SyntheticModel():
            return dict.fromkeys(activations.sites, model.d_in)
        case _:
            assert_never(model)


def build_source(model: ModelConfig, sites: tuple[str, ...]) -> ActivationSource:
    """Load the model up to the deepest of `sites`, to compute activations there.

    With `model.tensor_parallel`, loads this rank's part. Collective over the default process group.
    """
    match model:
        case HuggingFaceModel():
            from dist_sae.models.huggingface import HuggingFaceSource

            return JoinedSources(
                (HuggingFaceSource(part, tuple(own)), own) for part, own in model.by_model(sites)
            )
        case SyntheticModel():
            return SyntheticSource(model)
        case _:
            assert_never(model)
