"""Forecasts of runs, compared with what a run stores, sends and allocates."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_sae.commands.cli import main
from dist_sae.config import Run, load_run
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.interface import Rows, StepContext
from dist_sae.planning.advice import advice, needed_bytes
from dist_sae.planning.estimate import compute_pace
from dist_sae.planning.memory import checkpoint_bytes, trainer_memory
from dist_sae.planning.rates import ACCELERATORS, Rates, rates_from_bench, rates_from_data_sheet
from dist_sae.planning.risk import compute_risk
from dist_sae.planning.sizes import RunSizes, find_sizes
from dist_sae.planning.stored import set_bytes, stored_over_time
from dist_sae.planning.traffic import step_traffic
from dist_sae.storage import open_store
from tests.commands.test_cli import fail
from tests.dictionaries.ranks import ThreadAxis, on_ranks
from tests.runs import TINY, make_run, write_run


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["estimate", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.system
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_bytes_are_what_is_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    """The forecast is within 3 %, although headers are a fifth of the set at 8 values per row."""
    path = write_run(tmp_path, TINY, activations={"dtype": dtype})
    before = told(capsys, str(path))
    for command in ("plan", "produce", "train"):
        assert main([command, str(path)]) == 0
    capsys.readouterr()
    after = told(capsys, str(path))
    assert after["rows"].pop("known_from") != before["rows"].pop("known_from")
    assert after["rows"] == before["rows"]
    entries = list(open_store(str(tmp_path / "activations"), make_run(tmp_path).store.s3).entries())
    there = sum(e.bytes for e in entries if e.key.startswith(("units/", "shards/")))
    assert before["stored"]["set_bytes"] == pytest.approx(there, rel=0.03)
    runs = open_store(str(tmp_path / "runs"), make_run(tmp_path).store.s3).entries("tiny/check")
    parts = sum(entry.bytes for entry in runs if entry.key.endswith(".safetensors"))
    # 14 parts have headers
    assert before["stored"]["checkpoint_bytes"] == pytest.approx(parts, rel=0.25)


class CountingAxis(ThreadAxis):
    """An axis that counts the bytes that a ring would send for each collective."""

    def count(self, name: str, size: int) -> None:
        counted = self.__dict__.setdefault("sent", Counter())
        counted[name] += size * (self.shards - 1) // self.shards

    def gather(self, x: Tensor) -> Tensor:
        found = super().gather(x)
        self.count("gather_inputs", found.nbytes)
        return found

    def scatter_sum(self, parts: Tensor) -> Tensor:
        self.count("scatter_outputs", parts.nbytes)
        return super().scatter_sum(parts)

    def kth_largest(self, keys: Tensor, k: int) -> Tensor:
        self.count("select", keys.nbytes + 8 * len(keys))
        return super().kth_largest(keys, k)


@pytest.mark.parametrize("shards", [2, 4])
def test_rows_sent_in_a_step_are_counted(tmp_path: Path, shards: int) -> None:
    run = make_run(
        tmp_path, TINY, processes={"trainers": shards, "latent_shards": shards}, train={"lr": 1e-3}
    )
    (sizes,) = find_sizes(run)

    def step(axis: ThreadAxis) -> dict[str, int]:
        axis.__class__ = CountingAxis
        sae = build_sae(run.sae, 8, axis)
        torch.nn.init.normal_(sae.W_enc)
        x = torch.randn(sizes.rank_rows, 8)
        dead = torch.zeros(len(sae.W_enc), dtype=torch.bool)
        sae.objective(Rows(x, x), StepContext(1.0, dead, 0, 0.5, [0]))
        return dict(axis.sent)  # type: ignore[attr-defined]

    counted = on_ranks(1, shards, step)[0]
    expected = step_traffic(sizes)
    assert counted == {name: expected[name] for name in counted}
    assert expected["gather_gradients"] == expected["scatter_outputs"]


def sizes_of(tmp_path: Path, rows: int = 10_000_000, **sections: Any) -> RunSizes:
    activations = {"unit_rows": None, "streams": None} | sections.pop("activations", {})
    train = {"rows": "all", "normaliser_rows": None, "lr": None} | sections.pop("train", {})
    run = make_run(tmp_path, TINY, activations=activations, train=train, **sections)
    (sizes,) = find_sizes(Run.model_validate(run.model_dump()), rows)
    return sizes


def test_gradients_are_summed_over_replicas_and_rows_over_shards(tmp_path: Path) -> None:
    """32 latents with 8 + 8 + 1 weights, and 8 of b_dec, are 552 values.

    A ring of 4 sends 1.5 times as many.

    Shards of 8 latents have 144 values each, which are on no other rank.
    """
    replicas = step_traffic(sizes_of(tmp_path, processes={"trainers": 4}))
    assert replicas["sum_gradients"] == 1.5 * 4 * 552
    assert replicas["gather_inputs"] == replicas["gather_entries"] == 0
    shards = step_traffic(sizes_of(tmp_path, processes={"trainers": 4, "latent_shards": 4}))
    assert shards["sum_gradients"] == 0
    assert shards["gather_inputs"] == 0.75 * 256 * 8 * 4


def test_rows_and_entries_are_exchanged_where_they_are_fewer(tmp_path: Path) -> None:
    """The exchange is 128 rows of 8 values and 256 entries of 12 bytes, for W_enc and for W_dec.

    Summed gradients of 4,096 latents in two shards would be 65,536 bytes for each weight matrix.
    """
    sent = step_traffic(
        sizes_of(tmp_path, sae={"n_latents": 4096}, processes={"trainers": 4, "latent_shards": 2})
    )
    assert sent["gather_entries"] == 2 * (128 * 8 * 4 + 128 * 2 / 2 * 12)
    assert sent["sum_gradients"] == 4 * (2048 + 8)


def test_memory_shrinks_with_shards_and_zero(tmp_path: Path) -> None:
    def device(**sections: Any) -> dict[str, int]:
        sae = {"n_latents": 65_536}
        sizes = sizes_of(tmp_path, sae=sae, **sections)
        return trainer_memory([sizes], 0, gpu=True)["device"]

    whole = device(processes={"trainers": 4})
    sharded = device(processes={"trainers": 4, "latent_shards": 4})
    assert sharded["weights"] == pytest.approx(whole["weights"] / 4, rel=1e-3)
    zero = {"deepspeed": {"zero_optimization": {"stage": 1}}}
    assert device(processes={"trainers": 4}, train=zero)["moments"] == whole["moments"] // 4
    assert device(processes={"trainers": 4}, train={"ema_decay": 0.9})["running_mean"] > 0


def test_dead_latents_and_saves_take_memory_too(tmp_path: Path) -> None:
    """AuxK takes 256 rows of 4 entries, or two blocks of 256 x 32 products.

    The weights are 552 values.

    A save copies the checkpoint. W_enc or W_dec is also serialized and written to a file, which
    takes as much memory as all weights.
    """
    sizes = sizes_of(tmp_path)
    host = trainer_memory([sizes], 0, gpu=False)["host"]
    assert host["auxk_while_latents_are_dead"] == 256 * 4 * 80
    assert host["checkpoint_copies"] == checkpoint_bytes(sizes) + 4 * 552
    assert host["new_start_of_dead_latents"] == 0
    relu = sizes_of(tmp_path, sae={"kind": "relu", "n_latents": 32})
    host = trainer_memory([relu], 0, gpu=False)["host"]
    assert host["auxk_while_latents_are_dead"] == 0
    assert host["new_start_of_dead_latents"] == 2 * 256 * 32 * 4


def test_a_dictionary_that_does_not_fit_is_given_more_shards(tmp_path: Path) -> None:
    """17 M x (2 x 8,192) weights are 1.1 TB, or 4.4 TB with gradients and moments: 128 GPUs of 80
    GB.
    """
    sae = {"n_latents": 2**24, "k": 32, "init": "random"}
    path = write_run(
        tmp_path,
        TINY,
        model={"d_in": 8192},
        sae=sae,
        train={"rows": "all", "batch_rows": 16_384},
        activations={"streams": None, "unit_rows": None},
        processes={"trainers": 64, "latent_shards": 64},
    )
    (sizes,) = find_sizes(load_run(str(path)), 10**9)
    memory = ACCELERATORS["h100"].memory_bytes
    (said,) = [s for s in advice([sizes], Rates(), memory) if s.startswith("processes.trainers")]
    assert "128" in said
    assert needed_bytes(sizes, 128, 128) <= 0.9 * memory < needed_bytes(sizes, 64, 64)


def test_a_bench_of_the_same_shape_is_taken_as_it_is(tmp_path: Path) -> None:
    """Twice as many latents take twice as long in the product and in Adam."""
    found = {
        "d_in": 8,
        "n_latents": 32,
        "batch": 256,
        "step_seconds": 1.0,
        "product_seconds": 0.5,
        "phases": {"adam": 0.1, "norms": 0.05},
    }
    sizes = sizes_of(tmp_path)
    assert rates_from_bench([[sizes]], found, "file").step_seconds == pytest.approx(1.0, rel=0.02)
    assert rates_from_bench(
        [[sizes]], found | {"n_latents": 16}, "file"
    ).step_seconds == pytest.approx(2.0, rel=0.02)


def test_the_slowest_part_limits_the_run(tmp_path: Path) -> None:
    """Batches of 256 in a tenth of a second are 2,560 rows/s. A row of 8 fp32 has 48 bytes."""
    sizes = sizes_of(tmp_path)
    slow = compute_pace([[sizes]], Rates(0.1, 1000.0))
    assert slow["limited_by"] == "producers"
    assert slow["producers_wanted"] == 3
    assert slow["training_seconds"] == pytest.approx(sizes.run.rows / 1000)
    fast = compute_pace([[sizes]], Rates(0.1, 1e6, 48 * 100.0))
    assert fast["limited_by"] == "store_reads"
    assert fast["training_seconds"] == pytest.approx(sizes.run.rows / 100)


def test_rare_features_fire_as_often_as_their_frequency_says(tmp_path: Path) -> None:
    sizes = sizes_of(tmp_path)
    risk = compute_risk(sizes)
    assert risk["expected_firings"]["of_p_1e-05"] == pytest.approx(sizes.run.rows * 1e-5)
    assert risk["rows_per_latent"] == sizes.run.rows / 32
    wide = compute_risk(sizes_of(tmp_path, sae={"n_latents": 2**22, "init": "random"}))
    assert wide["dead_by_chance_share"] > 0.2 > risk["dead_by_chance_share"]


def test_retention_bounds_the_set(tmp_path: Path) -> None:
    kept = stored_over_time(sizes_of(tmp_path), 10)
    store = {"retention": "delete_consumed"}
    sizes = sizes_of(tmp_path)
    run = sizes.run.model_copy(update={"store": sizes.run.store.model_copy(update=store)})
    deleted = stored_over_time(sizes._replace(run=run), 10)
    assert max(deleted.values()) < max(kept.values()) <= 1.05 * set_bytes(sizes)
    assert checkpoint_bytes(sizes) == 3 * 4 * 552 + 8 * 32


def test_data_sheets_give_rates(tmp_path: Path) -> None:
    sizes = sizes_of(tmp_path)
    slower, faster = (
        rates_from_data_sheet([[sizes]], name, 25e9).step_seconds for name in ("a100", "h100")
    )
    assert slower is not None
    assert faster is not None
    assert faster < slower


@pytest.mark.system
@pytest.mark.parametrize("placement", ["together", "spread"])
def test_a_sweep_takes_what_its_jobs_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], placement: str
) -> None:
    """With placement `together`, each rank has all states and the step times add up.

    With `spread`, only the largest job counts.
    """
    sweep = {"placement": placement, "jobs": {"a": {}, "b": {"sae.n_latents": 64}}}
    path = write_run(tmp_path, TINY, sweep=sweep, processes={"trainers": 2})
    options = [str(path), "--accelerator", "h100", "--store", "1e-6"]
    alone = [told(capsys, *options, "--job", job) for job in "ab"]
    both = told(capsys, *options)
    name = "device_moments_bytes"
    states = [each["memory_of_a_trainer"][name] for each in alone]
    steps = [each["pace"]["step_seconds"] for each in alone]
    is_spread = placement == "spread"
    assert both["memory_of_a_trainer"][name] == (max if is_spread else sum)(states)
    assert both["pace"]["step_seconds"] == pytest.approx((max if is_spread else sum)(steps))
    reads = "store_reads_rows_per_second"
    assert both["pace"][reads] == pytest.approx(alone[0]["pace"][reads] / (1 + is_spread))
    assert both["stored"]["set_bytes"] == alone[0]["stored"]["set_bytes"]
    checkpoints = sum(each["stored"]["checkpoint_bytes"] for each in alone)
    assert both["stored"]["checkpoint_bytes"] == checkpoints
    assert both["pods"]["trainer"] == 2


@pytest.mark.system
def test_the_table_and_the_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("currency: USD\ntrainer_pod_hour: 3600\n")
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps({"rows_per_second": 100.0, "bare_rows_per_second": 200.0}))
    path = write_run(tmp_path, TINY)
    options = [str(path), "--accelerator", "h100", "--bench", str(bench), "--prices", str(prices)]
    found = told(capsys, *options)
    assert found["pace"]["limited_by"] == "producers"
    assert found["cost"]["trainer"] == pytest.approx(found["pace"]["total_seconds"], rel=0.01)
    assert "producer_pod_hour" in found["cost"]["no_price_for"]
    assert found["cost"]["left_out"] == "pods of the planner, the index and the reporter"
    assert main(["estimate", *options]) == 0
    assert "dead by chance" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--rows", "0"], "--rows: 0 is not above 0"),
        (["--rows", "100"], "leave 92 rows for training, less than one batch"),
        (["--width", "8"], "--width and --parameters describe a model together"),
        (["--accelerator", "abacus"], "--accelerator: abacus is not one of a100"),
        (["--prices", "nowhere.yaml"], "--prices: nowhere.yaml: No such file"),
        (["--bench", "nowhere.json"], "--bench: nowhere.json: No such file"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], problem: str
) -> None:
    path = write_run(tmp_path, TINY, train={"rows": "all"})
    assert problem in fail(capsys, "estimate", str(path), *options)


def test_a_run_that_asks_for_more_rows_than_there_are_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, TINY, train={"rows": 4000})
    said = fail(capsys, "estimate", str(path), "--rows", "2000")
    assert "train.rows asks for 4000 rows, but the activation set will have about" in said


@pytest.mark.parametrize(
    ("option", "content", "problem"),
    [
        (
            "--prices",
            "currency: USD\npod: 3\n",
            "pod: Extra inputs are not permitted; the keys are",
        ),
        ("--prices", "{", "is not valid YAML"),
        ("--bench", "[]", "does not contain a JSON object"),
        ("--bench", "{}", "is not the --json output of bench step, produce or store"),
    ],
)
def test_a_bad_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, content: str, problem: str
) -> None:
    path, bad = write_run(tmp_path, TINY), tmp_path / "bad"
    bad.write_text(content)
    assert problem in fail(capsys, "estimate", str(path), option, str(bad))
