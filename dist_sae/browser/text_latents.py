"""The latents that fire on a pasted text, and where they fire."""

from typing import NamedTuple

from dist_sae.index.texts import Token
from dist_sae.notebook.texts import TokenLatents

TOP = 8
"""Number of latents that are shown per token, and for the whole text."""


class PeakActivation(NamedTuple):
    """A latent's largest activation on a text."""

    latent: int
    act: float
    token: str
    """The token with that activation."""


class TextLatents:
    """The latents that fire on each token of a text.

    Args:
        tokens: The tokens, each with its active latents, strongest first.
    """

    def __init__(self, tokens: list[TokenLatents]) -> None:
        self.tokens = tokens
        peaks: dict[int, PeakActivation] = {}
        for token, latents, acts in tokens:
            for latent, act in zip(latents, acts, strict=True):
                if latent not in peaks or act > peaks[latent].act:
                    peaks[latent] = PeakActivation(latent, act, token)
        self.strongest = sorted(peaks.values(), key=lambda each: (-each.act, each.latent))[:TOP]
        """The latents with the largest activations on the text."""
        self.n_latents = len(peaks)
        """Number of latents that fire on the text."""

    def acts(self, latent: int) -> list[Token]:
        """Return the text with the activations of one latent."""
        return [
            Token(token, dict(zip(latents, acts, strict=True)).get(latent, 0.0), in_context=True)
            for token, latents, acts in self.tokens
        ]
