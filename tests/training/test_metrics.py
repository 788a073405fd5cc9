"""The metrics that a trainer serves while it trains."""

import re
import threading
import urllib.error
from pathlib import Path
from typing import Any

import pytest

from dist_sae.telemetry.metric import DENSITIES
from dist_sae.telemetry.metrics import metrics_of
from tests.forks import HANG_SECONDS
from tests.launch import start
from tests.telemetry.scrape import Series, of_rank, scrape, series
from tests.training.trained import STEPS, history, run_file

NOT_HERE = {
    "dist_sae_process_device_memory_bytes",  # there is no GPU
    "dist_sae_run_failed",  # the run did not fail
    "dist_sae_rank_up",  # only pods have it
    "dist_sae_store_requests_total",  # only S3 has it
    "dist_sae_store_request_seconds",
    "dist_sae_train_prefix_fvu",  # only for matryoshka dictionaries
    "dist_sae_train_site_fvu",  # only for several sites
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, activations: str) -> tuple[Path, str]:
    """The folder of a routed run, and the last page that its trainer served."""
    folder = tmp_path_factory.mktemp("metrics")
    sae: dict[str, Any] = {"kind": "routed", "experts": 4, "n_latents": 64, "k": 3, "auxk": 16}
    sae |= {"dead_after_rows": 480}
    settings = {"heldout_rows": 100, "save_every_steps": 25, "log_every_steps": 10}
    path = run_file(folder, activations, sae=sae, train=settings, telemetry={"port": 0})
    process = start("train", str(path))
    for line in process.stderr:
        if found := re.search(r"metrics on port (\d+)", line):
            port = int(found[1])
            break
    page, interval = "", threading.Event()
    while True:
        try:
            page = scrape(port)
        except (urllib.error.URLError, ConnectionError):
            break
        interval.wait(0.1)
    process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0
    return folder, page


@pytest.fixture(scope="module")
def last(trained: tuple[Path, str]) -> Series:
    return series(trained[1])


def by_label(found: Series, name: str, label: str) -> dict[str, float]:
    return {dict(key)[label]: value for (metric, key), value in found.items() if metric == name}


def test_every_metric_of_the_table_is_filled(last: Series) -> None:
    names = {name.removesuffix("_count") for name, _ in last}
    assert {metric.name for metric in metrics_of("train")} - names == NOT_HERE


def test_the_last_page_is_that_of_a_run_that_has_finished(trained: tuple[Path, str]) -> None:
    page = trained[1]
    assert of_rank(page, "dist_sae_run_finished") == {"0": 1.0}
    assert of_rank(page, "dist_sae_train_step") == of_rank(page, "dist_sae_train_steps")
    assert of_rank(page, "dist_sae_train_rows_total") == {"0": STEPS * 160}
    assert of_rank(page, "dist_sae_checkpoint_step") == {"0": STEPS}
    assert of_rank(page, "dist_sae_train_backlog_units") == {"0": 0.0}
    ready = of_rank(page, "dist_sae_train_ready_units")
    assert ready == of_rank(page, "dist_sae_train_plan_units")
    assert ready["0"] > 1


def test_phases_add_up_to_the_time_of_the_steps(last: Series, trained: tuple[Path, str]) -> None:
    phases = by_label(last, "dist_sae_train_phase_seconds_total", "phase")
    (total,) = of_rank(trained[1], "dist_sae_train_step_seconds_total").values()
    (stall,) = of_rank(trained[1], "dist_sae_train_save_stall_seconds_total").values()
    assert sum(phases.values()) == pytest.approx(total)
    assert phases["save"] == pytest.approx(stall)
    assert phases.pop("others") == 0
    assert min(phases.values()) > 0


def test_every_latent_is_in_one_bucket_of_densities(
    last: Series, trained: tuple[Path, str]
) -> None:
    latents = by_label(last, "dist_sae_train_density_latents", "log10")
    assert tuple(latents) == DENSITIES
    assert sum(latents.values()) == 64
    (rows,) = of_rank(trained[1], "dist_sae_train_density_rows").values()
    assert 480 < rows <= 2 * 480  # the window is one to two times dead_after_rows
    # 3 of 64 latents are active per row, so the densest have at least the mean density, 10 ** -1.33
    assert latents["-1.5"] + latents["-1.0"] + latents["-0.5"] > 0


def test_the_history_has_the_same_numbers(last: Series, trained: tuple[Path, str]) -> None:
    folder, page = trained
    record = history(folder)[-1]
    assert record["step"] == STEPS
    for name in ("fvu", "loss", "l0_latents", "rare_share", "product_share", "gradient_norm"):
        assert of_rank(page, f"dist_sae_train_{name}") == {"0": record[name]}, name
    quantiles = by_label(last, "dist_sae_train_row_explained_variance", "quantile")
    assert quantiles == record["explained_variance"]
    assert list(quantiles.values()) == sorted(quantiles.values())
    assert record["density"] == by_label(last, "dist_sae_train_density_latents", "log10")
    assert sum(record["phases"].values()) == pytest.approx(record["seconds"])
