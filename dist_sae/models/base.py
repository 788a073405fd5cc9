"""Interfaces of models and tokenizers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor


@runtime_checkable
class Tokenizer(Protocol):
    """Converts texts to token ids."""

    @property
    def bos(self) -> int | None:
        """Id of the token that may begin a context, or None."""
        ...

    @property
    def special(self) -> frozenset[int]:
        """Ids of tokens without text: BOS, EOS, pad and the like."""
        ...

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize each text, without special tokens."""
        ...

    def text(self, tokens: Sequence[int]) -> list[str]:
        """Text of each token, for readers.

        If several tokens form one character, the first gets it and the others are empty.
        """
        ...


@runtime_checkable
class ActivationSource(Protocol):
    """A model with activations at named sites."""

    def run(
        self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> dict[str, Float[Tensor, "batch seq d_in"]]:
        """Compute activations at every site, on the model's device.

        Values at padding (mask False) are undefined.
        """
        ...


class JoinedSources:
    """One or two models that are run on the same tokens.

    Args:
        sources: Each model with its sites: the set's name of a site by its name in the model.
    """

    def __init__(self, sources: Iterable[tuple[ActivationSource, Mapping[str, str]]]) -> None:
        self._sources = list(sources)

    def run(
        self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> dict[str, Float[Tensor, "batch seq d_in"]]:
        return {
            names[own]: acts
            for source, names in self._sources
            for own, acts in source.run(tokens, mask).items()
        }
