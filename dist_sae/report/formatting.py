"""Formatting of numbers for people: units, thousands separators, few digits."""

from typing import Any

from dist_sae.report.charts import short_number

_WHOLE_FROM = 1e4  # from here on, four significant digits would round the whole part


def format_result(name: str, value: Any) -> str:  # noqa: PLR0911 - one for each unit
    """Format a result.

    Args:
        name: Name of the result, which implies its unit (`*_share`, `*_seconds`, `*_bytes`,
            `ce_*`).
        value: A JSON value; None if the result is not known yet.
    """
    if value is None:
        return "not known yet"
    if isinstance(value, str | bool):
        return str(value)
    if name.endswith("bytes"):
        return f"{value / 1e6:,.1f} MB"
    if isinstance(value, int):
        return f"{value:,}"
    if "_share" in name or name.startswith("ce_recovered"):
        return f"{100 * value:.2f} %"
    if name.startswith("ce_"):
        return f"{value:.4g} nats"
    if name.endswith("_per_second"):
        return f"{value:,.0f} {name.removesuffix('_per_second')}/s"
    if name.endswith("seconds"):
        return format_duration(value)
    return f"{value:,.0f}" if abs(value) >= _WHOLE_FROM else f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """Format a duration in a suitable unit."""
    size, unit = time_unit(seconds)
    return f"{short_number(seconds / size)} {unit}"


def time_unit(seconds: float) -> tuple[float, str]:
    """Choose a unit for a duration. Return the unit's seconds and its name."""
    units = ((86_400.0, "days"), (3600.0, "h"), (60.0, "min"))
    return next(((size, unit) for size, unit in units if seconds >= 2 * size), (1.0, "s"))
