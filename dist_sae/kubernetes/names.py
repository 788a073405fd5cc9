"""Names and labels of a run's objects, which later commands use to find them."""

from dist_sae import __version__
from dist_sae.config import Run
from dist_sae.config.cluster import kubernetes_name
from dist_sae.errors import ConfigError

PART = "app.kubernetes.io/component"
"""Label with the name of the part."""
TRIAL = "-new"
"""Suffix of the object names that are used to validate objects on the cluster (dry run)."""
_LONGEST = 63 - len(f"{TRIAL}-producer-0-0000-abcde")  # a pod's name is also its host name


def object_name(run: Run) -> str:
    """Return the name of the run's JobSet, ConfigMap, NetworkPolicy and Service.

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
    """Return the labels of the run's objects, or of a part's pods."""
    return selector(run, part) | {
        "app.kubernetes.io/version": __version__,
        "app.kubernetes.io/managed-by": "dist-sae",
    }


def selector(run: Run, part: str | None = None) -> dict[str, str]:
    """Return the labels that select the run's objects, or a part's pods."""
    found = {"app.kubernetes.io/name": "dist-sae", "app.kubernetes.io/instance": run.name}
    return found | ({PART: part} if part else {})
