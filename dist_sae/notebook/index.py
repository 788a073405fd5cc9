"""A run's latent index, with searches that need the tokenizer or the model."""

from collections.abc import Callable

from dist_sae.errors import ArgumentError
from dist_sae.index.query import Index
from dist_sae.index.search import Match, regex_test, search, token_test
from dist_sae.models import Tokenizer
from dist_sae.notebook.texts import TokenLatents
from dist_sae.storage import ObjectStore


class OpenedIndex(Index):
    """A complete latent index of an opened run. `OpenedRun.index` returns it."""

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
            name: Name of the index. None: the complete index of the latest step.
            tokenizer: Function that loads the model's tokenizer.
            active_on: The method `OpenedRun.active_on`.
        """
        super().__init__(runs, run, name)
        self._tokenizer = tokenizer
        self._active_on = active_on

    def search(
        self, token: str | None = None, *, regex: str | None = None, top: int = 20
    ) -> list[Match]:
        """Find latents by the tokens of their largest activations.

        Latents with the highest share of matching tokens come first. Latents with fewer than 8
        stored largest activations are left out.

        Args:
            token: Text of one token, such as `" dog"`.
            regex: Regular expression to search for in tokens, instead of `token`.
            top: Maximum number of latents.

        Raises:
            ArgumentError: The text is not exactly one token of the model, the pattern is not a
                regular expression, or not exactly one of `token` and `regex` is given.
            ModelError: The tokenizer cannot be loaded.
            CorruptObjectError: A table is damaged.
        """
        if (token is None) == (regex is None):
            raise ArgumentError("search: give either a token or a regex")
        tokenizer = self._tokenizer()
        if token is not None:
            return search(self, token_test(tokenizer, token))[:top]
        assert regex is not None
        return search(self, regex_test(lambda each: tokenizer.text([each])[0], regex))[:top]

    def active_on(self, text: str, top: int = 5) -> list[TokenLatents]:
        """Find the strongest latents on each token of a text, with the index's checkpoint.

        Raises the errors of `OpenedRun.active_on`.
        """
        return self._active_on(text, top, self.manifest.step)
