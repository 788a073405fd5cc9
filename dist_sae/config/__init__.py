"""The run file: one YAML document that describes a whole run, on a laptop or a cluster.

Imports pydantic, PyYAML and the standard library only, so that `--help`, rendering and CI
need no torch.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, get_args

import yaml
from pydantic import StringConstraints, ValidationError, model_validator
from pydantic_core import ErrorDetails

from dist_sae.config.base import Section
from dist_sae.config.data import (
    SYNTHETIC_SITE,
    ActivationsConfig,
    CorpusConfig,
    ModelConfig,
    StoreConfig,
)
from dist_sae.config.sae import SaeConfig
from dist_sae.config.train import EvaluateConfig, ProcessesConfig, TelemetryConfig, TrainConfig
from dist_sae.errors import ConfigError

RunName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]{0,50}[a-z0-9])?$")]


class Run(Section):
    """The root of a run file."""

    name: RunName
    """Names the run's folder and its Kubernetes objects: lower-case letters, digits, '-', '.'."""
    store: StoreConfig
    model: ModelConfig
    corpus: CorpusConfig
    activations: ActivationsConfig
    sae: SaeConfig
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    processes: ProcessesConfig = ProcessesConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @property
    def site(self) -> str:
        """The site that the dictionary is fitted to."""
        return self.train.site or self.activations.sites[0]

    @property
    def steps(self) -> int:
        """Full batches within `train.rows`."""
        return self.train.rows // self.train.batch_rows

    @property
    def lr(self) -> float:
        """Peak learning rate: `train.lr`, or the fit of Gao et al. scaled as 1/sqrt(n_latents)."""
        return self.train.lr or float(2e-4 * (2**14 / self.sae.n_latents) ** 0.5)

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        """Check what no section can check alone; all problems at once."""
        problems = [f"{path}: {problem}" for path, problem in self._disagreements()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _disagreements(self) -> Iterator[tuple[str, str]]:
        train, activations, processes = self.train, self.activations, self.processes
        sites = ", ".join(activations.sites)
        if train.site is None and len(activations.sites) > 1:
            yield "train.site", f"missing; activations.sites has several: {sites}"
        if train.site is not None and train.site not in activations.sites:
            yield "train.site", f"{train.site} is not among activations.sites ({sites})"
        if train.batch_rows % activations.streams:
            yield (
                "train.batch_rows",
                f"{train.batch_rows} is not a multiple of activations.streams ({activations.streams})",
            )
        if train.rows < train.batch_rows:
            yield "train.rows", f"{train.rows} is less than one batch ({train.batch_rows} rows)"
        if activations.streams % processes.trainers:
            yield (
                "processes.trainers",
                f"{processes.trainers} does not divide activations.streams ({activations.streams})",
            )
        synthetic = self.model.kind == "synthetic"
        if synthetic != (self.corpus.kind == "synthetic"):
            yield "corpus.kind", "a synthetic model goes with a synthetic corpus, and only with one"
        if synthetic and activations.sites != (SYNTHETIC_SITE,):
            yield "activations.sites", f"a synthetic model has one site: [{SYNTHETIC_SITE}]"
        if not synthetic and SYNTHETIC_SITE in activations.sites:
            yield "activations.sites", f"{SYNTHETIC_SITE} is a site of the synthetic model only"


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read and validate a run file.

    Args:
        path: The YAML file.
        overrides: `section.key=value` strings; the value is YAML.

    Raises:
        ConfigError: With one line for every problem, each with the user's own path.
    """
    data = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(data, override)
    try:
        run = Run.model_validate(data)
    except ValidationError as exc:
        errors = exc.errors()
        locations = [error["loc"] for error in errors]
        lines = [
            line
            for error in errors
            if not any(len(loc) > len(error["loc"]) and loc[: len(error["loc"])] == error["loc"] for loc in locations)
            for line in _explain(error, data)
        ]
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines)) from exc
    return _with_absolute_stores(run)


def dump_run(run: Run) -> str:
    """The resolved run as YAML; `load_run` reads it back to an equal run."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two nested mappings differ: `["train.lr: 0.001 -> 0.002"]`."""
    lines: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a repeated key is an error, not a silent override."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key_node.value!r} appears twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506
    except FileNotFoundError as exc:
        raise ConfigError(f"{path}: no such file; give the path of a run file (YAML)") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: cannot be read: {exc}") from exc
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: not valid YAML: {exc.problem}") from exc
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold a mapping with keys {', '.join(Run.model_fields)}")
    return data


def _apply_override(data: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: write it as section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise ConfigError(f"--set {override}: the value is not valid YAML") from exc
    section = data
    for key in keys[:-1]:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: {key} is a value, not a section")
    section[keys[-1]] = value


def _explain(error: ErrorDetails, data: Mapping[str, Any]) -> Iterator[str]:
    """One line per problem, with the path that the user wrote."""
    path, section = _locate(error["loc"], data)
    dotted = ".".join(path)
    message = error["msg"].removeprefix("Value error, ")
    match error["type"]:
        case "extra_forbidden":
            known = list(section.model_fields) if section else []
            close = difflib.get_close_matches(path[-1], known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
            yield f"{dotted}: unknown key; {hint}"
        case "missing":
            yield f"{dotted}: missing"
        case "union_tag_not_found":
            yield f"{dotted}.kind: missing; give {_kinds(error)}"
        case "union_tag_invalid":
            yield f"{dotted}.kind: unknown kind; give {_kinds(error)}"
        case "value_error" if not path:  # the cross-section check: it carries its own paths
            yield from message.splitlines()
        case "value_error":
            yield f"{dotted}: {message}"
        case _:
            yield f"{dotted}: {message[0].lower()}{message[1:]} (got {error['input']!r})"


def _kinds(error: ErrorDetails) -> str:
    """The kinds that a discriminated union knows."""
    expected = error.get("ctx", {}).get("expected_tags")
    return f"one of {expected}" if expected else "one of the known kinds"


def _locate(
    loc: tuple[int | str, ...], data: Mapping[str, Any]
) -> tuple[list[str], type[Section] | None]:
    """The user's path (without pydantic's union tags) and the section that holds its last key."""
    path: list[str] = []
    holder: type[Section] | None = Run
    here: Any = data
    for position, key in enumerate(loc):
        is_tag = isinstance(here, Mapping) and here.get("kind") == key and key not in here
        if is_tag:
            continue
        path.append(str(key))
        if position < len(loc) - 1:
            tag = loc[position + 1]
            holder = _subsection(holder, key, tag)
            try:
                here = here[key]
            except (KeyError, IndexError, TypeError):
                here = None
    return path, holder


def _subsection(section: type[Section] | None, key: int | str, tag: int | str) -> type[Section] | None:
    """The section below `key`; of a union the one whose kind is `tag`."""
    if section is None or key not in section.model_fields:
        return None
    candidates = list(_sections_in(section.model_fields[str(key)].annotation))
    tagged = [c for c in candidates if "kind" in c.model_fields and c.model_fields["kind"].default == tag]
    return (tagged or candidates or [None])[0]


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _with_absolute_stores(run: Run) -> Run:
    """Local paths as file:// URLs, so that the resolved run means the same from any folder."""
    store = run.store
    resolved = {
        name: url if re.match(r"[a-z0-9]+://", url) else Path(os.path.abspath(url)).as_uri()
        for name, url in (("activations", store.activations), ("runs", store.runs))
    }
    return run.model_copy(update={"store": store.model_copy(update=resolved)})
