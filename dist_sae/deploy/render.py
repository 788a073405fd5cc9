"""`dist-sae render`: what a run file implies for other programs."""

from collections.abc import Callable
from typing import Any

import yaml

from dist_sae.config import Run
from dist_sae.deploy.jobs import render_objects
from dist_sae.parallel.zero import deepspeed_config

WHAT: dict[str, Callable[[Run], Any]] = {
    "deepspeed": deepspeed_config,
    "kubernetes": render_objects,
}


def render(run: Run, only: str | None = None) -> dict[str, Any]:
    """Everything that the run implies, by what it is for; Kubernetes' objects if it has an image.

    Args:
        run: The run.
        only: One of `WHAT`.

    Raises:
        ConfigError: The run cannot be on a cluster.
    """
    named = [only] if only else [n for n in WHAT if n != "kubernetes" or run.cluster.image]
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
