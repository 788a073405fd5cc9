"""The files in monitoring/."""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "monitoring"


def rules() -> list[dict[str, Any]]:
    return _of("rules.yaml")


def alerts() -> list[dict[str, Any]]:
    return _of("alerts.yaml")


def metrics_in(text: str) -> set[str]:
    """Return the names of queried metrics, without the suffixes of histograms."""
    plain = re.sub(r"\w+:dist_sae_\w+:\w+", "", text)  # recorded series
    names = re.findall(r"\bdist_sae_[a-z0-9_]+", plain)
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in names}


def recorded_in(text: str) -> set[str]:
    return set(re.findall(r"\w+:dist_sae_\w+:\w+", text))


def _of(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]
