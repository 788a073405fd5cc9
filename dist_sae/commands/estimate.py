"""`dist-sae estimate`: a forecast of what a run will need, before anything is produced."""

import argparse
import functools
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_sae.commands import shared
from dist_sae.errors import ConfigError

if TYPE_CHECKING:
    from dist_sae.config import Run
    from dist_sae.planning.rates import Rates
    from dist_sae.planning.sizes import RunSizes

_STEPS, _LEAST_STEPS = 32, 16  # for `--measure`
_SCALES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "forecast a run's memory, bytes, requests, time, cost and risks before it starts"
    parser = shared.add_command(commands, "estimate", main, text)
    parser.add_argument(
        "--rows", type=int, help="rows in the activation set, if its text is not available here"
    )
    parser.add_argument(
        "--width", type=int, help="width of every site, if the model is not available here"
    )
    parser.add_argument(
        "--parameters",
        type=float,
        help="with --width: number of the model's parameters up to the deepest site, such as 35e9",
    )
    parser.add_argument(
        "--accelerator", metavar="NAME", help="accelerator whose data sheet gives the rates"
    )
    parser.add_argument(
        "--network",
        type=float,
        default=25.0,
        metavar="GB/S",
        help="network bandwidth per rank, with --accelerator",
    )
    parser.add_argument(
        "--bench",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="output of bench step, produce or store --json; may be given several times",
    )
    parser.add_argument(
        "--measure",
        type=int,
        nargs="?",
        const=_STEPS,
        metavar="STEPS",
        help="first do a short version of this run here, of this many steps (default %(const)s)",
    )
    parser.add_argument(
        "--store",
        type=float,
        metavar="GB/S",
        help="bandwidth of the store, for reads by all trainers and for writes by all producers",
    )
    parser.add_argument(
        "--simulate", action="store_true", help="also simulate the run and what may go wrong"
    )
    parser.add_argument(
        "--spot-hours",
        type=float,
        default=4.0,
        help="mean life of a preemptible producer, in hours",
    )
    parser.add_argument(
        "--node-days", type=float, default=30.0, help="mean life of a trainer node, in days"
    )
    parser.add_argument(
        "--slowdown",
        type=float,
        default=5.0,
        help="factor by which the simulated slow store is slower",
    )
    parser.add_argument(
        "--prices", type=Path, metavar="FILE", help="YAML file of prices, to compute the cost"
    )


def main(options: argparse.Namespace) -> None:
    """Print the forecast."""
    run = shared.load_run_or_sweep(options)
    _check(options)
    from dist_sae.config import groups_of
    from dist_sae.planning.cost import read_prices
    from dist_sae.planning.estimate import estimate
    from dist_sae.planning.sizes import find_sizes
    from dist_sae.telemetry.process import resident_bytes

    prices = read_prices(options.prices) if options.prices else None
    parameters = options.parameters and int(options.parameters)
    jobs = find_sizes(run, options.rows, options.width, parameters)
    n = len(groups_of(run))
    groups = [jobs[group::n] for group in range(n)]
    rates = _rates(options, run, groups)
    forecast = estimate(
        groups,
        rates,
        program_bytes=resident_bytes(),
        trainer_bytes=_trainer_bytes(),
        accelerator=options.accelerator,
        prices=prices,
    )
    if options.simulate:
        from dist_sae.planning.scenarios import scenarios

        forecast["simulated"] = scenarios(
            max(chain.from_iterable(groups), key=lambda job: job.run.steps),
            rates,
            spot_hours=options.spot_hours,
            node_days=options.node_days,
            slowdown=options.slowdown,
        )
    shared.print_lines(options, forecast, list(_lines(forecast)))


def _check(options: argparse.Namespace) -> None:
    above_0 = ("rows", "width", "parameters", "network", "store")
    for name in (*above_0, "spot_hours", "node_days", "slowdown"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')}: {value:g} is not above 0")
    if options.measure is not None and options.measure < _LEAST_STEPS:
        raise ConfigError(
            f"--measure: {options.measure} steps are too few; give {_LEAST_STEPS} or more"
        )
    if (options.width is None) != (options.parameters is None):
        raise ConfigError("--width and --parameters describe a model together; give both")


def _rates(
    options: argparse.Namespace, run: "Run", groups: "Sequence[Sequence[RunSizes]]"
) -> "Rates":
    """Collect rates. Bench files take precedence over a measurement, and both over a data sheet."""
    from dist_sae.planning.rates import Rates, rates_from_bench, rates_from_data_sheet, read_bench

    store = options.store and options.store * 1e9
    rates = Rates(read_bytes_per_second=store, write_bytes_per_second=store)
    for name, found in read_bench(options.bench):
        rates = rates.filled_from(rates_from_bench(groups, found, name))
    if options.measure:
        from dist_sae.bench.trial import trial

        rates = rates.filled_from(trial(run, groups, options.measure))
    if options.accelerator:
        rates = rates.filled_from(
            rates_from_data_sheet(groups, options.accelerator, options.network * 1e9)
        )
    return rates


@functools.cache  # starting a process takes seconds
def _trainer_bytes() -> int:
    """Measure a trainer's memory without data, in a separate process with a trainer's imports."""
    program = "from dist_sae.bench.step import program_bytes; print(program_bytes())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return int(done.stdout.split()[-1])


def _lines(forecast: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the printed table: each section, then its names and values."""
    from dist_sae.report.formatting import format_result

    for section, content in forecast.items():
        yield section.replace("_", " ")
        if isinstance(content, list):
            yield from (f"  {line}" for line in content)
            continue
        if section == "simulated":
            names = list(next(iter(content.values())))
            rows = [[format_result(name, of[name]) for name in names] for of in content.values()]
            heads = [name.replace("_seconds", "").replace("_", " ") for name in names]
            yield from shared.table(
                [["", *heads], *map(list.__add__, ([n] for n in content), rows)]
            )
            continue
        for name, value in content.items():
            if isinstance(value, Mapping):
                yield from (
                    f"  {key.replace('_', ' '):42} {format_result(key, x)}"
                    for key, x in value.items()
                )
            elif name.endswith("_bytes") or "bytes" in name.split("_"):
                yield f"  {name.replace('_bytes', '').replace('_', ' '):42} {_bytes(value)}"
            else:
                unit = "rows_per_second" if name.endswith("_rows_per_second") else name
                yield f"  {name.replace('_', ' '):42} {format_result(unit, value)}"


def _bytes(value: float) -> str:
    size, unit = next(((s, u) for s, u in _SCALES if value >= s), (1, "B"))
    return f"{value / size:,.4g} {unit}"
