"""The section `sweep`: several dictionaries trained on one stream, each a separate run."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from dist_sae.config.base import Section, Shape
from dist_sae.config.renamed import RENAMED

_SHARED = {
    "train.batch_rows": "all jobs read the same batches",
    "train.max_passes": "all jobs read one stream, with the same number of passes",
    "train.normaliser_rows": "activations are normalised once for all jobs",
    "train.parent": "all jobs start at the same place in the stream",
}
"""Keys that jobs cannot set, and why."""
_OWN = ("sae.", "train.", "processes.latent_shards")
_MOST_JOBS = 1000


def _check_key(key: str) -> str:
    dotted = RENAMED.get(key, key)
    for shared, why in _SHARED.items():
        if f"{dotted}.".startswith(f"{shared}."):
            raise ValueError(f"{key} is the same for all jobs: {why}")
    if dotted == "train":
        raise ValueError("set individual keys of train, such as train.lr")
    if dotted != "sae" and not dotted.startswith(_OWN):
        raise ValueError(
            f"{key} is the same for all jobs; they may differ in sae, sae.*, train.* and "
            f"processes.latent_shards, and anything else needs a separate run file"
        )
    return dotted


def _check_values(values: Any) -> list[Any]:
    if isinstance(values, Sequence) and not isinstance(values, str) and values:
        return list(values)
    if isinstance(values, Mapping) and {"first", "last"} <= values.keys():
        return list(_progression(**values))
    raise ValueError(
        "give a list of values, or {first: 16, last: 128, times: 2}, or {first: 0, last: 7, plus: "
        "1}"
    )


def _progression(
    first: float, last: float, plus: float = 0, times: float = 1, **unknown: Any
) -> Iterator[float]:
    numbers = (first, last, plus, times)
    grows = all(type(number) in (int, float) for number in numbers) and (
        (plus > 0 and times == 1) or (times > 1 and plus == 0 and first > 0)
    )
    if unknown or not grows or last < first:
        raise ValueError(
            "a range needs first, a last that is not below it, and either plus or times"
        )
    value, almost = first, 1 + 1e-9  # tolerance, so that rounding does not lose the last value
    for _ in range(_MOST_JOBS):
        if value > last * almost:
            return
        yield value
        value = value * times + plus
    raise ValueError(f"the range has more than {_MOST_JOBS} values")


JobName = Annotated[
    str,
    Shape(
        r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$",
        "use lower-case letters, digits, '-' and '.', and start and end with a letter or a digit",
    ),
]
Key = Annotated[str, AfterValidator(_check_key)]
Values = Annotated[Any, AfterValidator(_check_values)]


class SweepConfig(Section):
    """Several dictionaries that are trained on the same batches. Each is a separate run.

    Job `k32` of the run `small` is the run `small-k32`. With both `jobs` and `over`, each job is
    trained with each combination of values.
    """

    jobs: dict[JobName, dict[Key, Any]] = Field(default_factory=dict)
    """Jobs by name, each with the keys that it changes: {k32: {sae.k: 32}}. A job may also replace
    the whole section `sae`, for example to use another kind."""
    over: dict[Key, Values] = Field(default_factory=dict)
    """Values to try for each key. Every combination becomes a job. Values are a list, or a range
    such as {first: 16, last: 128, times: 2} or {first: 0, last: 7, plus: 1}. Jobs are named after
    their values: k32, seed1, batchtopk-k32."""
    placement: Literal["together", "spread"] = "together"
    """`together`: every rank trains all jobs, one after the other, on each batch. `spread`: the
    trainer ranks are divided into one group per job, or into fewer groups if there are not enough
    ranks. Each group trains its share of the jobs."""

    def overrides(self) -> dict[str, dict[str, Any]]:
        """Return the keys and values that each job sets, by the job's name."""
        return dict(self._named())

    def _named(self) -> Iterator[tuple[str, dict[str, Any]]]:
        combinations = [
            dict(zip(self.over, values, strict=True)) for values in product(*self.over.values())
        ]
        for name, own in (self.jobs or {"": {}}).items():
            for values in combinations:
                words = [name, *(_word(key, value) for key, value in values.items())]
                yield "-".join(filter(None, words)), {**own, **values}

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        if not self.jobs and not self.over:
            raise ValueError("no jobs: set jobs or over")
        if twice := sorted({key for own in self.jobs.values() for key in own} & self.over.keys()):
            raise ValueError(f"{twice[0]} is in both jobs and over; leave one of them out")
        names = [name for name, _ in self._named()]
        if len(names) > _MOST_JOBS:
            raise ValueError(
                f"{len(names)} jobs are too many; a sweep can have at most {_MOST_JOBS}"
            )
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"two jobs are named {twice[0]}; remove or rename one of them")
        return self


def _word(key: str, value: Any) -> str:
    """Return the part of a job's name for one of its values: `k32`, `batchtopk`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        values = value if isinstance(value, list) else [value]
        words = "-".join(str(each).lower() for each in values)
        key = key if isinstance(value, bool) or value is None else ""
    else:
        words = f"{value:.12g}"
    name = key.rpartition(".")[2].replace("_", "-")
    return re.sub(r"[^a-z0-9.]+", "-", f"{name}{words}").strip("-.")
