"""`dist-sae bench peers`: the same rows through the public APIs of other trainers and ours.

    environments.py  peers, versions, and a separate environment for each
    activations.py   the rows
    protocol.py      code shared by the runners run_*.py, one per peer, run by the peer's Python
    processes.py     runs a script with a peer's Python

Speed is measured in short, interleaved runs: each round runs every peer once, dist_sae first. FVU
is measured in one longer run per peer, on the same rows and by the same definition. Everything runs
on the CPU.
"""

import logging
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dist_sae.bench.peers import activations
from dist_sae.bench.peers.environments import (
    PEERS,
    SETTINGS,
    Peer,
    PeerError,
    ensure_environment,
)
from dist_sae.bench.peers.processes import run_script
from dist_sae.bench.peers.protocol import MATCHED, Spec, rows_per_second
from dist_sae.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_FOLDER = Path("~/.cache/dist_sae/peers")
WARMUP_STEPS = 1

_HERE = Path(__file__).parent


@dataclass
class Entry:
    """A peer in one setting, with its measurements so far."""

    peer: Peer
    setting: str
    state_bytes: int
    """Weights, gradients and Adam's moments in fp32."""
    version: str | None = None
    speeds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    fvu: float | None = None
    rows_trained: int = 0
    notes: list[str] = field(default_factory=list)
    error: str | None = None

    def __str__(self) -> str:
        return f"{self.peer.name} {self.setting}"

    def row(self) -> dict[str, object]:
        """Convert to a row of the report."""
        speeds = self.speeds
        return {
            "name": self.peer.name,
            "version": self.version or self.peer.version,
            "setting": self.setting,
            "rows_per_second": statistics.median(speeds) if speeds else None,
            "rows_per_second_spread": [min(speeds), max(speeds)] if speeds else None,
            "fvu": self.fvu,
            "rows_trained": self.rows_trained,
            "peak_bytes": self.peak_bytes,
            "state_bytes": self.state_bytes,
            "notes": self.notes,
            "error": self.error,
        }


def bench_peers(
    *,
    d_in: int,
    n_latents: int,
    k: int,
    batch: int,
    steps: int,
    rounds: int,
    threads: int,
    rows: Path | None,
    folder: Path | None,
    fvu_rows: int,
    transcoder: bool = False,
    settings: Sequence[str] = SETTINGS,
) -> list[dict[str, object]]:
    """Measure every peer in every setting. Returns a row for each, with an error if it failed.

    Args:
        steps: Steps timed in each round, after a warm-up step.
        rounds: Number of times that every peer is timed; 0 skips the timing.
        rows: A .npy file of float32 [rows, d_in] in random order; None generates synthetic rows.
            For transcoders [rows, 2 d_in]: inputs, then targets.
        folder: Folder of the peers' environments.
        fvu_rows: Rows that every peer trains on before FVU is measured; 0 skips FVU.
        transcoder: Train transcoders in matched settings, with the peers that support them.
        settings: Settings to run. A peer runs only in those that it has.

    Raises:
        ConfigError: The rows file is invalid, or there are too few rows or steps.
    """
    fvu_steps = fvu_rows // batch
    if rounds and steps < 1:
        raise ConfigError(f"--steps {steps}: must be at least 1")
    if fvu_rows and not fvu_steps:
        raise ConfigError(f"--fvu-rows {fvu_rows}: less than one batch of {batch}")
    state_bytes = 4 * 4 * (2 * n_latents * d_in + n_latents + d_in)
    entries = [
        Entry(peer, setting, state_bytes)
        for peer in PEERS
        for setting in peer.settings
        if setting in settings
        and (not transcoder or (peer.transcoders and setting.startswith(MATCHED)))
    ]
    with tempfile.TemporaryDirectory(prefix="dist-sae-bench-") as name:
        work = Path(name)
        heldout = work / "heldout.npy"
        timed = Spec(
            rows=str((rows or work / "rows.npy").resolve()),
            heldout=None,
            d_in=d_in,
            n_latents=n_latents,
            k=k,
            batch=batch,
            steps=WARMUP_STEPS + steps,
            lr=2e-4 * (2**14 / n_latents) ** 0.5,
            setting="",
            threads=threads,
            seed=0,
            transcoder=transcoder,
        )
        n_rows = max(timed.steps, fvu_steps) * batch
        if rows:
            activations.copy_heldout_rows(
                rows, heldout, n_rows=n_rows, width=(1 + transcoder) * d_in
            )
        else:
            activations.write_synthetic(
                Path(timed.rows), heldout, n_rows=n_rows, d_in=d_in, n_directions=2 * n_latents,
                n_active=k, transcoder=transcoder,
            )  # fmt: skip
        pythons = _ensure_environments(entries, folder or DEFAULT_FOLDER)
        for number in range(rounds):
            for entry in entries:
                if result := _run(entry, pythons, timed, work):
                    speed = rows_per_second(result["seconds_per_step"], batch, WARMUP_STEPS)
                    entry.speeds.append(speed)
                    entry.peak_bytes = max(entry.peak_bytes or 0, result["peak_bytes"])
                    logger.info("round %d of %d: %s: %.0f rows/s", number + 1, rounds, entry, speed)
        longer = replace(timed, heldout=str(heldout), steps=fvu_steps)
        for entry in entries if fvu_steps else ():
            if result := _run(entry, pythons, longer, work):
                entry.fvu, entry.rows_trained = result["fvu"], result["rows"]
                entry.peak_bytes = entry.peak_bytes or result["peak_bytes"]
                logger.info("%s: FVU %.4f", entry, entry.fvu)
    return [entry.row() for entry in entries]


