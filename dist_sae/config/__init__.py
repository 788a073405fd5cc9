"""The run file: one YAML document that describes a whole run, on a laptop or a cluster.

Imports pydantic, PyYAML and the standard library only, so that `--help`, rendering and CI
need no torch.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, repeat, takewhile
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import ValidationError, model_validator

from dist_sae.config.base import Section, Shape, folder_of
from dist_sae.config.cluster import ClusterConfig
from dist_sae.config.data import (
    SYNTHETIC_SITE,
    ActivationsConfig,
    CorpusConfig,
    ModelConfig,
    StoreConfig,
)
from dist_sae.config.messages import explain
from dist_sae.config.sae import SaeConfig
from dist_sae.config.train import (
    LAST_PORT,
    EvaluateConfig,
    ExportConfig,
    ProcessesConfig,
    TelemetryConfig,
    TrainConfig,
)
from dist_sae.errors import ConfigError

_LEFT_TO_THE_PLAN = {
    "activations": ("streams", "unit_rows"),
    "train": ("rows", "normaliser_rows"),
}
RunName = Annotated[
    str,
    Shape(
        r"^[a-z0-9]([a-z0-9.-]{0,50}[a-z0-9])?$",
        "use lower-case letters, digits, '-' and '.', at most 52 of them, with a letter or a digit "
        "first and last",
    ),
]


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
    export: ExportConfig = ExportConfig()
    processes: ProcessesConfig = ProcessesConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def model_shards(self) -> int:
        """Ranks that hold the model together, which make one producer."""
        return self.model.shards if self.model.kind == "huggingface" else 1

    @property
    def site(self) -> str:
        """The site that the dictionary is fitted to."""
        return self.train.site or self.activations.sites[0]

    @property
    def left_open(self) -> list[tuple[str, str]]:
        """Section and key of the settings that the file leaves to the plan."""
        return [
            (section, key)
            for section, keys in _LEFT_TO_THE_PLAN.items()
            for key in keys
            if getattr(getattr(self, section), key) in (None, "all")
        ]

    def filled(self, values: Mapping[str, Mapping[str, Any]]) -> Self:
        """With these values, by section and key, for what the file leaves to the plan."""
        sections: dict[str, dict[str, Any]] = {}
        for section, key in self.left_open:
            if key in values.get(section, {}):
                sections.setdefault(section, {})[key] = values[section][key]
        return self.model_copy(
            update={
                name: getattr(self, name).model_copy(update=update)
                for name, update in sections.items()
            }
        ).resolved()

    @property
    def rows(self) -> int:
        """`train.rows` as a number.

        Raises:
            ConfigError: It is `all`, which the plan decides: see `Plan.resolve`.
        """
        if self.train.rows == "all":
            raise ConfigError("train.rows: all is not known before there is a plan; run plan first")
        return self.train.rows

    @property
    def steps(self) -> int:
        """Full batches within `train.rows`."""
        return self.rows // self.train.batch_rows

    @property
    def replicas(self) -> int:
        """Whole dictionaries that the trainer ranks hold together."""
        return self.processes.trainers // self.processes.shards

    @property
    def lr(self) -> float:
        """Peak learning rate: `train.lr`, or the fit of Gao et al. scaled as 1/sqrt(n_latents)."""
        return self.train.lr or float(2e-4 * (2**14 / self.sae.n_latents) ** 0.5)

    @property
    def dead_after_rows(self) -> int:
        """`sae.dead_after_rows`, or ten windows in a run, of at most the 10 M rows of Gao et al."""
        return self.sae.dead_after_rows or max(1, min(10_000_000, self.rows // 10))

    def resolved(self) -> Self:
        """With numbers where the file leaves a setting to the others (null).

        What it leaves to the plan stays open, and what follows from that: see `Plan.resolve`.
        """
        follows = None if self.train.rows == "all" else self.dead_after_rows
        dead_after_rows = self.sae.dead_after_rows or follows
        sae = self.sae.model_copy(update={"dead_after_rows": dead_after_rows})
        train = self.train.model_copy(update={"lr": self.lr})
        return self.model_copy(update={"sae": sae, "train": train})

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        """Check what no section can check alone; all problems at once."""
        problems = [f"{path}: {problem}" for path, problem in self._disagreements()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _shard_problems(self) -> Iterator[tuple[str, str]]:
        n_latents, shards = self.sae.n_latents, self.processes.shards
        if self.processes.trainers % shards:
            yield (
                "processes.shards",
                f"{shards} does not divide processes.trainers ({self.processes.trainers})",
            )
        if n_latents % shards:
            below = n_latents // shards * shards
            nearest = " or ".join(str(n) for n in (below, below + shards) if n)
            yield (
                "sae.n_latents",
                f"{n_latents} is not a multiple of processes.shards ({shards}); use {nearest}",
            )
        if self.sae.kind == "routed" and self.sae.experts % shards:
            yield (
                "sae.experts",
                f"{self.sae.experts} is not a multiple of processes.shards ({shards}): "
                f"a shard holds whole experts",
            )
        if self.train.rows != "all" and self.sae.init_rows > self.train.rows:
            wanted = self.sae.init_rows
            yield "sae.init", f"data wants {wanted} rows, of train.rows; or: random"

    def ahead_problem(
        self, rows: int, first_windows: int, unit_rows: Iterable[int], most: int | None = None
    ) -> str | None:
        """Why `store.max_ahead_units` would keep the run from its first step, if it would.

        Args:
            rows: Rows that the run reads before it can say that it has come any further.
            first_windows: Units of its streams' first windows.
            unit_rows: Rows of the units from where it begins to read, in their order.
            most: How many units there are.
        """
        ahead = self.store.max_ahead_units
        if ahead is None:
            return None
        rows += 4 * self.train.batch_rows  # batches are assembled ahead
        # streams may be a window apart, for their units are not equally long
        least = 2 * first_windows + 1
        least += sum(1 for _ in takewhile(rows.__gt__, accumulate(unit_rows)))
        least = least if most is None else min(least, most)
        if ahead >= least:
            return None
        return (
            f"{ahead} would stop the run: its streams' windows and the {rows} rows that it begins "
            f"with hold {least} units at once; use {least} or more"
        )

    def _retention_problems(self) -> Iterator[tuple[str, str]]:
        store = self.store
        if store.retention == "delete_consumed" and self.train.max_passes > 1:
            yield "store.retention", "delete_consumed leaves nothing for train.max_passes above 1"
        activations = self.activations
        if activations.streams is None or activations.unit_rows is None:
            return  # the plan decides how large units and windows are
        problem = self.ahead_problem(
            max(self.train.normaliser_rows or 0, self.sae.init_rows),
            activations.streams * activations.window_units,
            repeat(activations.unit_rows),
        )
        if problem:
            yield "store.max_ahead_units", problem

    def _pod_problems(self) -> Iterator[tuple[str, str]]:
        trainer, producer = self.cluster.trainer, self.cluster.producer
        if self.processes.trainers % trainer.ranks:
            yield (
                "cluster.trainer.ranks",
                f"{trainer.ranks} does not divide processes.trainers ({self.processes.trainers})",
            )
        for name, ranks, gpus in (
            ("trainer", trainer.ranks, trainer.gpus),
            ("producer", self.model_shards, producer.gpus),
        ):
            if gpus not in (0, ranks):
                yield (
                    f"cluster.{name}.gpus",
                    f"{gpus} for {ranks} ranks in a pod: each has one of its own; use {ranks} or 0",
                )

    def _disagreements(self) -> Iterator[tuple[str, str]]:
        train, activations, processes = self.train, self.activations, self.processes
        sites = ", ".join(activations.sites)
        if train.parent and train.parent.run == self.name:
            yield "train.parent.run", f"{self.name} is this run; give it a name of its own"
        if train.keep_best and not train.heldout_rows:
            yield "train.keep_best", "needs train.heldout_rows, to know which are the best"
        if train.heldout_rows and not activations.heldout_share:
            yield "train.heldout_rows", "nothing is held out; set activations.heldout_share"
        if train.site is None and len(activations.sites) > 1:
            yield "train.site", f"missing; activations.sites has several: {sites}"
        if train.site is not None and train.site not in activations.sites:
            yield "train.site", f"{train.site} is not among activations.sites ({sites})"
        streams = activations.streams or processes.trainers
        if train.batch_rows % streams:
            yield (
                "train.batch_rows",
                f"{train.batch_rows} is not a multiple of activations.streams ({streams})",
            )
        if train.rows != "all" and train.rows < train.batch_rows:
            yield "train.rows", f"{train.rows} is less than one batch ({train.batch_rows} rows)"
        if streams % processes.trainers:
            yield (
                "processes.trainers",
                f"{processes.trainers} does not divide activations.streams ({streams})",
            )
        yield from self._shard_problems()
        yield from self._pod_problems()
        yield from self._retention_problems()
        last_port = (self.telemetry.port or 0) + processes.producers + processes.trainers - 1
        if self.telemetry.port and last_port > LAST_PORT:
            yield (
                "telemetry.port",
                f"{self.telemetry.port} leaves no ports for {processes.producers} producers and "
                f"{processes.trainers} trainers: the last one would be {last_port}",
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
    return resolve_run(_read_yaml(Path(path)), overrides, str(path))


def resolve_run(data: dict[str, Any], overrides: Sequence[str], origin: str) -> Run:
    """A run from its sections and overrides; raises like `load_run`."""
    for override in overrides:
        _apply_override(data, override)
    return _with_absolute_stores(validate_run(data, origin))


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The sections that `section.key=value` strings make by themselves."""
    data: dict[str, Any] = {}
    for override in overrides:
        _apply_override(data, override)
    return data


