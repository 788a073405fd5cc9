"""The plan: which documents make up which unit. Made once, never changed.

Everything about the stream of rows follows from the plan, so two processes that hold the same
plan agree on it without talking to each other.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from dist_sae.config import Run, differences
from dist_sae.config.data import DatasetCorpus, HuggingFaceModel
from dist_sae.data.corpus import Corpus, CorpusFile, CorpusIndex, Document, Span
from dist_sae.data.identity import (
    content_changes,
    model_content,
    place_changes,
    plan_settings,
    setting_changes,
)
from dist_sae.data.orders import permutation
from dist_sae.data.shard import DTYPES, existing_units
from dist_sae.errors import (
    CorpusError,
    DataExhaustedError,
    ObjectNotFoundError,
    PlanMismatchError,
)
from dist_sae.storage import ObjectStore
from dist_sae.storage.records import Record, digest, read_record, seal

PLAN_KEY = "plan.json"
_MOST_NAMED = 5  # files in a message


class Plan(Record):
    """`plan.json`. Units `[0, n_train_units)` are for training, the rest is held out."""

    schema_version: Literal[1] = 1
    settings: dict[str, Any]
    """The sections `model`, `corpus` and `activations` of the run file that it was made from."""
    files: tuple[CorpusFile, ...]
    document_rows: float
    """Rows that a document gives on average, estimated from a sample; exclusions not counted."""
    n_train_units: int
    units: tuple[tuple[Span, ...], ...]
    text_checksums: tuple[str, ...] | None = Field(None, exclude_if=lambda of: of is None)
    """Of the documents of each unit; None where there is no text, and in plans of earlier versions.
    """
    model_content: dict[str, str] | None = Field(None, exclude_if=lambda of: of is None)
    """`identity.model_content` when the plan was made; None of a synthetic model, and in plans of
    earlier versions."""
    corpus_commit: str | None = Field(None, exclude_if=lambda of: of is None)
    """Commit of a data set on the hub."""

    @cached_property
    def hash(self) -> str:
        """Identifies the plan; every manifest made under it carries the hash."""
        return digest(self)

    @property
    def streams(self) -> int:
        """Number of canonical streams V."""
        return int(self.settings["activations"]["streams"])

    @property
    def acts_dtype(self) -> torch.dtype:
        """Of rows as they are read: int8 is scaled back to fp32."""
        stored = self.settings["activations"]["dtype"]
        return torch.float32 if stored == "int8" else DTYPES[stored]

    @property
    def window_units(self) -> int:
        """Units of one stream that are mixed row by row."""
        return int(self.settings["activations"]["window_units"])

    @property
    def seed(self) -> int:
        """Decides every order of the rows."""
        return int(self.settings["activations"]["seed"])

    @property
    def train_units(self) -> range:
        """Units that trainers read."""
        return range(self.n_train_units)

    @property
    def heldout_units(self) -> range:
        """Units that only evaluation reads."""
        return range(self.n_train_units, len(self.units))

    @property
    def train_rows_estimate(self) -> int:
        """Rows for training, about; before exclusions by norm."""
        documents = sum(span.count for unit in self.train_units for span in self.units[unit])
        return int(documents * self.document_rows)

    @property
    def sites(self) -> tuple[str, ...]:
        """Where activations are read; a run needs some of them."""
        return tuple(self.settings["activations"]["sites"])

    def stream_units(self, stream: int) -> list[int]:
        """The training units of one canonical stream, in unit order."""
        return list(self.train_units[stream :: self.streams])


def make_plan(
    run: Run, index: CorpusIndex, document_rows: float, model: dict[str, str] | None = None
) -> Plan:
    """Deal the corpus out to units in a seeded random order.

    The number of training units is a multiple of the number of streams, so that all streams
    are of about one length.

    Raises:
        CorpusError: There are too few documents.
    """
    activations = run.activations
    spans = index.spans
    order = permutation(len(spans), activations.seed)
    if run.corpus.kind != "synthetic" and run.corpus.max_documents is not None:
        order = order[: -(-run.corpus.max_documents // spans[0].count)]
    share = activations.heldout_share
    heldout_spans = max(1, round(len(order) * share)) if share else 0
    rows_per_span = document_rows * sum(span.count for span in spans) / len(spans)
    train_spans = len(order) - heldout_spans
    train_rows = train_spans * rows_per_span
    streams = activations.streams
    # documents longer than a unit give fewer, larger units: no unit is without a document
    per_stream = min(round(train_rows / (activations.unit_rows * streams)), train_spans // streams)
    n_train = streams * max(1, per_stream)
    wanted = max(1, round(heldout_spans * rows_per_span / activations.unit_rows))
    n_heldout = min(wanted, heldout_spans)
    if train_spans < streams:
        raise CorpusError(
            f"corpus: {train_spans} documents to train on are too few for {streams} streams; "
            f"give more text or lower activations.streams"
        )
    if train_rows < run.train.batch_rows:
        raise CorpusError(
            f"corpus: about {train_rows:.0f} rows to train on, less than one batch "
            f"(train.batch_rows {run.train.batch_rows}); give more text or lower train.batch_rows"
        )
    dealt = np.array_split(order[:train_spans], n_train)
    if n_heldout:
        dealt += np.array_split(order[train_spans:], n_heldout)
    return Plan(
        settings=plan_settings(run),
        files=index.files,
        document_rows=document_rows,
        n_train_units=n_train,
        units=tuple(tuple(spans[i] for i in unit) for unit in dealt),
        text_checksums=index.checksums(dealt),
        model_content=model,
        corpus_commit=index.commit,
    )


def check_rows(run: Run, plan: Plan, taken: int = 0) -> None:
    """Say at once, not after a week, that the data cannot last.

    Args:
        run: The run.
        plan: Its plan.
        taken: Rows that the runs before it have taken.

    Raises:
        DataExhaustedError: `train.rows` is well above what the plan will give.
    """
    there = plan.train_rows_estimate * run.train.max_passes
    if taken + run.train.rows > 1.05 * there:  # the estimate is good to a few per cent
        after = f" after the {taken} that its parents took" if taken else ""
        raise DataExhaustedError(
            f"train.rows asks for {run.train.rows} rows{after}, but the activation set will have "
            f"about {plan.train_rows_estimate} in one pass (train.max_passes "
            f"{run.train.max_passes}); lower train.rows, raise train.max_passes or add text"
        )


def publish_plan(store: ObjectStore, plan: Plan) -> Plan:
    """Put the plan in place, unless one of the same settings, text and model is there already.

    Returns:
        The plan that is there: `plan` itself if this call created it.

    Raises:
        PlanMismatchError: Another plan is there.
    """
    if store.put(PLAN_KEY, seal(plan), if_absent=True):
        return plan
    there = _read(store)
    if changed := setting_changes(there.settings, plan.settings) or _content_changes(there, plan):
        raise _mismatch(store, changed)
    return there


def load_plan(store: ObjectStore, run: Run) -> Plan:
    """The plan in the store, checked against the run file.

    Raises:
        PlanMismatchError: There is none, or it was made from other settings.
    """
    try:
        plan = _read(store)
    except ObjectNotFoundError as exc:
        raise PlanMismatchError(
            f"{store.url}: holds no plan yet; run `dist-sae plan` first"
        ) from exc
    changed = setting_changes(plan.settings, plan_settings(run)) or place_changes(
        plan.settings, plan.files, plan.model_content, run
    )
    if changed:
        raise _mismatch(store, changed)
    return plan


def read_unit(corpus: Corpus, plan: Plan, unit: int) -> list[Document]:
    """The documents of a unit.

    Raises:
        CorpusError: They are not what was planned.
    """
    checksum = None if plan.text_checksums is None else plan.text_checksums[unit]
    return corpus.read(plan.files, plan.units[unit], checksum)


def as_planned(run: Run, plan: Plan) -> Run:
    """The run as producers of the whole set see it.

    All sites of the set, and what the hub had when the plan was made, whatever it has now.
    """
    model, corpus = run.model, run.corpus
    commit = (plan.model_content or {}).get("commit")
    if isinstance(model, HuggingFaceModel) and commit:
        model = model.model_copy(update={"revision": commit})
    if isinstance(corpus, DatasetCorpus) and plan.corpus_commit:
        corpus = corpus.model_copy(update={"revision": plan.corpus_commit})
    activations = run.activations.model_copy(update={"sites": plan.sites})
    train = run.train.model_copy(update={"site": run.site})
    return run.model_copy(
        update={"model": model, "corpus": corpus, "activations": activations, "train": train}
    )


def check_model(run: Run, plan: Plan) -> None:
    """Compare all of the run's model with the one that the plan was made for.

    Raises:
        PlanMismatchError: It is another one.
    """
    there = plan.model_content
    changed = there and content_changes(there, model_content(run.model))
    if changed:
        assert isinstance(run.model, HuggingFaceModel)
        raise PlanMismatchError(
            f"model.path {run.model.path}: is not the model that the plan was made for "
            f"({', '.join(changed)} differ); restore it or give store.activations another place"
        )


def _content_changes(there: Plan, made: Plan) -> list[str]:
    """How text and model differ from those of a plan of the same settings."""
    changed = []
    if there.text_checksums is None and there.settings["corpus"]["kind"] == "dataset":
        # a plan of an earlier version knows the name alone
        changed += differences(there.settings["corpus"], made.settings["corpus"], "corpus.")
    else:
        changed += _file_changes(there.files, made.files)
    if there.model_content is None:
        changed += differences(there.settings["model"], made.settings["model"], "model.")
    elif names := content_changes(there.model_content, made.model_content):
        changed.append(f"the model has changed: {', '.join(names)}")
    return changed


def _file_changes(there: Sequence[CorpusFile], here: Sequence[CorpusFile]) -> list[str]:
    """What has become of the corpus files; their order and places do not matter."""
    counts = Counter(file.fingerprint for file in here)
    counts.subtract(Counter(file.fingerprint for file in there))
    gone = {file.name for file in there if counts[file.fingerprint] < 0}
    new = {file.name for file in here if counts[file.fingerprint] > 0}
    changes = [
        *(f"{name} has changed" for name in sorted(gone & new)),
        *(f"{name} is gone" for name in sorted(gone - new)),
        *(f"{name} is new" for name in sorted(new - gone)),
    ]
    more = [f"{len(changes) - _MOST_NAMED} more"] * (len(changes) > _MOST_NAMED)
    named = ", ".join(changes[:_MOST_NAMED] + more)
    return [f"the corpus files have changed: {named}"] if changes else []


def _mismatch(store: ObjectStore, changed: list[str]) -> PlanMismatchError:
    remedy = "restore the setting or give store.activations another place"
    if next(existing_units(store), None) is None:
        remedy = f"nothing was produced under it yet: delete {PLAN_KEY} there to plan anew"
    return PlanMismatchError(f"{store.url}: holds another plan ({'; '.join(changed)}); {remedy}")


def _read(store: ObjectStore) -> Plan:
    return read_record(Plan, store, PLAN_KEY)
