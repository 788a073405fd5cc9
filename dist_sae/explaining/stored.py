"""Sets of explanations, which are stored in the folder of their index.

    <index>/explanations/<name>.json              sealed: the settings, and the table's key
                         <name>-<sha256>.parquet  a line per latent, in ascending order

`endpoint/answers.py` stores the answers of language models, so a lost table can be rebuilt without
sending a request.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field

from dist_sae.errors import ArgumentError, ConfigError, ObjectNotFoundError
from dist_sae.explaining.scoring import KINDS, Verdict, score
from dist_sae.index.latent_table import LatentTable
from dist_sae.index.layout import Stored, read_table, store_table, to_parquet
from dist_sae.index.query import Index
from dist_sae.storage.keys import KeyPattern
from dist_sae.storage.records import Record, read_record, seal

_GROUP_ROWS = 256
_NAME = r"(?P<name>[a-z0-9][a-z0-9.-]*)\.json"


class SetSettings(Record):
    """The settings of a set of explanations."""

    explainer: str
    """Name of the model that explains, or of the library that the set was imported from."""
    judge: str
    checkpoint: str
    """Digest of the checkpoint."""
    prompts: int
    """Version of the prompts; 0 for another library's prompts."""
    settings: dict[str, int] = Field(default_factory=dict)
    """Number and length of passages (`PassageSettings`), and the number judged per request
    (`at_once`)."""
    seed: int = 0


class SetRecord(Record):
    """The content of `<name>.json`."""

    schema_version: Literal[1] = 1
    made: SetSettings
    table: Stored


class LatentExplanation(NamedTuple):
    """The explanation of a latent, and the verdicts on it."""

    latent: int
    explanation: str | None
    why_none: str
    """Reason why there is no explanation; empty if there is one."""
    judged: Sequence[Verdict]


class ExplanationSet:
    """A set of explanations of an index.

    Args:
        index: The index.
        name: Name of the set.

    Raises:
        ArgumentError: The name is not valid.
    """

    def __init__(self, index: Index, name: str) -> None:
        if not re.fullmatch(_NAME, f"{name}.json", re.ASCII):
            raise ArgumentError(f"--name {name}: use lower-case letters, digits, '-' and '.'")
        self.name = name
        self._store = index.store
        self._folder = _folder(index)
        self._key = f"{self._folder}{name}.json"
        self._record: SetRecord | None = None
        self._table: LatentTable | None = None

    @property
    def place(self) -> str:
        """Path or URL of the set's record."""
        return f"{self._store.url}/{self._key}"

    def record(self) -> SetRecord | None:
        """Read the set's record. Return None if the set does not exist yet.

        Raises:
            CorruptObjectError: The record is damaged.
        """
        if self._record is None:
            try:
                self._record = read_record(
                    SetRecord, self._store, self._key, f"delete {self.place}", self._folder
                )
            except ObjectNotFoundError:
                return None
            self._table = LatentTable(self._store, self._record.table)
        return self._record

    def check(self, settings: SetSettings) -> None:
        """Check that explanations with these settings may be added to the set.

        Raises:
            ConfigError: The set exists, and has other settings.
        """
        there = self.record()
        for field in SetSettings.model_fields if there else ():
            assert there is not None
            was, now = getattr(there.made, field), getattr(settings, field)
            if was != now:
                raise ConfigError(
                    f"{self.place}: was created with {field} {_shown(was)}, not {_shown(now)}; "
                    f"choose another --name"
                )

    def add(self, settings: SetSettings, explained: Iterable[LatentExplanation]) -> None:
        """Add explanations, and replace earlier explanations of the same latents.

        Raises:
            ConfigError: The set exists, and has other settings.
        """
        self.check(settings)
        there = self.record()
        rows = {each.latent: _row(each) for each in explained}
        if there is not None:
            old = read_table(self._store, there.table).to_pylist()
            rows = {row["latent"]: row for row in old} | rows
        table = pa.Table.from_pylist([rows[latent] for latent in sorted(rows)], schema=_TABLE)
        stem = f"{self._folder}{self.name}"
        stored = store_table(self._store, stem, to_parquet(table, _GROUP_ROWS))
        self._store.put(self._key, seal(SetRecord(made=settings, table=stored)))
        if there is not None and there.table.key != stored.key:
            self._store.delete(there.table.key)
        self._record = None

    def get(self, latent: int) -> LatentExplanation | None:
        """Read the explanation of a latent. Return None if the set does not have the latent.

        Raises:
            CorruptObjectError: The set is damaged.
        """
        if self.record() is None or self._table is None:
            return None
        rows = pa.concat_tables(self._table.of(latent)).to_pylist()
        return _explained(rows[0]) if rows else None

    def all(self) -> list[LatentExplanation]:
        """Read the explanations of all latents. Raises the errors of `get`."""
        there = self.record()
        return [] if there is None else list(map(_explained, self.table().to_pylist()))

    def table(self) -> pa.Table:
        """Read the table of an existing set. Raises the errors of `get`."""
        there = self.record()
        assert there is not None
        return read_table(self._store, there.table)


def sets(index: Index) -> list[ExplanationSet]:
    """List an index's sets of explanations."""
    keys = KeyPattern(_folder(index), _NAME)
    found = (keys.parse(key) for key in index.store.keys(_folder(index)))
    return [ExplanationSet(index, match["name"]) for match in found if match]


def _folder(index: Index) -> str:
    return f"{index.folder.prefix}explanations/"


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={one}" for key, one in sorted(value.items()))
    return str(value)


_NUMBERS = ("balanced_accuracy", "low", "high", "f1", "near_specificity")
_TABLE = pa.schema(
    [
        ("latent", pa.int32()),
        ("explanation", pa.string()),
        ("why_none", pa.string()),
        *((name, pa.float64()) for name in _NUMBERS),
        *((f"{kind}_{what}", pa.int32()) for kind in KINDS for what in ("yes", "passages")),
        ("unanswered", pa.int32()),
        (
            "judged",
            pa.list_(
                pa.struct(
                    [
                        ("kind", pa.string()),
                        ("decile", pa.int8()),
                        ("yes", pa.bool_()),
                        ("document", pa.int64()),
                        ("position", pa.int32()),
                    ]
                )
            ),
        ),
    ]
)
"""Schema of the table: first the columns for readers, then the verdict on each passage."""


def _row(each: LatentExplanation) -> dict[str, Any]:
    scores = score(each.judged)
    row: dict[str, Any] = {
        "latent": each.latent,
        "explanation": each.explanation,
        "why_none": each.why_none,
        "unanswered": scores.unanswered,
        "judged": [judged._asdict() for judged in each.judged],
        **{name: getattr(scores, name) for name in _NUMBERS},
    }
    for kind in KINDS:
        counts = getattr(scores, kind)
        row |= {f"{kind}_yes": counts.yes, f"{kind}_passages": counts.of}
    return row


def _explained(row: dict[str, Any]) -> LatentExplanation:
    judged = [Verdict(**each) for each in row["judged"]]
    return LatentExplanation(row["latent"], row["explanation"], row["why_none"], judged)
