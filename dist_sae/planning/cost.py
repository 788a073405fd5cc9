"""Cost of a run's pods, store and requests, by prices that the user gives."""

from collections.abc import Mapping
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


def cost_of(prices: Prices, told: Mapping[str, Any], *, held_back: bool) -> dict[str, Any]:
    """Cost by part, in the prices' currency.

    Args:
        prices: Of pods, store and requests.
        told: The forecast.
        held_back: Whether producers wait for trainers, and so stay until the end.
    """
    hours, producing = (told["pace"][f"{what}_seconds"] / 3600 for what in ("total", "producing"))
    pods, over_time, asked = told["pods"], told["set_over_time"].values(), told["requests"]
    producing = hours if held_back else min(hours, producing)
    held = sum(over_time) / len(over_time) + told["stored"]["checkpoints_bytes"]
    puts = sum(n for name, n in asked.items() if name.endswith(("_put", "_list")))
    gets = sum(n for name, n in asked.items() if name.endswith("_get"))
    parts = {
        "producer": pods["producer"] * producing * prices.producer_pod_hour,
        "trainer": pods["trainer"] * hours * prices.trainer_pod_hour,
        "stored": held / 1e9 * hours / _MONTH_HOURS * prices.stored_gb_month,
        "requests": puts / 1000 * prices.thousand_puts + gets / 1000 * prices.thousand_gets,
    }
    free = [key for key in Prices.model_fields if key not in prices.model_fields_set]
    return {
        "currency": prices.currency,
        **{name: round(value, 2) for name, value in parts.items()},
        "total": round(sum(parts.values()), 2),
        **({"no_price_for": ", ".join(free)} if free else {}),
        "left_out": _LEFT_OUT,
    }
