"""Orchestration and protocol of `bench peers`, with fake peers and no network."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_sae.bench import peers
from dist_sae.bench.peers import activations, environments, protocol
from dist_sae.bench.peers.environments import Peer, PeerError
from dist_sae.errors import ConfigError

STEP_SECONDS = 0.5
GOOD = f"""
import json, sys
spec = json.load(open(sys.argv[1]))
result = dict(seconds_per_step=[9.0] + [{STEP_SECONDS}] * (spec["steps"] - 1),
    rows=spec["steps"] * spec["batch"], fvu=0.25 if spec["heldout"] else None,
    peak_bytes=1000, version="1.2", notes=["a note"])
print("chatter")
print(json.dumps(result))
"""
CRASHING = "raise RuntimeError('out of ideas')"
MUTE = "print('all went well')"
KILLED = "import os; os.kill(os.getpid(), 9)"


def make_spec(**changes: object) -> protocol.Spec:
    settings: dict[str, object] = {
        "rows": "", "heldout": None, "d_in": 2, "n_latents": 8, "k": 2, "batch": 4, "steps": 3,
        "lr": 1e-3, "setting": "matched", "threads": 1, "seed": 0,
    }  # fmt: skip
    return protocol.Spec(**(settings | changes))  # type: ignore[arg-type]


def make_peers(folder: Path, monkeypatch: pytest.MonkeyPatch, *scripts: str) -> Sequence[Peer]:
    made = []
    for number, text in enumerate(scripts):
        script = folder / f"peer{number}.py"
        script.write_text(text)
        made.append(Peer(f"peer{number}", "1.0", str(script), ("as_shipped", "matched_bf16")))
    monkeypatch.setattr(peers, "PEERS", tuple(made))
    monkeypatch.setattr(peers, "ensure_environment", lambda _peer, _folder: Path(sys.executable))
    monkeypatch.setattr(activations, "HELDOUT_ROWS", 16)
    return made


def run_bench(
    *,
    rows: Path | None = None,
    rounds: int = 2,
    fvu_rows: int = 10,
    transcoder: bool = False,
    settings: Sequence[str] = environments.SETTINGS,
) -> list[dict]:  # type: ignore[type-arg]
    return peers.bench_peers(
        d_in=3, n_latents=8, k=2, batch=4, steps=2, rounds=rounds, threads=1, rows=rows,
        folder=None, fvu_rows=fvu_rows, transcoder=transcoder, settings=settings,
    )  # fmt: skip


def test_bench_gives_a_row_for_each_peer_and_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_peers(tmp_path, monkeypatch, GOOD, GOOD)
    rows = run_bench()
    assert [(row["name"], row["setting"]) for row in rows] == [
        ("peer0", "as_shipped"), ("peer0", "matched_bf16"),
        ("peer1", "as_shipped"), ("peer1", "matched_bf16"),
    ]  # fmt: skip
    # 4 rows in the median step of .5 s; the warm-up of 9 s does not count
    assert rows[0]["rows_per_second"] == 8
    assert rows[0]["rows_per_second_spread"] == [8, 8]
    # 10 rows give 2 full batches of 4
    assert (rows[0]["fvu"], rows[0]["rows_trained"]) == (0.25, 8)
    assert (rows[0]["version"], rows[0]["notes"], rows[0]["error"]) == ("1.2", ["a note"], None)


def test_only_the_wanted_settings_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_peers(tmp_path, monkeypatch, GOOD, GOOD)
    rows = run_bench(settings=("matched_bf16", "matched"), rounds=1, fvu_rows=0)
    assert [(row["name"], row["setting"]) for row in rows] == [
        ("peer0", "matched_bf16"),
        ("peer1", "matched_bf16"),
    ]


@pytest.mark.parametrize(
    ("script", "words"),
    [(CRASHING, "out of ideas"), (MUTE, "all went well"), (KILLED, "signal 9")],
)
def test_failing_peer_becomes_a_row_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    make_peers(tmp_path, monkeypatch, script, GOOD)
    rows = run_bench()
    assert [words in str(row["error"]) for row in rows] == [True, True, False, False]
    assert rows[0]["rows_per_second"] is None
    assert rows[2]["rows_per_second"] == 8
    assert f"peer0 as_shipped: ERROR: {rows[0]['error']}" in peers.render_table(rows)


def test_peer_that_cannot_be_installed_becomes_rows_with_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, _ = make_peers(tmp_path, monkeypatch, GOOD, GOOD)

    def ensure(peer: Peer, folder: Path) -> Path:
        if peer == broken:
            raise PeerError("no such release")
        return Path(sys.executable)

    monkeypatch.setattr(peers, "ensure_environment", ensure)
    rows = run_bench(fvu_rows=0)
    assert [row["error"] for row in rows[:2]] == ["not installed: no such release"] * 2
    assert [row["error"] for row in rows[2:]] == [None, None]


def test_peer_whose_steps_are_missing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_peers(tmp_path, monkeypatch, GOOD.replace('spec["steps"] - 1', "1"))
    assert "lacks steps" in str(run_bench()[0]["error"])


def test_speed_is_the_median_of_rounds() -> None:
    entry = peers.Entry(Peer("a", "1", "a.py"), "matched", 160, speeds=[10.0, 40.0, 20.0])
    row = entry.row()
    assert (row["rows_per_second"], row["rows_per_second_spread"]) == (20, [10, 40])


def test_table_has_a_line_for_each_row_and_its_notes() -> None:
    peer = Peer("a", "1", "a.py")
    entry = peers.Entry(
        peer, "matched", 160, speeds=[10.0], peak_bytes=2 * 10**9, fvu=0.5, rows_trained=8
    )
    entry.notes = ["no clipping"]
    lines = peers.render_table([entry.row()]).splitlines()
    assert lines[1].split() == [
        "a",
        "1",
        "matched",
        "10",
        "10",
        "10",
        "0.5000",
        "8",
        "2.00",
        "0.00",
    ]
    assert lines[2] == "a matched: no clipping"


def test_batches_stamp_each_step_once(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.arange(24, dtype=np.float32).reshape(12, 2))
    batches = protocol.Batches(make_spec(rows=str(tmp_path / "rows.npy")), scale=2.0)
    got = [next(batches) for _ in range(3)]
    batches.finish()
    batches.finish()
    assert next(batches, None) is None
    assert len(batches.seconds_per_step) == 3
    assert torch.equal(torch.cat(got), 2 * torch.arange(24.0).view(12, 2))


def test_common_scale_gives_mean_square_norm_d_in(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.array([[3, 4]] * 12, np.float32))
    # |x|^2 = 25, d_in = 2
    scale = protocol.common_scale(make_spec(rows=str(tmp_path / "rows.npy")))
    assert scale.tolist() == pytest.approx([(2 / 25) ** 0.5] * 2)
    np.save(tmp_path / "rows.npy", np.array([[3, 4, 0, 1]] * 12, np.float32))
    scale = protocol.common_scale(make_spec(rows=str(tmp_path / "rows.npy"), transcoder=True))
    assert scale.tolist() == pytest.approx([(2 / 25) ** 0.5] * 2 + [2**0.5] * 2)


def test_fvu_is_in_raw_units_and_about_the_mean(tmp_path: Path) -> None:
    np.save(tmp_path / "heldout.npy", np.array([[1, 0], [3, 0], [1, 4], [3, 4]], np.float32))
    spec = make_spec(heldout=str(tmp_path / "heldout.npy"))
    # relative to the mean (2, 2) each row has 1 + 4; x_hat misses the first column by 1 in raw
    # units
    fvu = protocol.heldout_fvu(spec, lambda x: x + torch.tensor([10.0, 0.0]), scale=10.0)
    assert fvu == pytest.approx(4 * 1 / (4 * 5))
    assert protocol.heldout_fvu(make_spec(), lambda x: x) is None


def test_fvu_of_a_transcoder_is_that_of_its_targets(tmp_path: Path) -> None:
    rows = np.array([[9, 1, 1, 0], [9, 3, 3, 0], [9, 1, 1, 4], [9, 3, 3, 4]], np.float32)
    np.save(tmp_path / "heldout.npy", rows)
    spec = make_spec(heldout=str(tmp_path / "heldout.npy"), transcoder=True)
    scale = torch.tensor([2.0, 2.0, 10.0, 10.0])
    # y_hat is right in the first column, computed from the inputs (2 x 5 = 10), and off by 2 in the
    # second
    fvu = protocol.heldout_fvu(
        spec, lambda x: torch.stack([x[:, 1] * 5, torch.full((len(x),), 20.0)], 1), scale
    )
    assert fvu == pytest.approx(4 * 4 / (4 * 5))


def test_transcoders_are_trained_with_matched_settings_by_peers_that_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_peers(tmp_path, monkeypatch, GOOD, GOOD)
    monkeypatch.setattr(peers, "PEERS", (replace(made[0], transcoders=True), made[1]))
    rows = run_bench(rounds=1, fvu_rows=0, transcoder=True)
    assert [(row["name"], row["setting"]) for row in rows] == [("peer0", "matched_bf16")]


def test_file_is_split_into_rows_to_train_on_and_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "HELDOUT_ROWS", 16)
    rows = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    activations.copy_heldout_rows(tmp_path / "rows.npy", tmp_path / "held.npy", n_rows=24, width=3)
    assert np.array_equal(np.load(tmp_path / "held.npy"), rows[24:])
    with pytest.raises(ConfigError, match="has 40 rows, but 25"):
        activations.copy_heldout_rows(
            tmp_path / "rows.npy", tmp_path / "held.npy", n_rows=25, width=3
        )
    with pytest.raises(ConfigError, match=r"not floats of \[rows, 4\]"):
        activations.copy_heldout_rows(
            tmp_path / "rows.npy", tmp_path / "held.npy", n_rows=8, width=4
        )


def test_synthetic_rows_have_mean_square_norm_d_in_and_come_again(tmp_path: Path) -> None:
    for number in (1, 2):
        activations.write_synthetic(
            tmp_path / f"rows{number}.npy", tmp_path / "held.npy", n_rows=4096, d_in=32,
            n_directions=128, n_active=8,
        )  # fmt: skip
    rows, again = np.load(tmp_path / "rows1.npy"), np.load(tmp_path / "rows2.npy")
    assert np.array_equal(rows, again)
    assert (rows**2).sum(1).mean() == pytest.approx(32, rel=0.3)  # directions are not orthogonal


def test_synthetic_targets_are_a_function_of_the_same_inputs(tmp_path: Path) -> None:
    for name, transcoder in (("rows.npy", False), ("pairs.npy", True)):
        activations.write_synthetic(
            tmp_path / name, tmp_path / "held.npy", n_rows=1024, d_in=16, n_directions=64,
            n_active=4, transcoder=transcoder,
        )  # fmt: skip
    rows, pairs = np.load(tmp_path / "rows.npy"), np.load(tmp_path / "pairs.npy")
    assert np.array_equal(pairs[:, :16], rows)
    # W_1 has rows of norm 2 and W_2 of norm sqrt 2 / 2, and relu keeps half: E|y|^2 is about d_in
    assert (pairs[:, 16:] ** 2).sum(1).mean() == pytest.approx(16, rel=0.5)


def test_complete_environment_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def call(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        python = tmp_path / "a" / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", call)
    peer = Peer("a", "1.0", "a.py")
    first = environments.ensure_environment(peer, tmp_path)
    installed = len(calls)
    assert calls[1][-1] == environments.TORCH  # torch is installed before the peer
    assert environments.ensure_environment(peer, tmp_path) == first
    assert len(calls) == installed
    environments.ensure_environment(Peer("a", "1.1", "a.py"), tmp_path)
    assert len(calls) == 2 * installed


def test_environment_without_its_marker_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stderr="interrupted")

    peer = Peer("a", "1.0", "a.py")
    python = tmp_path / "a" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(PeerError, match="interrupted"):
        environments.ensure_environment(peer, tmp_path)


def test_spec_survives_its_file(tmp_path: Path) -> None:
    spec = make_spec(setting="as_shipped_bf16", threads=torch.get_num_threads())
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(vars(spec)))
    assert protocol.read_spec(["runner", str(path)]) == spec
    assert (spec.matched, spec.bf16) == (False, True)
