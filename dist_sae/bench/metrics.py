"""`dist-sae bench metrics`: the cost of metrics per training step and per scrape.

Windows of `train.log_every_steps` steps run alternately with and without a run's reporter. So each
window with a reporter has exactly one report, with all its collectives. On a CPU, where only the
Python thread runs, the time inside the reporter measures the same cost with less noise.
"""

import statistics
import time
import urllib.request
from contextlib import ExitStack
from typing import Any

import torch

from dist_sae.bench.measuring import compare, medians
from dist_sae.bench.step import StepShape, TrainingStep, random_batches, seconds
from dist_sae.dictionaries.normaliser import Normaliser, SiteNormalisers
from dist_sae.distributed.mesh import Mesh
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.gather import GatheredTelemetry
from dist_sae.training.clock import Times
from dist_sae.training.reporter import TrainingReporter

_POD_RANKS = 8
_SCRAPES = 50


def bench_metrics(shape: StepShape, mesh: Mesh, *, rounds: int) -> dict[str, Any]:
    """Time steps alternately with and without reports, then time scrapes of the resulting page.

    Returns:
        Medians over `rounds`: `step_seconds` without reports; `ratio` of steps with reports to
        steps without, with its quartiles `ratio_low` and `ratio_high`. `reporting_share` is the
        time inside the reporter divided by the time of the steps without reports;
        `product_seconds` is the reporter's own sample. For the page: `series`, `page_bytes`,
        `scrape_seconds` and its maximum. For a pod of eight such ranks (here in one process):
        `pod_scrape_seconds` and its maximum.
    """
    (rows,) = random_batches(shape, mesh, 1)
    step = TrainingStep(shape, mesh)
    step.initialise(rows)
    window, site = step.run.train.log_every_steps, step.run.site
    normaliser = Normaliser(1.0, torch.zeros(shape.d_in), shape.d_in, 1)
    normalisers = SiteNormalisers((site,), (site,), {site: normaliser})
    with ExitStack() as pod:
        ranks = [Telemetry("bench", "train", 0, rank) for rank in range(_POD_RANKS)]
        reports = [
            _TimedReporter(
                step.run,
                mesh,
                rank,
                Times(mesh.device, {step.run.name: rank}),
                [],
                step.state,
                normalisers,
                0,
            )
            for rank in ranks
        ]
        report = reports[0]
        for other in reports:  # warm-up: one report per rank; also maps memory
            step.done = window - 1
            step(rows, other)

        def steps(who: TrainingReporter | None) -> float:
            return seconds(lambda: [step(rows, who) for _ in range(window)], mesh)

        pairs = []
        report.spent = 0.0
        for number in range(rounds):
            times = {who: steps(who) for who in ((report, None) if number % 2 else (None, report))}
            pairs.append((times[report], times[None]))
        page = ranks[0].render()
        alone = _scrapes(ranks[0].port)
        ports = {rank: telemetry.port or 0 for rank, telemetry in enumerate(ranks)}
        gathered = pod.enter_context(GatheredTelemetry("bench", "train", ports, 0))
        together = _scrapes(gathered.port)
    _, bare = medians(pairs)
    return {
        **shape._asdict(),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "window_steps": window,
        "step_seconds": bare / window,
        **compare(pairs),
        "reporting_share": report.spent / sum(bare for _, bare in pairs),
        "product_seconds": report.last["product_seconds"],
        "series": sum(not line.startswith(b"#") for line in page.splitlines()),
        "page_bytes": len(page),
        "scrape_seconds": statistics.median(alone),
        "scrape_seconds_most": max(alone),
        "pod_scrape_seconds": statistics.median(together),
        "pod_scrape_seconds_most": max(together),
    }


class _TimedReporter(TrainingReporter):
    """Reporter that measures the time spent in its own methods."""

    spent = 0.0

    def end(self, phase: str) -> None:
        since = time.perf_counter()
        super().end(phase)
        self.spent += time.perf_counter() - since

    def step(self, *arguments: Any, **numbers: Any) -> None:
        since = time.perf_counter()
        super().step(*arguments, **numbers)
        self.spent += time.perf_counter() - since


def _scrapes(port: int | None) -> list[float]:
    """Scrape the page `_SCRAPES` times. Returns the seconds of each scrape."""
    times = []
    for _ in range(_SCRAPES):
        since = time.perf_counter()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            answer.read()
        times.append(time.perf_counter() - since)
    return times
