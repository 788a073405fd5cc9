"""Reading and validating run files with overrides, and writing the resolved run."""

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dist_sae.config.base import folder_of
from dist_sae.config.messages import explain
from dist_sae.config.renamed import RENAMED, warn_renamed, with_new_names
from dist_sae.config.run import Run
from dist_sae.errors import ConfigError

_SECTIONS_OF_KEYS: dict[tuple[str, ...], int] = {("sweep", "over"): 2, ("sweep", "jobs"): 3}
"""Sections whose keys are dotted keys of the run file, such as `sae.k`, with their depth."""


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read and validate a run file.

    Args:
        overrides: Strings `section.key=value`, where the value is YAML.

    Raises:
        ConfigError: The run file or an override is not valid. The message has one line per
            problem, each with the path as the user gave it.
    """
    data = _read_yaml(Path(path))
    for section, keys in data.items():
        for key in keys if isinstance(keys, Mapping) else ():
            warn_renamed(f"{section}.{key}", str(path))
    return resolve_run(data, overrides, str(path))


def resolve_run(data: dict[str, Any], overrides: Sequence[str], origin: str) -> Run:
    """Validate a run given as sections and overrides. Raises the same errors as `load_run`."""
    try:
        data = with_new_names(data)  # first, so that overrides may use either name
    except ValueError as exc:
        lines = str(exc).splitlines()
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines)) from exc
    for override in overrides:
        _apply_override(data, override)
    run = _with_absolute_stores(validate_run(data, origin))
    of_jobs = {key for own in (run.sweep.overrides() if run.sweep else {}).values() for key in own}
    for override in overrides:
        dotted = override.partition("=")[0]
        key = RENAMED.get(dotted, dotted)
        if any(f"{key}.".startswith(f"{of_job}.") for of_job in of_jobs):
            raise ConfigError(
                f"--set {override}: the sweep's jobs set {key} themselves; change it in {origin}"
            )
    return run


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Parse `section.key=value` strings into sections."""
    data: dict[str, Any] = {}
    for override in overrides:
        _apply_override(data, override)
    return data


def validate_run(data: Mapping[str, Any], origin: str) -> Run:
    """Validate and resolve a run given as sections.

    Args:
        origin: Source of the sections, for messages.

    Raises:
        ConfigError: The sections are not valid. The message has one line per problem.
    """
    try:
        run = Run.model_validate(data).resolved()
        jobs_of(run)
    except ValidationError as exc:
        lines = list(explain(exc.errors(), Run))
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines)) from exc
    except ConfigError as exc:  # of a job
        lines = str(exc).splitlines()
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines)) from exc
    return run


def jobs_of(run: Run) -> tuple[Run, ...]:
    """Return a sweep's jobs as resolved runs, or the run itself if it is not a sweep.

    Raises:
        ConfigError: A job is not valid. The message has one line per problem.
    """
    if run.sweep is None:
        return (run,)
    jobs, problems, ranks = [], list[str](), _ranks_of_a_job(run)
    for name, own in run.sweep.overrides().items():
        data = run.model_dump(mode="json", exclude_unset=True)
        data |= {"name": f"{run.name}-{name}", "sweep": None}
        if ranks < run.processes.trainers:
            data.setdefault("processes", {})["trainers"] = ranks
            pod = run.cluster.trainer
            fitting = {"ranks": math.gcd(pod.ranks, ranks)}
            fitting |= {"gpus": fitting["ranks"]} if pod.gpus else {}
            data.setdefault("cluster", {}).setdefault("trainer", {}).update(fitting)
        for dotted, value in own.items():
            *sections, key = dotted.split(".")
            place = data
            for section in sections:
                place = place.setdefault(section, {})
            place[key] = value
        try:
            jobs.append(Run.model_validate(data).resolved())
        except ValidationError as exc:
            problems += [f"sweep: {name}: {line}" for line in explain(exc.errors(), Run)]
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(jobs)


def groups_of(run: Run) -> tuple[tuple[Run, ...], ...]:
    """Group a sweep's runs by the neighbouring ranks that train them. Raises like `jobs_of`.

    There is one group with all ranks unless the sweep has `placement: spread`.
    """
    jobs = jobs_of(run)
    n = run.processes.trainers // jobs[0].processes.trainers
    return tuple(jobs[group::n] for group in range(n))


