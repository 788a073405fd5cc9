"""Hardware and library versions, which are recorded with results."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dist_sae import __version__

_LIBRARIES = ("torch", "deepspeed", "transformers")


def hardware() -> str:
    """Return the name of the computing device, for example `AMD EPYC 9B14, 2 threads`."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
            break
    n = torch.get_num_threads()
    return f"{name}, {n} thread{'s' if n > 1 else ''}"


def versions() -> dict[str, str]:
    """Return the versions of this project and of the libraries that affect its results."""
    found = {"dist_sae": __version__}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # the synthetic model needs no transformers
            continue
    return found