def validate_run(data: Mapping[str, Any], origin: str) -> Run:
    """A run from its sections, resolved.

    Args:
        data: The sections.
        origin: Where they come from, for messages.

    Raises:
        ConfigError: With one line for every problem.
    """
    try:
        return Run.model_validate(data).resolved()
    except ValidationError as exc:
        lines = explain(exc.errors(), Run)
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines)) from exc


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


class _Loader(yaml.SafeLoader):
    """YAML in which a repeated key is an error, not a silent override, and 1e6 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, count in Counter(key.value for key in keys).items():
            if count > 1:
                again = [node.start_mark for node in keys if node.value == key][1]
                raise yaml.MarkedYAMLError(problem=f"key {key!r} appears twice", problem_mark=again)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML speaks, takes 1e6 and 1e-3 for strings: it wants 1.0e+6
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
    """The sections of a run file, not validated yet.

    Raises:
        ConfigError: It is no YAML, or no mapping.
    """
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = getattr(exc, "problem", None) or str(exc).splitlines()[0]
        raise ConfigError(f"{origin}{place}: not valid YAML: {problem}") from exc
    if not isinstance(data, dict):
        raise ConfigError(f"{origin}: must hold a mapping with keys {', '.join(Run.model_fields)}")
    return data


def _apply_override(data: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: write it as section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as exc:
        raise ConfigError(f"--set {override}: the value is not valid YAML") from exc
    section = data
    for key in keys[:-1]:
        if section.get(key) is None:  # absent, or there without a value
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: {key} is a value, not a section")
    section[keys[-1]] = value


def _with_absolute_stores(run: Run) -> Run:
    """Folders as absolute paths, so that the resolved run means the same from any folder."""
    store = run.store
    resolved = {
        name: folder_of(url) or url
        for name, url in (("activations", store.activations), ("runs", store.runs))
    }
    return run.model_copy(update={"store": store.model_copy(update=resolved)})
