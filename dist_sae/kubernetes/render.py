"""`dist-sae render`: what a run file implies for other programs."""

import json
from collections.abc import Callable
from typing import Any

import yaml

from dist_sae.config import Run
from dist_sae.distributed.zero import deepspeed_config
from dist_sae.kubernetes.jobs import render_objects
from dist_sae.telemetry.dashboards import render_dashboards


def _dashboards(_: Run) -> dict[str, Any]:
    """Grafana's, by file name: the same for every run."""
    return {name: json.loads(text) for name, text in render_dashboards().items()}


WHAT: dict[str, Callable[[Run], Any]] = {
    "deepspeed": deepspeed_config,
    "kubernetes": render_objects,
    "dashboards": _dashboards,
}


def render(run: Run, only: str | None = None) -> dict[str, Any]:
    """Everything that the run implies, by what it is for; Kubernetes' objects if it has an image.

    Dashboards, which are long and the same for all, only when asked for.

    Args:
        run: The run.
        only: One of `WHAT`.

    Raises:
        ConfigError: The run cannot be on a cluster.
    """
    implied = ["deepspeed", "kubernetes"] if run.cluster.image else ["deepspeed"]
    named = [only] if only else implied
    return {name: WHAT[name](run) for name in named}


def to_yaml(objects: list[dict[str, Any]]) -> str:
    """Objects as kubectl reads them."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=100)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as they are; no anchors for what stands twice."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    )


_Dumper.add_representer(str, _text)
