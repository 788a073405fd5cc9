"""The plan, which assigns documents to units. It is created once and never changed.

The plan determines the whole stream of rows, so two processes with the same plan agree on the
stream without communicating.
"""

from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field

from dist_sae.config import Run, differences, sections_of, validate_run
from dist_sae.config.data import DatasetCorpus, HuggingFaceModel
from dist_sae.data.corpus import CorpusIndex, Span
from dist_sae.data.corpus_files import CorpusFile
from dist_sae.data.identity import (
    content_changes,
    file_changes,
    model_content,
    path_changes,
    plan_settings,
    setting_changes,
)
from dist_sae.data.shard import DTYPES, existing_units
from dist_sae.errors import DataExhaustedError, ObjectNotFoundError, PlanMismatchError
from dist_sae.storage import ObjectStore, open_store
from dist_sae.storage.model_files import evict, name_or_path
from dist_sae.storage.records import Record, digest, read_record, seal

PLAN_KEY = "plan.json"
_MOST_NORMALISER_ROWS = 1_000_000


class Plan(Record):
    """Content of `plan.json`. Units `[0, n_train_units)` are for training, the rest held out."""

    schema_version: Literal[1] = 1
    settings: dict[str, Any]
    """Sections `model`, `corpus` and `activations` of the run file that the plan was made from."""
    files: tuple[CorpusFile, ...]
    document_rows: float
    """Estimated average rows of a document, before exclusions by norm."""
    n_train_units: int
    units: tuple[tuple[Span, ...], ...]
    text_checksums: tuple[str, ...] | None = Field(None, exclude_if=lambda of: of is None)
    """Checksum of each unit's documents; None without text, and in plans of earlier versions."""
    texts_stored: bool = Field(default=False, exclude_if=lambda of: not of)
    """Whether the activation set contains the documents of all units; see `data.planned_text`."""
    model_content: dict[str, str] | None = Field(None, exclude_if=lambda of: of is None)
    """`identity.model_content` when the plan was made; None for a synthetic model, and in plans of
    earlier versions."""
    corpus_commit: str | None = Field(None, exclude_if=lambda of: of is None)
    """Commit of a data set on the hub."""
    unit_rows: tuple[int, ...] | None = Field(None, exclude_if=lambda rows: rows is None)
    """Estimated rows of each unit. None in old plans, whose units have equal numbers of documents.
    The key is then left out, because it would change the hash of an old plan."""

    @cached_property
    def hash(self) -> str:
        """Hash that identifies the plan; every manifest produced under the plan contains it."""
        return digest(self)

    @property
    def streams(self) -> int:
        """Number of canonical streams V."""
        return int(self.settings["activations"]["streams"])

    @property
    def acts_dtype(self) -> torch.dtype:
        """Data type of the rows as they are read; int8 is scaled back to fp32."""
        stored = self.settings["activations"]["dtype"]
        return torch.float32 if stored == "int8" else DTYPES[stored]

    @property
    def window_units(self) -> int:
        """Units of one stream that are mixed row by row."""
        return int(self.settings["activations"]["window_units"])

    @property
    def seed(self) -> int:
        """Seed of all random orders of the rows."""
        return int(self.settings["activations"]["seed"])

    @property
    def train_units(self) -> range:
        """Units that trainers read."""
        return range(self.n_train_units)

    @property
    def heldout_units(self) -> range:
        """Units that only evaluation reads."""
        return range(self.n_train_units, len(self.units))

    @cached_property
    def rows_of_units(self) -> tuple[int, ...]:
        """Estimated rows of each unit, before exclusions by norm."""
        if self.unit_rows is not None:
            return self.unit_rows
        counts = (sum(span.count for span in unit) for unit in self.units)
        return tuple(int(count * self.document_rows) for count in counts)

    @property
    def train_rows_estimate(self) -> int:
        """Estimated rows for training, before exclusions by norm."""
        return sum(self.rows_of_units[: self.n_train_units])

    @cached_property
    def pass_rows(self) -> int:
        """Rows promised to training in one pass: the shortest stream's rows times the streams."""
        if self.unit_rows is None:  # an old plan: the rows of its streams are not known
            return self.train_rows_estimate
        return self.streams * min(
            sum(self.unit_rows[unit] for unit in self.stream_units(v)) for v in range(self.streams)
        )

    def resolve(self, run: Run, stream_rows: int = 0) -> Run:
        """Fill in the settings that the run file leaves to the plan (null, `train.rows: all`).

        Args:
            stream_rows: Rows of each stream that the run's parents took; `all` means the rest.

        Raises:
            ConfigError: The filled-in settings contradict the other settings.
            DataExhaustedError: With `all`, less than one batch remains.
        """
        if not run.left_open:
            return run
        train = run.train
        taken = stream_rows * self.streams
        left = self.pass_rows * train.max_passes - taken
        if taken and train.rows == "all" and left < train.batch_rows:
            raise DataExhaustedError(
                f"train.rows: all: the run's parents took {taken} rows, and less than one batch is "
                f"left (train.max_passes {train.max_passes}); raise train.max_passes or use "
                f"train.parent.data: restart"
            )
        if train.rows == "all" and left < train.batch_rows:
            raise DataExhaustedError(
                f"train.rows: all: there will be about {left} rows to train on, less than one "
                f"batch (train.batch_rows {train.batch_rows}); add more text or lower "
                f"train.batch_rows"
            )
        filled = run.filled(
            {
                "activations": self.settings["activations"],
                "train": {
                    "rows": left // train.batch_rows * train.batch_rows,
                    "normaliser_rows": self._normaliser_rows,
                },
            }
        )
        return validate_run(sections_of(filled), "with the values from its plan")

    @property
    def first_windows(self) -> int:
        """Number of units in the first windows of all streams, which the first batch needs."""
        return min(self.n_train_units, self.streams * self.window_units)

    @property
    def _normaliser_rows(self) -> int:
        """Rows for the normaliser: most of the first windows, which training waits for anyway."""
        if self.unit_rows is None:
            return _MOST_NORMALISER_ROWS  # the default when plans without `unit_rows` were made
        return max(
            1, min(_MOST_NORMALISER_ROWS, int(0.9 * sum(self.unit_rows[: self.first_windows])))
        )

    @property
    def guarantees_rows(self) -> bool:
        """True if a stream with fewer rows than promised reads its last window again."""
        return self.unit_rows is not None

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites that are recorded in the set; a run may need only some of them."""
        return tuple(self.settings["activations"]["sites"])

    def stream_units(self, stream: int) -> list[int]:
        """Return the training units of one canonical stream, in ascending order."""
        return list(self.train_units[stream :: self.streams])


def check_rows(run: Run, plan: Plan, taken: int = 0) -> None:
    """Check that the plan promises enough rows for the run.

    Args:
        taken: Rows that the run's parents took.

    Raises:
        DataExhaustedError: `train.rows` exceeds what the plan promises.
    """
    doubt = 1 if plan.guarantees_rows else 1.05  # older estimates are accurate to a few percent
    if taken + run.rows > doubt * plan.pass_rows * run.train.max_passes:
        after = f" after the {taken} that the run's parents took" if taken else ""
        raise DataExhaustedError(
            f"train.rows asks for {run.rows} rows{after}, but the activation set will have about "
            f"{plan.pass_rows} in one pass (train.max_passes {run.train.max_passes}); "
            f"lower train.rows (all takes every row), raise train.max_passes or add more text"
        )


def publish_plan(store: ObjectStore, plan: Plan) -> Plan:
    """Store the plan, unless one with the same settings, text and model already exists.

    Returns:
        The stored plan: `plan` itself if this call created it.

    Raises:
        PlanMismatchError: The store has a plan with other settings, text or model.
    """
    if store.put(PLAN_KEY, seal(plan), if_absent=True):
        return plan
    stored = read_record(Plan, store, PLAN_KEY)
    if changed := setting_changes(stored.settings, plan.settings) or _content_changes(stored, plan):
        raise _mismatch(store, changed)
    return stored


def find_plan(
    store: ObjectStore, run: Run, index: CorpusIndex, model: dict[str, str] | None
) -> Plan | None:
    """Return the stored plan, if any, even if this version would assign documents differently.

    Args:
        store: Object store of the activation set.
        model: `identity.model_content` of the model, if known.

    Raises:
        PlanMismatchError: The stored plan was made from other settings, text or model.
    """
    try:
        plan = read_record(Plan, store, PLAN_KEY)
    except ObjectNotFoundError:
        return None
    current: dict[str, Any] = {"settings": plan_settings(plan.resolve(run)), "files": index.files}
    current |= {"model_content": model, "corpus_commit": index.commit}
    return publish_plan(store, plan.model_copy(update=current))


def load_plan(store: ObjectStore, run: Run) -> Plan:
    """Load the plan and check it against the run file.

    Raises:
        PlanMismatchError: The store has no plan, or one from other settings, text or model.
    """
    try:
        plan = read_record(Plan, store, PLAN_KEY)
    except ObjectNotFoundError as exc:
        raise PlanMismatchError(f"{store.url}: has no plan yet; run `dist-sae plan` first") from exc
    changed = setting_changes(plan.settings, plan_settings(plan.resolve(run))) or path_changes(
        plan.settings, plan.files, plan.corpus_commit, plan.model_content, run
    )
    if changed:
        raise _mismatch(store, changed)
    return plan


def resolve_from_plan(
    run: Run, store: ObjectStore | None = None, stream_rows: int = 0
) -> Run | None:
    """Fill in the settings that a run leaves to its plan; None if no plan fits the run (yet).

    Args:
        store: Object store of the activation set; opened if not given.
        stream_rows: See `Plan.resolve`.
    """
    if not run.left_open:
        return run
    try:
        plan = load_plan(store or open_store(run.store.activations, run.store.s3), run)
    except PlanMismatchError:
        return None
    return plan.resolve(run, stream_rows)


def pin_to_plan(run: Run, plan: Plan) -> Run:
    """Return the run as producers need it: with all sites of the set and the plan's hub commits.

    The commits are pinned because the hub may have newer ones of the model or the data set.
    """
    model, corpus = run.model, run.corpus
    content = plan.model_content or {}
    if isinstance(model, HuggingFaceModel) and (commit := content.get("commit")):
        model = model.model_copy(update={"revision": commit})
    if model.kind == "huggingface" and model.other and (commit := content.get("other/commit")):
        other = model.other.model_copy(update={"revision": commit})
        model = model.model_copy(update={"other": other})
    if isinstance(corpus, DatasetCorpus) and plan.corpus_commit:
        corpus = corpus.model_copy(update={"revision": plan.corpus_commit})
    activations = run.activations.model_copy(update={"sites": plan.sites})
    site = run.train.site if run.sae.reads else run.site  # the set may have several sites
    train = run.train.model_copy(update={"site": site})
    return run.model_copy(
        update={"model": model, "corpus": corpus, "activations": activations, "train": train}
    )


def check_model(run: Run, plan: Plan) -> None:
    """Check that the run's model, including its weights, is the plan's model.

    Raises:
        PlanMismatchError: The run's model differs from the plan's.
    """
    if not isinstance(run.model, HuggingFaceModel):
        return
    parts, planned = run.model.parts, plan.model_content

    def compare() -> list[str]:
        for part in parts:  # fetch a stored model to this machine, because it is needed next
            name_or_path(part, weights=True)
        return content_changes(planned, model_content(run.model)) if planned else []

    changed = compare()
    if changed and evict(parts):  # the files may have been damaged during the download
        changed = compare()
    if changed:
        raise PlanMismatchError(
            f"model.path {run.model.path}: is not the model that the plan was made for "
            f"({', '.join(changed)} differ); restore it or set store.activations to another "
            f"location"
        )


def _content_changes(stored: Plan, new: Plan) -> list[str]:
    """List how text and model differ between two plans with the same settings."""
    changed = []
    if stored.text_checksums is None and stored.settings["corpus"]["kind"] == "dataset":
        # a plan of an earlier version has only the name of the data set
        changed += differences(stored.settings["corpus"], new.settings["corpus"], "corpus.")
    else:
        changed += file_changes(stored.files, new.files)
    if stored.model_content is None:
        changed += differences(stored.settings["model"], new.settings["model"], "model.")
    elif names := content_changes(stored.model_content, new.model_content):
        changed.append(f"the model has changed: {', '.join(names)}")
    return changed


def _mismatch(store: ObjectStore, changed: list[str]) -> PlanMismatchError:
    remedy = "restore the setting or set store.activations to another location"
    if next(existing_units(store), None) is None:
        remedy = f"nothing was produced under it yet: delete {PLAN_KEY} there to plan again"
    return PlanMismatchError(f"{store.url}: has a different plan ({'; '.join(changed)}); {remedy}")
