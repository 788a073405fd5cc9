"""Render a run file for other programs: DeepSpeed, Kubernetes, Grafana."""

import json
from collections.abc import Callable
from typing import Any

import yaml

from dist_sae.config import Run
from dist_sae.distributed.zero import deepspeed_config
from dist_sae.kubernetes.jobs import render_objects
from dist_sae.telemetry.dashboards import render_dashboards


def _dashboards(_: Run) -> dict[str, Any]:
    """Return the Grafana dashboards by file name. They are the same for every run."""
    return {name: json.loads(text) for name, text in render_dashboards().items()}


TARGETS: dict[str, Callable[[Run], Any]] = {
    "deepspeed": deepspeed_config,
    "kubernetes": render_objects,
    "dashboards": _dashboards,
}


def render(run: Run, only: str | None = None) -> dict[str, Any]:
    """Render the run for each target.

    By default, Kubernetes is rendered only if the run names an image. Dashboards are rendered only
    on request, because they are long and the same for all runs.

    Args:
        only: Target, a key of `TARGETS`; None for the default targets.

    Raises:
        ConfigError: The run cannot run on a cluster.
    """
    implied = ["deepspeed", "kubernetes"] if run.cluster.image else ["deepspeed"]
    named = [only] if only else implied
    return {name: TARGETS[name](run) for name in named}


def to_yaml(objects: list[dict[str, Any]]) -> str:
    """Return objects as multi-document YAML for kubectl."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=100)


class _Dumper(yaml.CSafeDumper):
    """YAML dumper that writes multi-line strings as blocks, and never uses anchors."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _text(dumper: yaml.CSafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    )


_Dumper.add_representer(str, _text)
