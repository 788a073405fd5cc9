"""Names and labels of a run's objects; all that finds them again goes by these."""

from dist_sae import __version__
from dist_sae.config import Run
from dist_sae.errors import ConfigError

PART = "app.kubernetes.io/component"
"""The label that tells a run's parts apart."""
TRIAL = "-new"
"""Behind the names under which a cluster is asked whether it would take objects."""
_LONGEST = 63 - len(f"{TRIAL}-producer-0-0000-abcde")  # a pod's name is a host's name


def object_name(run: Run) -> str:
    """The name of the run's JobSet, ConfigMap and Service.

    Raises:
        ConfigError: Pods could not be named after it.
    """
    name = run.name.replace(".", "-")
    if len(name) > _LONGEST or not name[0].isalpha():
        raise ConfigError(
            f"name: {run.name} cannot name pods; on a cluster it begins with a letter and has at "
            f"most {_LONGEST} characters"
        )
    return name


def labels(run: Run, part: str | None = None) -> dict[str, str]:
    """Of an object of the run, or of a part's pods."""
    return selector(run, part) | {
        "app.kubernetes.io/version": __version__,
        "app.kubernetes.io/managed-by": "dist-sae",
    }


def selector(run: Run, part: str | None = None) -> dict[str, str]:
    """What finds the objects of a run, or a part's pods."""
    found = {"app.kubernetes.io/name": "dist-sae", "app.kubernetes.io/instance": run.name}
    return found | ({PART: part} if part else {})
