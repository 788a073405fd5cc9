"""Names and labels of a run's objects, by which they are found again."""

from dist_sae import __version__
from dist_sae.config import Run
from dist_sae.config.cluster import kubernetes_name
from dist_sae.errors import ConfigError

PART = "app.kubernetes.io/component"
"""The label that names the part of the run."""
TRIAL = "-new"
"""Suffix of the names under which objects are validated on the cluster."""
_LONGEST = 63 - len(f"{TRIAL}-producer-0-0000-abcde")  # a pod's name is a host's name


def object_name(run: Run) -> str:
    """The name of the run's JobSet, ConfigMap, NetworkPolicy and Service.

    Raises:
        ConfigError: The run's name is not valid in names of pods.
    """
    name = kubernetes_name(run.name)
    if len(name) > _LONGEST or not name[0].isalpha():
        raise ConfigError(
            f"name: {run.name} is not valid in names of pods; on a cluster it must begin with a "
            f"letter and have at most {_LONGEST} characters"
        )
    return name


def labels(run: Run, part: str | None = None) -> dict[str, str]:
    """Labels of an object of the run, or of the pods of a part."""
    return selector(run, part) | {
        "app.kubernetes.io/version": __version__,
        "app.kubernetes.io/managed-by": "dist-sae",
    }


def selector(run: Run, part: str | None = None) -> dict[str, str]:
    """Labels that select the objects of a run, or the pods of a part."""
    found = {"app.kubernetes.io/name": "dist-sae", "app.kubernetes.io/instance": run.name}
    return found | ({PART: part} if part else {})
