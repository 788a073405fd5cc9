"""Where activations come from."""

from typing import assert_never

from dist_sae.config.data import ActivationsConfig, HuggingFaceModel, ModelConfig, SyntheticModel
from dist_sae.models.base import ActivationSource, Tokenizer
from dist_sae.models.synthetic import SyntheticSource, SyntheticTokenizer

__all__ = ["ActivationSource", "Tokenizer", "build_source", "build_tokenizer", "check_sites"]


def build_tokenizer(model: ModelConfig, document_rows: int) -> Tokenizer:
    """The tokenizer that goes with a model; loads no weights.

    Args:
        model: The model section.
        document_rows: Rows of a synthetic document.
    """
    match model:
        case HuggingFaceModel():
            from dist_sae.models.loading import load_tokenizer  # takes 3 s

            return load_tokenizer(model)
        case SyntheticModel():
            return SyntheticTokenizer(document_rows)
        case _:
            assert_never(model)


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

    With `model.shards` this rank's part of it; all ranks of the default process group are to do so.
    """
    match model:
        case HuggingFaceModel():
            from dist_sae.models.huggingface import HuggingFaceSource

            return HuggingFaceSource(model, sites)
        case SyntheticModel():
            return SyntheticSource(model)
        case _:
            assert_never(model)