def _ranks_of_a_job(run: Run) -> int:
    """Return the number of ranks that train a job: all ranks, or the size of a group.

    Raises:
        ConfigError: The ranks cannot be divided into groups of equal size.
    """
    trainers, sweep = run.processes.trainers, run.sweep
    if sweep is None or sweep.placement == "together":
        return trainers
    jobs, key = sweep.overrides(), "processes.latent_shards"
    shards = [own.get(key, run.processes.latent_shards) for own in jobs.values()]
    most = max([1, *(each for each in shards if isinstance(each, int))])  # others are refused later
    groups = max(1, min(len(jobs), trainers // most))
    if trainers % groups:
        raise ConfigError(
            f"sweep.placement: {trainers} ranks (processes.trainers) cannot be spread evenly over "
            f"{groups} groups for {len(jobs)} jobs; use {trainers // groups * groups} or "
            f"{(trainers // groups + 1) * groups} ranks, or together"
        )
    return trainers // groups


def sections_of(run: Run) -> dict[str, Any]:
    """Return the run's settings as sections; `validate_run` turns them into an equal run.

    For a sweep these are only the keys that were given, since other values depend on the job.
    """
    return run.model_dump(mode="json", exclude_unset=run.sweep is not None)


def dump_run(run: Run) -> str:
    """Return the resolved run as YAML; `load_run` reads it back as an equal run."""
    return yaml.dump(sections_of(run), Dumper=yaml.CSafeDumper, sort_keys=False)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List where two nested mappings differ: `["train.lr: 0.001 -> 0.002"]`."""
    lines: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


class _Loader(yaml.CSafeLoader):
    """YAML loader that rejects duplicate keys and reads 1e6 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, count in Counter(key.value for key in keys).items():
            if count > 1:
                again = [node.start_mark for node in keys if node.value == key][1]
                raise yaml.MarkedYAMLError(problem=f"key {key!r} appears twice", problem_mark=again)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, where 1e6 and 1e-3 are strings and only 1.0e+6 is a float
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return parse_run(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError as exc:
        raise ConfigError(f"{path}: no such file; give the path of a run file (YAML)") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: cannot be read: {exc}") from exc


def parse_run(text: str, origin: str) -> dict[str, Any]:
    """Parse a run file into sections, without validating them.

    Raises:
        ConfigError: The text is not YAML, or not a mapping.
    """
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = getattr(exc, "problem", None) or str(exc).splitlines()[0]
        raise ConfigError(f"{origin}{place}: not valid YAML: {problem}") from exc
    if not isinstance(data, dict):
        raise ConfigError(
            f"{origin}: must contain a mapping with the keys {', '.join(Run.model_fields)}"
        )
    return data


def _apply_override(data: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    warn_renamed(dotted, f"--set {override}")
    keys = RENAMED.get(dotted, dotted).split(".")
    sections = _SECTIONS_OF_KEYS.get(tuple(keys[:2]))
    if sections and len(keys) > sections:
        keys[sections:] = [".".join(keys[sections:])]
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: write it as section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, UnicodeEncodeError) as exc:  # of bytes that are not UTF-8
        raise ConfigError(f"--set {override}: the value is not valid YAML") from exc
    section = data
    for key in keys[:-1]:
        if section.get(key) is None:  # absent, or without a value
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: {key} is a value, not a section")
    section[keys[-1]] = value


def _with_absolute_stores(run: Run) -> Run:
    """Make the paths of local stores absolute, so that the run means the same in any folder."""
    store = run.store
    resolved = {
        name: folder_of(url) or url
        for name, url in (("activations", store.activations), ("runs", store.runs))
    }
    return run.model_copy(update={"store": store.model_copy(update=resolved)})


def with_absolute_paths(run: Run) -> Run:
    """Return the run with absolute paths of its model and text, so that it works in any folder."""
    model, corpus = run.model, run.corpus
    if model.kind == "huggingface" and (folder := Path(model.path).expanduser()).is_dir():
        model = model.model_copy(update={"path": os.path.abspath(folder)})
    if model.kind == "huggingface" and model.other and Path(model.other.path).is_dir():
        other = model.other.model_copy(update={"path": os.path.abspath(model.other.path)})
        model = model.model_copy(update={"other": other})
    if corpus.kind == "files":
        files = tuple(
            file if "://" in file else os.path.abspath(os.path.expanduser(file))
            for file in corpus.files
        )
        corpus = corpus.model_copy(update={"files": files})
    return run.model_copy(update={"model": model, "corpus": corpus})
