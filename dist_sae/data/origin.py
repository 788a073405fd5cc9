"""Comparison of stored rows with the text of the corpus."""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from dist_sae.data.corpus import Document
from dist_sae.data.shard import SiteRows, UnitManifest
from dist_sae.data.tokens import cut


class UnitText:
    """The tokens of a unit's documents.

    Args:
        tokenize: The model's tokenizer. A text that it refuses has no tokens.
        context_tokens: Maximum length of a context.
        bos: Token that begins each context, if any.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenize: Callable[[Sequence[str]], list[list[int]]],
        *,
        context_tokens: int,
        bos: int | None,
    ) -> None:
        skip = 0 if bos is None else 1
        found: dict[int, list[int]] = {}
        self._n_tokens = 0
        """Number of tokens in all contexts, including BOS."""
        for context in cut(
            documents, tokenize, context_tokens=context_tokens, bos=bos, failed=lambda *_: None
        ):
            found.setdefault(context.document, []).extend(context.tokens[skip:])
            self._n_tokens += len(context.tokens)
        numbers = sorted(found)
        self._numbers = torch.tensor(numbers, dtype=torch.int64)
        self._lengths = torch.tensor([len(found[number]) for number in numbers])
        self._starts = self._lengths.cumsum(0) - self._lengths
        self._tokens = torch.tensor([token for number in numbers for token in found[number]])

    def manifest_fault(self, manifest: UnitManifest) -> str | None:
        """Describe the manifest's number of rows if it is wrong; return None if it is right."""
        left_out = sum(n for reason, n in manifest.excluded.items() if reason != "padding")
        if manifest.rows + left_out == self._n_tokens:
            return None
        return (
            f"has {manifest.rows} rows and {left_out} excluded ones, "
            f"but the text has {self._n_tokens} tokens"
        )

    def rows_fault(self, blocks: Iterable[SiteRows]) -> str | None:
        """Describe the first wrong row of a unit at one site; return None if all are right."""
        places: list[Int[Tensor, " rows"]] = []
        for rows in blocks:
            documents, positions = rows.documents.long(), rows.positions.long()
            number = torch.searchsorted(self._numbers, documents).clamp(max=len(self._numbers) - 1)
            inside = (self._numbers[number] == documents) & (positions >= 0)
            inside &= positions < self._lengths[number]
            place = (self._starts[number] + positions).where(inside, 0)
            wrong = ~inside | (self._tokens[place] != rows.tokens)
            if wrong.any():
                row = int(wrong.nonzero()[0])
                return (
                    f"was produced from other text: its token {int(rows.tokens[row])} is not "
                    f"that of document {int(documents[row])} at position {int(positions[row])}"
                )
            places.append(place)
        if not any(map(len, places)):
            return None
        everything = torch.cat(places)
        twice = int(torch.bincount(everything).max()) > 1
        return "contains a row twice" if twice else None
