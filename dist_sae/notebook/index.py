"""A run's latent index, with the model's tokenizer at hand."""

from collections.abc import Callable

from dist_sae.errors import ArgumentError
from dist_sae.index.query import Index
from dist_sae.index.search import Match, has_pattern, is_token, search
from dist_sae.models import Tokenizer
from dist_sae.notebook.texts import TokenLatents
from dist_sae.storage import ObjectStore


class OpenedIndex(Index):
    """A complete latent index of an opened run; see `OpenedRun.index`."""

    def __init__(
        self,
        runs: ObjectStore,
        run: str,
        name: str | None,
        *,
        tokenizer: Callable[[], Tokenizer],
        active_on: Callable[[str, int, int], list[TokenLatents]],
    ) -> None:
        """Open an index.

        Args:
            runs: The store of runs.
            run: Name of the run.
            name: Name of the index; None takes the complete one of the last step.
            tokenizer: Loads the model's tokenizer.
            active_on: `OpenedRun.active_on`.
        """
        super().__init__(runs, run, name)
        self._tokenizer = tokenizer
        self._active_on = active_on

    def search(
        self, token: str | None = None, *, regex: str | None = None, top: int = 20
    ) -> list[Match]:
        """Find latents by the tokens of their largest activations; the highest share first.

        Latents with fewer than 8 largest activations are left out.

        Args:
            token: Text of one token, as `" dog"`.
            regex: In place of it: a regular expression that is looked for in tokens.
            top: Most latents.

        Raises:
            ArgumentError: The text is not one token of the model, the pattern not a regular
                expression, or not one of them is given.
            ModelError: The tokenizer is not at hand.
            CorruptObjectError: A table is damaged.
        """
        if (token is None) == (regex is None):
            raise ArgumentError("search: give a token or a regex")
        tokenizer = self._tokenizer()
        if token is not None:
            return search(self, is_token(tokenizer, token))[:top]
        assert regex is not None
        return search(self, has_pattern(lambda each: tokenizer.text([each])[0], regex))[:top]

    def active_on(self, text: str, top: int = 5) -> list[TokenLatents]:
        """Find the strongest latents on each token of a text, by the index's checkpoint.

        Raises: As `OpenedRun.active_on`.
        """
        return self._active_on(text, top, self.manifest.step)
