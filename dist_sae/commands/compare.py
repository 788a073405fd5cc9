"""`dist-sae compare`: compare the numbers of several runs."""

import argparse
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_sae.commands import shared
from dist_sae.errors import ConfigError

if TYPE_CHECKING:
    from dist_sae.comparison.matched import MatchedLatents
    from dist_sae.comparison.runs import Compared


_LEAST = 2  # runs


def add(commands: shared.Commands) -> None:
    """Add the command."""
    parser = shared.add_command(commands, "compare", main, "compare the numbers of several runs")
    parser.add_argument("others", nargs="*", metavar="RUN", help="further runs to compare")
    parser.add_argument(
        "--match",
        action="store_true",
        help="also find which latents of the first run have a near copy in each other run",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write an HTML page with curves")


def main(options: argparse.Namespace) -> None:
    """Print the table, and write the files that the options name."""
    name, runs = shared.load_several(options)
    if len(runs) < _LEAST:
        raise ConfigError(f"{options.run}: is a single run; name another one, or a sweep")
    from dist_sae.comparison.runs import caveats, differing, joint_outcomes, read_compared

    compared = read_compared(runs)
    matched = _match(compared) if options.match else {}
    differences = differing(compared)
    rows = list(_rows(compared, differences))
    if options.csv:
        table = io.StringIO()
        writer = csv.DictWriter(table, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        _write("--csv", options.csv, table.getvalue())
    if options.html:
        from dist_sae.comparison.page import render_comparison

        page = render_comparison(compared, matched, joint_outcomes(name, compared))
        _write("--html", options.html, page)
    content = {
        "runs": rows,
        "matched": {label: found._asdict() for label, found in matched.items()},
        "caveats": caveats(compared),
    }
    shared.print_lines(options, content, list(_lines(compared, differences, matched)))


def _write(option: str, path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise ConfigError(
            f"{option}: {path}: {exc.strerror}; choose a file that can be written"
        ) from exc


def _match(compared: Sequence["Compared"]) -> dict[str, "MatchedLatents"]:
    from dist_sae.comparison.matched import match_latents

    first, *others = compared
    return {other.label: match_latents(first.run, other.run) for other in others}


def _rows(
    compared: Sequence["Compared"], differences: Mapping[str, Sequence[Any]]
) -> Iterator[dict[str, Any]]:
    """Yield a row per run, with its numbers and then the settings that differ."""
    for number, each in enumerate(compared):
        settings = {key: values[number] for key, values in differences.items()}
        yield {"run": each.label, **each.numbers, **settings}


def _lines(
    compared: Sequence["Compared"],
    differences: Mapping[str, Sequence[Any]],
    matched: Mapping[str, "MatchedLatents"],
) -> Iterator[str]:
    from dist_sae.comparison.runs import NUMBERS, caveats
    from dist_sae.report.formatting import format_result

    def cell(name: str, value: Any) -> str:
        return "" if value is None else format_result(name, value)

    labels = [each.label for each in compared]
    numbers = [each.numbers for each in compared]
    rows = [
        [each.label, *(cell(n, of[n]) for n in NUMBERS)]
        for each, of in zip(compared, numbers, strict=True)
    ]
    yield from shared.table([["run", *NUMBERS.values()], *rows])
    if differences:
        yield ""
        yield "settings that differ"
        for key, values in differences.items():
            runs_of: dict[str, list[str]] = {}
            for label, value in zip(labels, values, strict=True):
                if value is not None:
                    runs_of.setdefault(str(value), []).append(label)
            text = "; ".join(f"{value} ({', '.join(of)})" for value, of in runs_of.items())
            yield f"  {key}: {text}"
    if matched:
        yield ""
        yield f"latents of {labels[0]} with a near copy"
        for label, found in matched.items():
            decades = [
                f"from 1e{d} {format_result('_share', s)}" for d, s in found.by_decade.items()
            ]
            yield f"  in {label}: {', '.join([format_result('_share', found.share), *decades])}"
    for line in caveats(compared):
        yield ""
        yield line
