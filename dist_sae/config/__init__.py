"""The run file: one YAML document that describes a whole run, on a laptop or a cluster.

Only imports pydantic, PyYAML and the standard library, so that `--help`, rendering and CI need no
torch.
"""

from dist_sae.config.load import (
    differences,
    dump_run,
    groups_of,
    jobs_of,
    load_run,
    parse_overrides,
    parse_run,
    resolve_run,
    sections_of,
    validate_run,
    with_absolute_paths,
)
from dist_sae.config.run import Run

__all__ = [
    "Run",
    "differences",
    "dump_run",
    "groups_of",
    "jobs_of",
    "load_run",
    "parse_overrides",
    "parse_run",
    "resolve_run",
    "sections_of",
    "validate_run",
    "with_absolute_paths",
]
