"""The text around rows, with a latent's activations."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from dist_sae.config import Run
from dist_sae.data.plan import Plan, pin_to_plan
from dist_sae.data.planned_text import PlannedText
from dist_sae.errors import CorpusError
from dist_sae.models import Tokenizer, build_tokenizer
from dist_sae.storage import open_store

CONTEXT_TOKENS = 24
"""Default number of tokens shown on either side of a firing."""
# a character has at most four bytes in UTF-8, each of which may be a token
_CHARACTER_TOKENS = 3


class Place(NamedTuple):
    """The place of a token in the corpus."""

    document: int
    position: int
    token: int


class Token(NamedTuple):
    """A token's text and the latent's activation on it."""

    text: str
    act: float
    """Activation of the latent. Also 0 if the row is not in the activation set."""
    in_context: bool
    """Whether the model saw the token in the same context as the example's peak."""


class Example(NamedTuple):
    """A firing of a latent, with the text around it."""

    act: float
    document: int
    position: int
    tokens: list[Token]
    peak: int
    """Index in `tokens` of the token that the firing is on."""


class Texts:
    """The tokens of documents, as text.

    Args:
        run: The run.
        plan: The run's plan, which locates every document.
    """

    def __init__(self, run: Run, plan: Plan) -> None:
        run = pin_to_plan(run, plan)
        self.tokenizer: Tokenizer = build_tokenizer(run)
        has_bos = run.activations.prepend_bos and self.tokenizer.bos is not None
        self.context_tokens = run.activations.context_tokens - has_bos
        store = open_store(run.store.activations, run.store.s3)
        self._text = PlannedText(run, plan, store)
        self._known: dict[int, list[int]] = {}

    def read(self, unit: int, documents: Iterable[int]) -> None:
        """Read and tokenize some documents of a unit, unless they are in memory."""
        wanted = set(documents) - self._known.keys()
        if not wanted:
            return
        found = [d for d in self._text.read(unit) if d.number in wanted]
        for document, ids in zip(found, self.tokenizer([d.text for d in found]), strict=True):
            self._known[document.number] = ids

    def forget(self, most: int = 0) -> None:
        """Drop all documents if there are more than `most`."""
        if len(self._known) > most:
            self._known.clear()

    def tokens(self, document: int) -> list[int]:
        """Return the token ids of a document. They are empty if `read` has not read it."""
        return self._known.get(document, [])


def build_example(
    place: Place, known: Mapping[tuple[int, int], float], texts: Texts, reach: int = CONTEXT_TOKENS
) -> Example:
    """Build the text around a token, with the latent's activations.

    Args:
        place: The token in the middle, on which the latent fires.
        known: Activations of the latent by (document, position).
        texts: Texts that have read the document.
        reach: Number of tokens on either side.

    Raises:
        CorpusError: The document differs from the one that the activations were computed from.
    """
    document, position, token = place
    ids = texts.tokens(document)
    if position >= len(ids) or ids[position] != token:
        raise CorpusError(
            f"corpus: document {document} is not the text that the activations were computed from; "
            f"restore the files that the plan names"
        )
    start = max(0, position - reach)
    window = range(start, min(len(ids), position + reach + 1))
    context = position // texts.context_tokens
    tokens: list[Token] = []
    peak = 0
    for number, text in zip(window, token_texts(ids, window, texts.tokenizer), strict=True):
        act = known.get((document, number), 0.0)
        if text or not tokens:
            tokens.append(Token(text or "\ufffd", act, number // texts.context_tokens == context))
        else:  # the text of this token is part of the one before
            tokens[-1] = tokens[-1]._replace(act=max(tokens[-1].act, act))
        if number == position:
            peak = len(tokens) - 1
    return Example(known[document, position], document, position, tokens, peak)


def token_texts(ids: Sequence[int], window: range, tokenizer: Tokenizer) -> list[str]:
    """Return the text of each token of a window. Characters that cross its ends are not cut.

    If several tokens form one character, the first token gets it and the others are empty.
    """
    first = max(0, window.start - _CHARACTER_TOKENS)
    found = tokenizer.text(ids[first : window.stop + _CHARACTER_TOKENS])
    return found[window.start - first :][: len(window)]
