"""What producers need of a model."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor


@runtime_checkable
class Tokenizer(Protocol):
    """Texts to token ids."""

    @property
    def bos(self) -> int | None:
        """The id that may begin a context, or None."""
        ...

    @property
    def special(self) -> frozenset[int]:
        """Ids that stand for no text: BOS, EOS, pad and the like."""
        ...

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        ...

    def text(self, tokens: Sequence[int]) -> list[str]:
        """Each token as a reader would see it.

        Where several tokens make up one character the first has all of it, the others are empty.
        """
        ...


@runtime_checkable
class ActivationSource(Protocol):
    """A model cut open at named sites."""

    def run(
        self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> dict[str, Float[Tensor, "batch seq d_in"]]:
        """Activations at every site, on the model's device.

        What stands at padding (mask False) means nothing.
        """
        ...
