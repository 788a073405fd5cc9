"""A sample of latents for the report, each with the texts that activate it most."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_sae.config import Run
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.consumers import kept_units
from dist_sae.data.corpus import Corpus
from dist_sae.data.orders import permutation
from dist_sae.data.plan import Plan, as_planned, read_unit
from dist_sae.data.shard import read_block
from dist_sae.dictionaries.interface import Inference
from dist_sae.errors import CorpusError, ObjectNotFoundError
from dist_sae.kernels import Entries
from dist_sae.models import Tokenizer, build_tokenizer

logger = logging.getLogger(__name__)

_MOST_ROWS = 200_000
MOST_ENTRIES = 20_000_000
"""Limit of the entries, of 12 bytes, where a recipe has no bound on them."""
ENCODE_ROWS = 4096
"""Rows that are encoded at a time."""
_LEAST_FIRINGS = 8
_EXAMPLES = 6
_CONTEXT_TOKENS = 24  # on either side
_CHARACTER_TOKENS = 3  # a character has at most four bytes in UTF-8, each perhaps a token
_SPARK_BARS = 16


class Token(NamedTuple):
    """A token's text and the latent's activation on it."""

    text: str
    act: float
    """Activation; 0 also if the row is not in the activation set."""
    in_context: bool
    """True if the token is in the example's context."""


class Example(NamedTuple):
    """One firing, with the text around it."""

    act: float
    document: int
    position: int
    tokens: list[Token]
    peak: int
    """Index in `tokens` of the token with the activation."""


class LatentView(NamedTuple):
    """A latent in the report. Activations are in the scale of the checkpoint."""

    latent: int
    firings: int
    density: float
    max_act: float
    counts: list[int]
    """Firings by activation, in equal steps from 0 to `max_act`."""
    examples: list[Example]


class Firings(NamedTuple):
    """The rows that were read, and the latents that fired on them."""

    units: Int[Tensor, " rows"]
    tokens: Int[Tensor, " rows"]
    positions: Int[Tensor, " rows"]
    documents: Int[Tensor, " rows"]
    acts: Float[Tensor, " entries"]
    """Active entries of all rows."""
    latents: Int[Tensor, " entries"]
    rows: Int[Tensor, " entries"]


def view_latents(
    run: Run, activation_set: ActivationSet, sae: Inference, scale: float
) -> tuple[list[LatentView], int]:
    """View a sample of latents over the whole range of densities; returns the rows read as well.

    Args:
        run: The run.
        activation_set: Units that are not there are passed over.
        sae: The dictionary.
        scale: What activations are multiplied by before they are encoded.

    Raises:
        CorpusError: The text is gone, or is not what the activations were made from.
    """
    firings = read_firings(activation_set, sae, scale, min(_MOST_ROWS, max(run.evaluate.rows, 1)))
    rows = len(firings.tokens)
    if not rows or not run.evaluate.latents:
        return [], rows
    counts = torch.bincount(firings.latents, minlength=run.sae.n_latents)
    texts = Texts(run, activation_set.plan)
    chosen = choose_latents(counts, run.evaluate.latents, run.train.seed)
    return [_view(latent, firings, texts) for latent in chosen], rows


def read_firings(
    activation_set: ActivationSet, sae: Inference, scale: float, most_rows: int
) -> Firings:
    """Encode rows, held-out ones first, until there are enough rows or active entries."""
    parts: list[Firings] = []
    rows = entries = 0
    plan = activation_set.plan
    for unit in [*plan.heldout_units, *kept_units(activation_set.store, plan)]:
        if rows >= most_rows or entries >= MOST_ENTRIES:
            break
        try:
            shard = activation_set.shard(activation_set.manifest(unit))
        except ObjectNotFoundError:
            continue
        for number in range(len(shard.blocks)):
            if rows >= most_rows or entries >= MOST_ENTRIES:
                break
            block = read_block(activation_set.store, shard, number)
            which = torch.full_like(block.tokens, unit)
            for start in range(0, len(which), ENCODE_ROWS):
                if entries >= MOST_ENTRIES:
                    break
                here = slice(start, start + ENCODE_ROWS)
                acts, latents, where = _active(sae, block.acts[here].float() * scale)
                names = [column[here] for column in (which, *block[1:])]
                parts.append(Firings._make([*names, acts, latents, where + rows]))
                rows += len(names[0])
                entries += len(acts)
    if not parts:
        empty = torch.zeros(0, dtype=torch.int32)
        return Firings(empty, empty, empty, empty, empty.float(), empty, empty)
    return Firings(*map(torch.cat, zip(*parts, strict=True)))


