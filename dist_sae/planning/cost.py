"""Cost of a run's pods, store and requests, by prices that the user gives."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import NonNegativeFloat, ValidationError

from dist_sae.config.base import Section
from dist_sae.errors import ConfigError

_MONTH_HOURS = 730.0
_LEFT_OUT = "pods of the planner, the index and the reporter"  # their time is not forecast


class Prices(Section):
    """A price file. A price that is left out is 0, and the cost says so."""

    currency: str
    producer_pod_hour: NonNegativeFloat = 0.0
    trainer_pod_hour: NonNegativeFloat = 0.0
    stored_gb_month: NonNegativeFloat = 0.0
    thousand_puts: NonNegativeFloat = 0.0
    """PUT, POST and LIST requests."""
    thousand_gets: NonNegativeFloat = 0.0


def read_prices(path: Path) -> Prices:
    """Read a price file.

    Raises:
        ConfigError: It cannot be read, or a key or value is wrong; one line.
    """
    try:
        return Prices.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as exc:
        raise ConfigError(f"--prices: {path}: {exc.strerror}; name a readable file") from exc
    except yaml.YAMLError as exc:
        raise ConfigError(f"--prices: {path}: is no YAML; write one `key: number` a line") from exc
    except ValidationError as exc:
        error = exc.errors()[0]
        key = ".".join(map(str, error["loc"])) or "the file"
        known = ", ".join(Prices.model_fields)
        raise ConfigError(f"--prices: {path}: {key}: {error['msg']}; keys are {known}") from exc


def cost_of(
    prices: Prices, pod_hours: dict[str, float], stored_gb_hours: float, puts: int, gets: int
) -> dict[str, Any]:
    """Cost by part, in the prices' currency."""
    parts = {
        **{role: hours * getattr(prices, f"{role}_pod_hour") for role, hours in pod_hours.items()},
        "stored": stored_gb_hours / _MONTH_HOURS * prices.stored_gb_month,
        "requests": puts / 1000 * prices.thousand_puts + gets / 1000 * prices.thousand_gets,
    }
    free = [key for key in Prices.model_fields if key not in prices.model_fields_set]
    rounded = {name: round(value, 2) for name, value in parts.items()}
    total = round(sum(parts.values()), 2)
    said = {"no_price_for": ", ".join(free)} if free else {}
    return {"currency": prices.currency, **rounded, "total": total, **said, "left_out": _LEFT_OUT}
