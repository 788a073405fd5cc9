"""The root of a run file, and checks that its sections agree."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, repeat, takewhile
from typing import Annotated, Any, Self

from pydantic import model_validator

from dist_sae.config.base import Section, Shape
from dist_sae.config.cluster import ClusterConfig
from dist_sae.config.data import (
    SYNTHETIC_SITE,
    ActivationsConfig,
    CorpusConfig,
    ModelConfig,
    StoreConfig,
)
from dist_sae.config.index import IndexConfig
from dist_sae.config.renamed import with_new_names
from dist_sae.config.sae import SaeConfig
from dist_sae.config.sweep import SweepConfig
from dist_sae.config.train import (
    LAST_PORT,
    EvaluateConfig,
    ExportConfig,
    ProcessesConfig,
    TelemetryConfig,
    TimeoutsConfig,
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
        "use at most 52 lower-case letters, digits, '-' and '.', and start and end with a letter "
        "or a digit",
    ),
]


def describe_sites(reads: Sequence[str], writes: Sequence[str]) -> str:
    """Return `a, b` for a dictionary that writes the sites that it reads, otherwise `a, b -> c`."""
    both = [", ".join(sites) for sites in (reads, writes)]
    return both[0] if both[0] == both[1] else " -> ".join(both)


class Run(Section):
    """The root of a run file."""

    name: RunName
    """Name of the run, its folder and its Kubernetes objects. Use lower-case letters, digits, '-'
    and '.'."""
    store: StoreConfig
    model: ModelConfig
    corpus: CorpusConfig
    activations: ActivationsConfig
    sae: SaeConfig
    train: TrainConfig
    sweep: SweepConfig | None = None
    """Several dictionaries to train on the same batches. null: one, as in `sae` and `train`."""
    evaluate: EvaluateConfig = EvaluateConfig()
    index: IndexConfig = IndexConfig()
    export: ExportConfig = ExportConfig()
    processes: ProcessesConfig = ProcessesConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="before")
    @classmethod
    def _by_new_names(cls, data: Any) -> Any:
        return with_new_names(data) if isinstance(data, Mapping) else data

    @property
    def tensor_parallel(self) -> int:
        """Number of ranks that share one copy of the language model: the ranks of one producer."""
        return self.model.tensor_parallel if self.model.kind == "huggingface" else 1

    @property
    def reads(self) -> tuple[str, ...]:
        """Sites that the dictionary reads."""
        return self.sae.reads or (self.train.site or self.activations.sites[0],)

    @property
    def writes(self) -> tuple[str, ...]:
        """Sites that the dictionary reconstructs."""
        return self.sae.writes or self.reads

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site that the dictionary reads or writes, once each."""
        return tuple(dict.fromkeys((*self.reads, *self.writes)))

    @property
    def site(self) -> str:
        """The first site that the dictionary reads."""
        return self.reads[0]

    @property
    def described_sites(self) -> str:
        """Description of the sites for messages; see `describe_sites`."""
        return describe_sites(self.reads, self.writes)

    @property
    def left_open(self) -> list[tuple[str, str]]:
        """Section and key of each setting that the file leaves to the plan."""
        return [
            (section, key)
            for section, keys in _LEFT_TO_THE_PLAN.items()
            for key in keys
            if getattr(getattr(self, section), key) in (None, "all")
        ]

    def filled(self, values: Mapping[str, Mapping[str, Any]]) -> Self:
        """Return the run with these values for the settings that the file leaves to the plan.

        Args:
            values: Values by section and key.
        """
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
            ConfigError: `train.rows` is `all`, which only `Plan.resolve` can turn into a number.
        """
        if self.train.rows == "all":
            raise ConfigError(
                "train.rows: all is not known before there is a plan; run `dist-sae plan` first"
            )
        return self.train.rows

    @property
    def steps(self) -> int:
        """Number of training steps: the full batches within `train.rows`."""
        return self.rows // self.train.batch_rows

    @property
    def replicas(self) -> int:
        """Number of copies of the dictionary on the trainer ranks."""
        return self.processes.trainers // self.processes.latent_shards

    @property
    def lr(self) -> float:
        """Peak learning rate: `train.lr`, or Gao et al.'s fit, scaled as 1/sqrt(n_latents)."""
        return self.train.lr or float(2e-4 * (2**14 / self.sae.n_latents) ** 0.5)

    @property
    def dead_after_rows(self) -> int:
        """`sae.dead_after_rows`, or a tenth of the run's rows, at most Gao et al.'s 10 M rows."""
        return self.sae.dead_after_rows or max(1, min(10_000_000, self.rows // 10))

    def resolved(self) -> Self:
        """Return the run with values for the settings that are null and follow from other settings.

        Settings that depend on the plan stay open; see `Plan.resolve`. A sweep is returned
        unchanged, since its values depend on each job; see `jobs_of`.
        """
        if self.sweep:
            return self
        follows = None if self.train.rows == "all" else self.dead_after_rows
        dead_after_rows = self.sae.dead_after_rows or follows
        sae = self.sae.model_copy(update={"dead_after_rows": dead_after_rows})
        train = self.train.model_copy(update={"lr": self.lr})
        return self.model_copy(update={"sae": sae, "train": train})

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        """Check settings across sections, and report all problems at once."""
        problems = [f"{path}: {problem}" for path, problem in self._disagreements()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_validator(mode="after")
    def _model_is_reached_like_the_stores(self) -> Self:
        if self.model.kind == "huggingface":
            self.model.bind(self.store.s3)
        return self

    def _shard_problems(self) -> Iterator[tuple[str, str]]:
        n_latents, shards = self.sae.n_latents, self.processes.latent_shards
        if self.processes.trainers % shards:
            yield (
                "processes.latent_shards",
                f"{shards} does not divide processes.trainers ({self.processes.trainers})",
            )
        if n_latents % shards:
            below = n_latents // shards * shards
            nearest = " or ".join(str(n) for n in (below, below + shards) if n)
            yield (
                "sae.n_latents",
                f"{n_latents} is not a multiple of processes.latent_shards ({shards}); "
                f"use {nearest}",
            )
        elif problem := self.sae.shards_problem(shards):
            key, why = problem
            yield f"sae.{key}", why
        if self.train.rows != "all" and self.sae.init_rows > self.train.rows:
            wanted = self.sae.init_rows
            yield (
                "sae.init",
                f"data needs {wanted} rows, one per latent, which is more than train.rows "
                f"({self.train.rows}); train on more rows, lower sae.n_latents, or use random",
            )

    def ahead_problem(
        self, rows: int, first_windows: int, unit_rows: Iterable[int], most: int | None = None
    ) -> str | None:
        """Return why `store.max_ahead_units` would stop the run before its first step, or None.

        Args:
            rows: Number of rows that the run reads before it reports any progress.
            first_windows: Number of units in the first windows of its streams.
            unit_rows: Rows of each unit, in order, from the first one that the run reads.
            most: Number of units in the activation set.
        """
        ahead = self.store.max_ahead_units
        if ahead is None:
            return None
        least = self.least_ahead(rows, first_windows, unit_rows)
        least = least if most is None else min(least, most)
        if ahead >= least:
            return None
        return (
            f"{ahead} would block the run: its streams' windows and its first "
            f"{rows + self.rows_ahead} rows need {least} units at once; use {least} or more"
        )

    def least_ahead(self, rows: int, first_windows: int, unit_rows: Iterable[int]) -> int:
        """Return the least `store.max_ahead_units` that lets the run start; see `ahead_problem`."""
        rows += self.rows_ahead
        # units differ in length, so one stream may be a window ahead of another
        least = 2 * first_windows + 1
        return least + sum(1 for _ in takewhile(rows.__gt__, accumulate(unit_rows)))

    @property
    def rows_ahead(self) -> int:
        """Rows in memory: two batches in the queue, one being assembled, one being trained on."""
        return 4 * self.train.batch_rows

    def _retention_problems(self) -> Iterator[tuple[str, str]]:
        store = self.store
        if store.retention == "delete_consumed" and self.train.max_passes > 1:
            yield (
                "store.retention",
                "delete_consumed leaves no data for a second pass (train.max_passes)",
            )
        activations = self.activations
        if activations.streams is None or activations.unit_rows is None:
            return  # only the plan knows these sizes
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
            ("producer", self.tensor_parallel, producer.gpus),
            ("index", self.index.latent_shards, self.cluster.index.gpus),
        ):
            if gpus not in (0, ranks):
                yield (
                    f"cluster.{name}.gpus",
                    f"{gpus} for {ranks} ranks in a pod: each rank needs one; use {ranks} or 0",
                )

    def _site_problems(self) -> Iterator[tuple[str, str]]:
        there, site = self.activations.sites, self.train.site
        sites = ", ".join(there)
        if site is None and self.sae.reads is None and len(there) > 1:
            yield "train.site", f"missing; activations.sites has several: {sites}"
        if site is not None and self.sae.reads is not None:
            yield "train.site", "sae.reads already names the sites; leave one of them out"
        named = {"train.site": (site,), "sae.reads": self.sae.reads, "sae.writes": self.sae.writes}
        for key, values in named.items():
            for value in dict.fromkeys(values or ()):
                if value is not None and value not in there:
                    yield key, f"{value} is not among activations.sites ({sites})"
                if values and values.count(value) > 1:
                    yield key, f"names {value} twice"
        if problem := self.sae.sites_problem(self.reads, self.writes):
            yield ("sae.writes" if self.sae.writes else "sae.reads"), problem

    def _disagreements(self) -> Iterator[tuple[str, str]]:
        train, activations, processes = self.train, self.activations, self.processes
        if train.parent and train.parent.run == self.name:
            yield "train.parent.run", f"{self.name} is this run itself; give this run another name"
        if train.keep_best and not train.heldout_rows:
            yield "train.keep_best", "needs train.heldout_rows to tell which checkpoint is best"
        if train.heldout_rows and not activations.heldout_share:
            yield "train.heldout_rows", "nothing is held out; set activations.heldout_share"
        yield from self._site_problems()
        if activations.streams and train.batch_rows % activations.streams:
            yield (
                "train.batch_rows",
                f"{train.batch_rows} is not a multiple of activations.streams "
                f"({activations.streams})",
            )
        if train.rows != "all" and train.rows < train.batch_rows:
            yield "train.rows", f"{train.rows} is less than one batch ({train.batch_rows} rows)"
        if train.batch_rows % processes.trainers:
            yield (
                "processes.trainers",
                f"{processes.trainers} does not divide train.batch_rows ({train.batch_rows})",
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
        yield from self._model_problems()

    def _model_problems(self) -> Iterator[tuple[str, str]]:
        activations = self.activations
        of_other = [site for site in activations.sites if "@" in site]
        other = self.model.other if self.model.kind == "huggingface" else None
        if of_other and other is None:
            yield "activations.sites", f"{of_other[0]} is a site of model.other, which is not set"
        if other and not of_other:
            yield (
                "model.other",
                "activations.sites has none of its sites, such as resid_post.7@other",
            )
        synthetic = self.model.kind == "synthetic"
        if synthetic != (self.corpus.kind == "synthetic"):
            yield "corpus.kind", "model.kind and corpus.kind must both be synthetic, or neither"
        if synthetic and activations.sites != (SYNTHETIC_SITE,):
            yield "activations.sites", f"a synthetic model has one site: [{SYNTHETIC_SITE}]"
        if not synthetic and SYNTHETIC_SITE in activations.sites:
            yield "activations.sites", f"{SYNTHETIC_SITE} is a site of the synthetic model only"
