"""Outcomes of `dist-sae analyse`, stored with the run. Each has a page, and the report shows it.

<run>/analysis/<what>/<table>-<digest>.parquet
<run>/analysis/<what>/page.html
<run>/analysis/<what>/<name>.html                further pages, such as a map
<run>/analysis/<what>/outcome.json               sealed, written last
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from markupsafe import Markup

from dist_sae.index.layout import Stored, read_table, store_table, to_parquet
from dist_sae.report.page import render_template
from dist_sae.storage import ObjectStore
from dist_sae.storage.records import Record, read_record, seal


class Findings(NamedTuple):
    """The result of an analysis."""

    numbers: Mapping[str, Any]
    """Results by name, as JSON values. A share is a number from 0 to 1."""
    summary: Sequence[str]
    """Sentences that state the main results."""
    caveats: Sequence[str] = ()
    """Sentences that state limits of this result: few rows, few documents, a part left out."""
    tables: Mapping[str, pa.Table] = {}
    """Tables by name."""
    figures: Sequence[str] = ()
    """Figures, drawn by `report.charts`."""
    pages: Mapping[str, str] = {}
    """Further pages by name, as HTML."""


class Outcome(Record):
    """The content of `outcome.json`: the findings, and the inputs of the analysis."""

    schema_version: Literal[1] = 1
    what: str
    """Name of the analysis."""
    title: str
    checkpoints: dict[str, str]
    """Digests of the checkpoints, by run."""
    settings: dict[str, Any]
    """Settings of the analysis."""
    numbers: dict[str, Any]
    summary: tuple[str, ...]
    caveats: tuple[str, ...]
    figures: tuple[str, ...]
    tables: dict[str, Stored]
    pages: tuple[str, ...] = ()
    """Names of further pages, `<name>.html` in the same folder."""

    @property
    def drawn(self) -> list[Markup]:
        """The figures as markup, which a template does not escape."""
        return [Markup(figure) for figure in self.figures]


def store_findings(
    store: ObjectStore,
    run: str,
    what: str,
    title: str,
    checkpoints: Mapping[str, str],
    settings: Mapping[str, Any],
    findings: Findings,
) -> Outcome:
    """Store findings in a run's folder, and replace earlier findings of this analysis.

    Args:
        store: The store of runs.
        run: Name of the run or sweep.
        what: Name of the analysis.
        title: Heading of the page.
        checkpoints: Digests of the analyzed checkpoints, by run.
        settings: Settings of the analysis.
        findings: The findings.
    """
    folder = f"{run}/analysis/{what}"
    tables = {
        name: store_table(store, f"{folder}/{name}", to_parquet(table))
        for name, table in findings.tables.items()
    }
    outcome = Outcome(
        what=what,
        title=title,
        checkpoints=dict(checkpoints),
        settings=dict(settings),
        numbers=dict(findings.numbers),
        summary=tuple(findings.summary),
        caveats=tuple(findings.caveats),
        figures=tuple(findings.figures),
        tables=tables,
        pages=tuple(findings.pages),
    )
    for name, content in findings.pages.items():
        store.put(f"{folder}/{name}.html", content.encode())
    page = render_template("analysis.html", run=run, outcome=outcome)
    store.put(f"{folder}/page.html", page.encode())
    store.put(f"{folder}/outcome.json", seal(outcome))
    kept = {stored.key for stored in tables.values()}
    for key in list(store.keys(f"{folder}/")):
        if key.endswith(".parquet") and key not in kept:  # a table of an earlier outcome
            store.delete(key)
    return outcome


def read_outcomes(store: ObjectStore, run: str) -> list[Outcome]:
    """Read all outcomes of a run or sweep, sorted by name of the analysis.

    Raises:
        CorruptObjectError: An outcome is damaged.
    """
    found = (read_outcome(store, run, what) for what in sorted(store.folders(f"{run}/analysis/")))
    return [outcome for outcome in found if outcome is not None]


def read_outcome(store: ObjectStore, run: str, what: str) -> Outcome | None:
    """Read the outcome of one analysis of a run or sweep. Return None if it does not exist.

    Raises:
        CorruptObjectError: The outcome is damaged.
    """
    folder = f"{run}/analysis/{what}/"
    key = f"{folder}outcome.json"
    if store.size(key) is None:
        return None
    return read_record(Outcome, store, key, "run dist-sae analyse again", within=folder)


def read_outcome_table(store: ObjectStore, outcome: Outcome, name: str) -> pa.Table:
    """Read a table of an outcome, and verify its checksum."""
    return read_table(store, outcome.tables[name])
