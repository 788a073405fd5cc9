"""`dist-sae bench synth`: SynthSAEBench (Chanin and Garriga-Alonso 2026, arXiv:2602.14687).

sae-lens generates a world with known features and draws its rows. Our trainer and sae-lens's
trainer train on these rows in the same order, and our dictionaries are exported to sae-lens. Then
sae-lens scores every dictionary, as its users would load it, with its own metrics on the same
held-out rows.

    worlds.py         named worlds, and the trainers compared in them
    rows.py           the rows, on disk
    orthogonal.py     the features' directions
    drawing.py        which features fire
    detection.py      F1 at the same L0 for every dictionary
    run_dist_sae.py   our trainer, on one rank or several
    run_sae_lens.py   sae-lens's part, run by its own Python (`bench.peers.environments`)
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_sae.bench.peers import DEFAULT_FOLDER
from dist_sae.bench.peers.environments import PEERS, Peer, PeerError, ensure_environment
from dist_sae.bench.peers.processes import run_script
from dist_sae.bench.synth.worlds import DIST_SAE, SAE_LENS, Trainer, World
from dist_sae.distributed.local_ranks import rank_environments
from dist_sae.errors import ConfigError

logger = logging.getLogger(__name__)

HELDOUT_ROWS = 30_000

_HERE = Path(__file__).parent
_OURS, _THEIRS = (
    next(peer for peer in PEERS if peer.name == name) for name in ("dist-sae", "sae-lens")
)
_COMPLETE = "complete.json"
_ROW_SEED = 0  # for drawing a world's rows; a trainer's seed decides only their order
_TRAIN = "train."


class Comparison(NamedTuple):
    """The trainers to compare, and the world, rows and seeds that they share."""

    world: World
    trainers: Sequence[Trainer]
    rows: int
    n_latents: int
    batch: int
    lr: float
    seeds: Sequence[int]
    shards: Sequence[int]
    """Numbers of latent shards. Each of our dictionaries is trained once with each of them."""
    products: str
    """Precision of our encoder products."""
    threads: int
    """CPU threads of a trainer, divided among its shards."""
    l0: float
    """L0 at which every dictionary's F1 is reported, in addition to the F1 at its own L0."""

    @property
    def steps(self) -> int:
        """Steps of each run."""
        return self.rows // self.batch

    def jobs(self) -> Iterator[tuple[Trainer, int, int]]:
        """Yield the trainer, shards and seed of each run."""
        for seed in self.seeds:
            for trainer in self.trainers:
                for shards in self.shards if trainer.library == DIST_SAE else (1,):
                    yield trainer, shards, seed

    def spec(self, trainer: Trainer, shards: int, seed: int) -> dict[str, Any]:
        """Return the settings for the process that trains one dictionary, without its folders."""
        own = {key: value for key, value in trainer.settings.items() if key.startswith(_TRAIN)}
        return {
            "action": "train",
            "kind": trainer.kind,
            "settings": {k: v for k, v in trainer.settings.items() if k not in own},
            "train": {key.removeprefix(_TRAIN): value for key, value in own.items()},
            "n_latents": self.n_latents,
            "batch": self.batch,
            "steps": self.steps,
            "lr": self.lr,
            "seed": seed,
            "shards": shards,
            "products": self.products,
            "threads": max(1, self.threads // shards),
        }


def bench_synth(comparison: Comparison, folder: Path | None = None) -> dict[str, Any]:
    """Train and score every dictionary.

    Args:
        comparison: The trainers, world and settings.
        folder: Folder of sae-lens's environment and of worlds, which are generated once.

    Returns:
        The world and `dictionaries`, one row each. The row of a run that failed has an `error`.

    Raises:
        ConfigError: The settings of one of our runs are invalid, sae-lens cannot be installed, or
            sae-lens cannot generate the world.
    """
    _check(comparison)
    home = (folder or DEFAULT_FOLDER).expanduser()
    try:
        python = ensure_environment(_THEIRS, home)
    except (PeerError, OSError) as error:
        raise ConfigError(f"sae-lens {_THEIRS.version} could not be installed: {error}") from error
    world = _ensure_world(comparison, python, home / "worlds")
    found = []
    for trainer, shards, seed in comparison.jobs():
        row = _row(comparison, trainer, shards, seed)
        with tempfile.TemporaryDirectory(prefix="dist-sae-synth-") as work:
            try:
                row |= _train_and_score(comparison, row, trainer, python, world, Path(work))
            except PeerError as error:
                row["error"] = str(error)
                logger.warning("%s %s: %s", trainer.library, trainer, error)
        found.append(row)
    return {
        "world": comparison.world.name,
        "rows": comparison.steps * comparison.batch,
        "n_latents": comparison.n_latents,
        "batch": comparison.batch,
        "lr": comparison.lr,
        "heldout_rows": HELDOUT_ROWS,
        "l0": comparison.l0,
        "sae_lens": _THEIRS.version,
        "dictionaries": found,
    }


def render_table(result: Mapping[str, Any]) -> str:
    """Render the result as a text table."""
    head = ("trainer", "dictionary", "shards", "seed")
    formats = {
        "l0": ".1f", "fvu": ".4f", "f1": ".3f", "precision": ".3f", "recall": ".3f",
        "f1_at_l0": ".3f", "mcc": ".3f", "uniqueness": ".3f", "dead": "d", "seconds": ".0f",
    }  # fmt: skip
    names = (name.replace("_at_l0", f" at {result['l0']:g}") for name in formats)
    table = [(*head, *names)]
    for row in result["dictionaries"]:
        values = (
            "-" if row[column] is None else format(row[column], spec)
            for column, spec in formats.items()
        )
        settings = (f"{key}={value}" for key, value in row["settings"].items())
        dictionary = " ".join([row["kind"], *settings])
        table.append((row["trainer"], dictionary, str(row["shards"]), str(row["seed"]), *values))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        f"{result['world']}: {result['n_latents']:,} latents, {result['rows']:,} rows in batches "
        f"of {result['batch']:,}, learning rate {result['lr']:g}; scored by sae-lens "
        f"{result['sae_lens']} on {result['heldout_rows']:,} held-out rows"
    ]
    lines += [
        "  ".join(
            cell.ljust(width) if number < 2 else cell.rjust(width)  # noqa: PLR2004 - names
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in table
    ]
    for row in result["dictionaries"]:
        if row["error"]:
            lines.append(f"{row['trainer']} {row['kind']}: ERROR: {row['error']}")
    return "\n".join(lines) + "\n"


def _check(comparison: Comparison) -> None:
    """Reject runs that cannot be trained, before anything is installed or generated."""
    from dist_sae.bench.synth.run_dist_sae import build_run  # imports torch
    from dist_sae.interop.export import problem

    if comparison.steps < 1:
        raise ConfigError(f"--rows {comparison.rows}: less than one batch of {comparison.batch}")
    if not comparison.l0 > 0:
        raise ConfigError(f"--l0 {comparison.l0:g}: must be above 0")
    for trainer, shards, seed in comparison.jobs():
        if trainer.library == DIST_SAE:
            run = build_run(comparison.spec(trainer, shards, seed) | {"work": "nowhere"})
            if reason := problem(run):
                raise ConfigError(f"{trainer}: {reason}")


def _ensure_world(comparison: Comparison, python: Path, home: Path) -> Path:
    """Return the world's folder, after generating the world if it is missing."""
    rows, model = comparison.steps * comparison.batch, comparison.world.model
    saved = (
        [_digest(file) for file in sorted(Path(model).iterdir())] if isinstance(model, str) else []
    )
    content = json.dumps(
        [model, saved, rows, HELDOUT_ROWS, _ROW_SEED, _THEIRS.version], sort_keys=True
    )
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    folder = home / f"{comparison.world.name}-{digest}"
    if (folder / _COMPLETE).exists():
        return folder
    logger.info("generating world %s with %d rows in %s", comparison.world.name, rows, folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    spec = {
        "action": "make",
        "model": model,
        "rows": rows,
        "heldout_rows": HELDOUT_ROWS,
        "seed": _ROW_SEED,
        "folder": str(folder),
        "threads": comparison.threads,
    }
    try:
        with tempfile.TemporaryDirectory(prefix="dist-sae-synth-") as work:
            _run(_THEIRS, python, spec, Path(work))
    except PeerError as error:
        raise ConfigError(
            f"sae-lens could not generate world {comparison.world.name}: {error}"
        ) from error
    (folder / _COMPLETE).write_text(content, encoding="utf-8")  # written last
    return folder


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _row(comparison: Comparison, trainer: Trainer, shards: int, seed: int) -> dict[str, Any]:
    scores = (
        "l0", "fvu", "f1", "precision", "recall", "f1_at_l0", "mcc", "uniqueness", "dead",
        "shrinkage",
    )  # fmt: skip
    return {
        "trainer": trainer.library,
        "version": None,
        "kind": trainer.kind,
        "settings": trainer.settings,
        "shards": shards,
        "seed": seed,
        "rows": comparison.steps * comparison.batch,
        "seconds": None,
        **dict.fromkeys(scores),
        "true_l0": None,
        "error": None,
    }


def _train_and_score(
    comparison: Comparison,
    row: Mapping[str, Any],
    trainer: Trainer,
    python: Path,
    world: Path,
    work: Path,
) -> dict[str, Any]:
    shards, ours = row["shards"], trainer.library == DIST_SAE
    spec = comparison.spec(trainer, shards, row["seed"])
    spec |= {"folder": str(world), "work": str(work), "out": str(work / "dictionary")}
    ranks = rank_environments(shards, shards) if shards > 1 else [{}]
    peer, runs_with = (_OURS, ensure_environment(_OURS, work)) if ours else (_THEIRS, python)
    trained = _run(peer, runs_with, spec, work, ranks)
    out = trained.get("out", spec["out"])
    scoring = {
        "action": "score",
        "folder": str(world),
        "out": out,
        "l0": comparison.l0,
        "threads": comparison.threads,
    }
    scored = _run(_THEIRS, python, scoring, work)
    detectors = scored["classification"]
    found = {
        "version": trained["version"],
        "seconds": trained["seconds"],
        "l0": scored["sae_l0"],
        "fvu": 1 - scored["explained_variance"],
        "f1": detectors["f1_score"],
        "precision": detectors["precision"],
        "recall": detectors["recall"],
        "f1_at_l0": scored["f1_at_l0"],
        "mcc": scored["mcc"],
        "uniqueness": scored["uniqueness"],
        "dead": scored["dead_latents"],
        "shrinkage": scored["shrinkage"],
        "true_l0": scored["true_l0"],
    }
    logger.info(
        "%s %s: L0 %.1f, F1 %.3f, MCC %.3f",
        trainer.library, trainer, found["l0"], found["f1"], found["mcc"],
    )  # fmt: skip
    return found


def _run(
    peer: Peer,
    python: Path,
    spec: Mapping[str, Any],
    work: Path,
    ranks: Sequence[Mapping[str, str]] = ({},),
) -> dict[str, Any]:
    script = _HERE / ("run_dist_sae.py" if peer is _OURS else "run_sae_lens.py")
    return run_script(peer, python, script, spec, work, threads=spec["threads"], ranks=ranks)


__all__ = ["DIST_SAE", "SAE_LENS", "Comparison", "bench_synth", "render_table"]