def _active(sae: Inference, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, latents and rows of the active entries."""
    codes = sae.encode(x)
    entries = Entries(codes.latents, codes.starts, sae.n_latents)
    on = codes.acts > 0
    return codes.acts[on], entries.latents[on].int(), entries.rows[on].int()


def choose_latents(counts: Int[Tensor, " n_latents"], n: int, seed: int) -> list[int]:
    """Choose `n` latents that fire, spread evenly over log density; densest first."""
    shuffled = torch.from_numpy(permutation(len(counts), seed, 5))  # so that ties are no bias
    able = shuffled[counts[shuffled] >= _LEAST_FIRINGS]
    able = able[counts[able].argsort(descending=True, stable=True)]
    if len(able) <= n:
        return [int(latent) for latent in able]
    density = counts[able].double().log()
    chosen: list[int] = []
    for target in torch.linspace(float(density[0]), float(density[-1]), n):
        distance = (density - target).abs()
        distance[chosen] = math.inf
        nearest = (distance <= distance.min() + 1e-9).nonzero()[:, 0]
        chosen.append(int(nearest[0]))
    return [int(able[i]) for i in sorted(chosen)]


class Texts:
    """The tokens of documents, as text.

    Args:
        run: The run.
        plan: Its plan, which knows where every document lies.
    """

    def __init__(self, run: Run, plan: Plan) -> None:
        run = as_planned(run, plan)
        self.tokenizer: Tokenizer = build_tokenizer(run)
        has_bos = run.activations.prepend_bos and self.tokenizer.bos is not None
        self.context_tokens = run.activations.context_tokens - has_bos
        self._plan = plan
        self._corpus = Corpus(run.corpus, run.store.s3)
        self._known: dict[int, list[int]] = {}

    def read(self, unit: int, documents: Iterable[int]) -> None:
        """Add the documents of a unit."""
        wanted = set(documents) - self._known.keys()
        if not wanted:
            return
        found = [d for d in read_unit(self._corpus, self._plan, unit) if d.number in wanted]
        for document, ids in zip(found, self.tokenizer([d.text for d in found]), strict=True):
            self._known[document.number] = ids

    def tokens(self, document: int) -> list[int]:
        """Token ids of an added document."""
        return self._known.get(document, [])


def _view(latent: int, firings: Firings, texts: Texts) -> LatentView:
    hit = firings.latents == latent
    rows, acts = firings.rows[hit].long(), firings.acts[hit]
    order = rows[acts.argsort(descending=True, stable=True)]
    top = list(_apart(order.tolist(), firings))[:_EXAMPLES]
    for row in top:
        texts.read(int(firings.units[row]), [int(firings.documents[row])])
    near = torch.isin(firings.documents[rows], firings.documents[top])
    known = {
        (int(firings.documents[row]), int(firings.positions[row])): act
        for row, act in zip(rows[near].tolist(), acts[near].tolist(), strict=True)
    }
    max_act = float(acts.max())
    return LatentView(
        latent=latent,
        firings=len(rows),
        density=len(rows) / len(firings.tokens),
        max_act=max_act,
        counts=[int(c) for c in torch.histc(acts, _SPARK_BARS, 0.0, max_act)],
        examples=[build_example(row, firings, known, texts) for row in top],
    )


def _apart(rows: Sequence[int], firings: Firings) -> Iterator[int]:
    """Rows whose texts do not overlap with an earlier row's."""
    seen: dict[int, list[int]] = {}
    for row in rows:
        position = int(firings.positions[row])
        others = seen.setdefault(int(firings.documents[row]), [])
        if all(abs(position - other) > 2 * _CONTEXT_TOKENS for other in others):
            others.append(position)
            yield row


def build_example(
    row: int, firings: Firings, known: dict[tuple[int, int], float], texts: Texts
) -> Example:
    """Build the text around a row, with the latent's activations.

    Args:
        row: Index into `firings`; the text's peak.
        firings: Rows and where they come from.
        known: Activations of the latent by (document, position).
        texts: Tokens of documents.

    Raises:
        CorpusError: The document is not the one that the activations were made from.
    """
    document, position = int(firings.documents[row]), int(firings.positions[row])
    ids = texts.tokens(document)
    if position >= len(ids) or ids[position] != int(firings.tokens[row]):
        raise CorpusError(
            f"corpus: document {document} is not the text that the activations were made from; "
            f"restore the files that the plan names"
        )
    start = max(0, position - _CONTEXT_TOKENS)
    window = range(start, min(len(ids), position + _CONTEXT_TOKENS + 1))
    context = position // texts.context_tokens
    tokens: list[Token] = []
    peak = 0
    for place, text in zip(window, _texts(ids, window, texts.tokenizer), strict=True):
        act = known.get((document, place), 0.0)
        if text or not tokens:
            tokens.append(Token(text or "\ufffd", act, place // texts.context_tokens == context))
        else:  # its text is part of the token before
            tokens[-1] = tokens[-1]._replace(act=max(tokens[-1].act, act))
        if place == position:
            peak = len(tokens) - 1
    return Example(known[document, position], document, position, tokens, peak)


def _texts(ids: Sequence[int], window: range, tokenizer: Tokenizer) -> list[str]:
    """Text of each token; characters that cross the ends of the window are whole."""
    first = max(0, window.start - _CHARACTER_TOKENS)
    found = tokenizer.text(ids[first : window.stop + _CHARACTER_TOKENS])
    return found[window.start - first :][: len(window)]
