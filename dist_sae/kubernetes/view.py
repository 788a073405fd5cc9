"""Layout of `dist-sae status` for a terminal. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dist_sae.telemetry.metrics import listed


def render_status(status: Mapping[str, Any]) -> RenderableType:
    """Render a status (`read_status`) as text and a table."""
    head = f"{status['run']} in {status['namespace']}: {status['state']}"
    lines = [Text(line) for line in _lines(status)]
    bad = [Text(line, style="yellow") for line in _troubles(status)]
    return Group(Text(head, style="bold"), _table(status["parts"]), *lines, *bad)


def _table(parts: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    if not parts:
        return Text("")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("part", "wanted", "running", "ready", "done", "restarts", "last exit"):
        right = name not in ("part", "last exit")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for name, part in parts.items():
        counts = (part[key] for key in ("wanted", "running", "ready", "done", "restarts"))
        table.add_row(name, *map(str, counts), Text(part["last_end"] or ""))
    return table


def _lines(status: Mapping[str, Any]) -> Iterator[str]:
    for why in status["queued"]:
        yield f"queued   {why}"
    for part in status["parts"].values():
        for pending in part["pending"]:
            yield f"pending  {pending}"
    for event in status["events"]:
        yield f"event    {event}"
    for condition in status["conditions"]:
        yield f"status   {condition}"
    if store := status["store"]:
        yield f"store    {_store(store)}"
        for name, of_job in store.get("jobs", {"": store}).items():
            yield f"saved    {_saved(of_job)}{_of(name)}"
            if index := of_job["index"]:
                yield f"index    {_index(index, status['index_rows_per_second'])}{_of(name)}"
    for name, numbers in (status["jobs"] or {"": status["numbers"]}).items():
        if numbers:
            known = (metric for metric in listed("status") if metric.short in numbers)
            shown = filter(None, (metric.text.format(numbers[metric.short]) for metric in known))
            yield f"training {'  '.join(shown)}  ({numbers['from']}){_of(name)}"
    if status["limit"]:
        yield f"limit    {status['limit']}  (based on {status['limit_of']})"


def _of(job: str) -> str:
    return f"  {job}" if job else ""


def _store(store: Mapping[str, Any]) -> str:
    if "units" not in store:
        return str(store["plan"])
    return (
        f"{store['ready_units']} of {store['units']} units ready, training is at unit "
        f"{store['reached_unit']}, backlog {store['backlog_units']}"
    )


def _index(index: Mapping[str, int], pace: float | None) -> str:
    text = (
        f"{index['encoded_units']} of {index['units']} units encoded, "
        f"{index['merged_buckets']} of {index['buckets']} buckets merged"
    )
    return text if pace is None else f"{text}, {pace:,.0f} rows/s on the first worker"


def _saved(store: Mapping[str, Any]) -> str:
    if store["checkpoint_step"] is None:
        return f"no checkpoint yet; {store['steps'] or 'an unknown number of'} steps in total"
    age = _duration(store["checkpoint_age_seconds"])
    return f"step {store['checkpoint_step']} of {store['steps'] or 'an unknown number'}, {age} ago"


def _troubles(status: Mapping[str, Any]) -> Iterator[str]:
    for warning in status["warnings"]:
        yield f"warning: {warning}"
    for what, why in status["out_of_reach"].items():
        yield f"{what} unreachable: {why}"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 2:  # noqa: PLR2004
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"  # noqa: PLR2004