def render_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Render the rows as a text table, followed by notes on settings that could not be matched."""
    head = (
        "name", "version", "setting", "rows/s", "min", "max", "fvu", "rows trained", "peak GB",
        "state GB",
    )  # fmt: skip
    table = [head] + [
        (
            str(row["name"]),
            str(row["version"] or "-"),
            str(row["setting"]),
            _number(row["rows_per_second"], ".0f"),
            *(_number(speed, ".0f") for speed in row["rows_per_second_spread"] or (None, None)),
            _number(row["fvu"], ".4f"),
            str(row["rows_trained"] or "-"),
            _number(row["peak_bytes"] and row["peak_bytes"] / 1e9, ".2f"),
            _number(row["state_bytes"] / 1e9, ".2f"),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    n_left = head.index("rows/s")
    lines = [
        "  ".join(
            cell.ljust(width) if column < n_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in table
    ]
    for row in rows:
        remarks = [*row["notes"], *([f"ERROR: {row['error']}"] if row["error"] else [])]
        lines += [f"{row['name']} {row['setting']}: {remark}" for remark in remarks]
    return "\n".join(lines) + "\n"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _ensure_environments(entries: Sequence[Entry], folder: Path) -> dict[str, Path]:
    """Find or install each peer's Python. A failure is stored as `error` in the peer's entries."""
    pythons: dict[str, Path] = {}
    for peer in dict.fromkeys(entry.peer for entry in entries):
        try:
            pythons[peer.name] = ensure_environment(peer, folder)
        except (PeerError, OSError) as error:
            for entry in entries:
                if entry.peer == peer:
                    entry.error = f"not installed: {error}"
    return pythons


def _run(
    entry: Entry, pythons: Mapping[str, Path], spec: Spec, work: Path
) -> dict[str, Any] | None:
    """Run a peer. Returns its measurements, or None after a failure, which sets `entry.error`."""
    if entry.error:
        return None
    try:
        result = run_runner(
            entry.peer, pythons[entry.peer.name], replace(spec, setting=entry.setting), work
        )
    except PeerError as error:
        entry.error = str(error)
        logger.warning("%s failed: %s", entry, error)
        return None
    entry.version, entry.notes = result["version"], result["notes"]
    return result


def run_runner(peer: Peer, python: Path, spec: Spec, work: Path) -> dict[str, Any]:
    """Run a peer once, in a separate process.

    Raises:
        PeerError: The peer failed, took too long, or printed no valid result.
    """
    result = run_script(peer, python, _HERE / peer.script, asdict(spec), work, threads=spec.threads)
    missing = {"seconds_per_step", "rows", "fvu", "peak_bytes", "version", "notes"} - set(result)
    if missing or len(result["seconds_per_step"]) != spec.steps:
        raise PeerError(f"result lacks {sorted(missing) or 'steps'}")
    return result
