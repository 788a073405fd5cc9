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
        """Id of the token that can be prepended to a context, or None."""
        ...

    @property
    def special(self) -> frozenset[int]:
        """Ids of tokens without text, such as BOS, EOS and padding."""
        ...

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize each text, without special tokens."""
        ...

    def text(self, tokens: Sequence[int]) -> list[str]:
        """Return the text of each token, for display.

        If several tokens form one character, the first gets the character and the others are empty.
        """
        ...


@runtime_checkable
class ActivationSource(Protocol):
    """A model with activations at named sites."""

    def run(
        self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> dict[str, Float[Tensor, "batch seq d_in"]]:
        """Compute activations at every site, on the model's device.

        Values at padding (where the mask is False) are undefined.
        """
        ...


class JoinedSources:
    """One or two models that run on the same tokens.

    Args:
        sources: Each model with a map from its own names of sites to those of the activation set.
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
