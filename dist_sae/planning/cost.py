"""Cost of a run's pods, storage and requests, from the user's prices."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import NonNegativeFloat, ValidationError

from dist_sae.config.base import Section
from dist_sae.errors import ConfigError

_MONTH_HOURS = 730.0
_LEFT_OUT = "pods of the planner, the index and the reporter"  # no forecast of their time exists


class Prices(Section):
    """Content of a price file. A missing price counts as 0, and the cost lists it as missing."""

    currency: str
    producer_pod_hour: NonNegativeFloat = 0.0
    trainer_pod_hour: NonNegativeFloat = 0.0
    stored_gb_month: NonNegativeFloat = 0.0
    thousand_puts: NonNegativeFloat = 0.0
    """Price of 1000 PUT, POST or LIST requests."""
    thousand_gets: NonNegativeFloat = 0.0


def read_prices(path: Path) -> Prices:
    """Read a price file.

    Raises:
        ConfigError: The file cannot be read, or a key or value is wrong. The message is one line.
    """
    try:
        return Prices.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as exc:
        raise ConfigError(f"--prices: {path}: {exc.strerror}; pass a readable file") from exc
    except yaml.YAMLError as exc:
        raise ConfigError(
            f"--prices: {path}: is not valid YAML; write one `key: number` per line"
        ) from exc
    except ValidationError as exc:
        error = exc.errors()[0]
        key = ".".join(map(str, error["loc"])) or "the file"
        known = ", ".join(Prices.model_fields)
        raise ConfigError(f"--prices: {path}: {key}: {error['msg']}; the keys are {known}") from exc


def compute_cost(prices: Prices, forecast: Mapping[str, Any], *, held_back: bool) -> dict[str, Any]:
    """Compute the cost by part, in the prices' currency.

    Args:
        prices: Prices of pods, storage and requests.
        forecast: The forecast (`estimate`).
        held_back: Whether producers wait for trainers, and so run until the end.
    """
    hours, producing = (
        forecast["pace"][f"{what}_seconds"] / 3600 for what in ("total", "producing")
    )
    pods, over_time, asked = (
        forecast["pods"],
        forecast["set_over_time"].values(),
        forecast["requests"],
    )
    producing = hours if held_back else min(hours, producing)
    held = sum(over_time) / len(over_time) + forecast["stored"]["checkpoints_bytes"]
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
