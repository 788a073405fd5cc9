"""`dist-sae config|store|checkpoints`: their options, and what each of them calls.

As on the rest of the command line, programs are imported when they are called, after the run file
is read.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from dist_sae.config import Run


@runtime_checkable
class Verified(Protocol):
    """Numbers, and perhaps an error to raise once they are printed."""

    def result(self) -> dict[str, Any]: ...

    def raise_if_bad(self) -> None: ...


Result = Mapping[str, Any] | str | Verified
"""Numbers, a text as it is to be printed, or both with an error."""
Add = Callable[..., argparse.ArgumentParser]


def add_groups(commands: Any, add: Add, command: Callable[[argparse.Namespace], None]) -> None:
    """Add the groups.

    Args:
        commands: Where to.
        add: Makes a command that has a run file.
        command: Runs what is chosen, `options.program(options, run)`.
    """

    def group(name: str, text: str) -> Any:
        parser = commands.add_parser(name, help=text, description=text)
        return parser.add_subparsers(metavar="ACTION", required=True)

    def action(
        group: Any, name: str, program: Callable[..., Result], text: str
    ) -> argparse.ArgumentParser:
        parser = add(name, command, text, group)
        parser.set_defaults(program=program)
        return parser

    config = group("config", "the run file itself")
    action(config, "show", _config_show, "print the resolved run")
    schema = config.add_parser("schema", help="print the JSON Schema of run files, for editors")
    schema.add_argument("--json", action="store_true", help="print it on one line")
    schema.set_defaults(command=_config_schema)
    metrics = config.add_parser("metrics", help="print the metrics that programs export")
    metrics.set_defaults(command=_config_metrics)

    store = group("store", "the activation set")
    verify = action(store, "verify", _store_verify, "check every object against its manifest")
    verify.add_argument("--text", action="store_true", help="compare rows with the corpus as well")
    action(store, "ls", _store_ls, "say what is there, who makes it and who reads it")
    urls = action(store, "urls", _store_urls, "list one site's shards, as webdataset reads them")
    urls.add_argument("--site", help="default: train.site")
    urls.add_argument("--heldout", action="store_true", help="the held-out units' instead")
    gc = action(store, "gc", _store_gc, "list what no manifest names: left by dead producers")
    gc.add_argument("--delete", action="store_true", help="delete it as well")
    gc.add_argument(
        "--hours",
        type=float,
        default=24.0,
        help="leave alone what is younger: it may be in the making (default 24)",
    )

    checkpoints = group("checkpoints", "the checkpoints of a run")
    action(checkpoints, "ls", _checkpoints_ls, "say what is there")
    action(checkpoints, "verify", _checkpoints_verify, "check every part against its manifest")
    convert = action(
        checkpoints,
        "convert",
        _checkpoints_convert,
        "make a file of one, or another run begin with it",
    )
    target = convert.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=Path, help="the safetensors file to write")
    target.add_argument(
        "--to-run",
        metavar="NEW.yaml",
        help="a run that is to begin with it; `train` adds the latents it lacks",
    )
    convert.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    convert.add_argument("--moments", action="store_true", help="the optimiser's moments as well")


def _config_show(options: argparse.Namespace, run: "Run") -> Result:
    from dist_sae.config import dump_run

    return run.model_dump(mode="json") if options.json else dump_run(run)


def _config_schema(options: argparse.Namespace) -> None:
    from dist_sae.config import Run

    indent = None if options.json else 2
    sys.stdout.write(json.dumps(Run.model_json_schema(), indent=indent) + "\n")


def _config_metrics(_: argparse.Namespace) -> None:
    from dist_sae.telemetry.metrics import render_table

    sys.stdout.write(render_table())


def _store_verify(options: argparse.Namespace, run: "Run") -> Result:
    from dist_sae.commands.store import verify

    return verify(run, text=options.text)


def _store_ls(options: argparse.Namespace, run: "Run") -> Result:
    from dist_sae.commands.store import ls

    found = ls(run)
    if options.json:
        return found
    lines = [f"{name:20} {found[name]}" for name in ("url", "plan", "train_units", "heldout_units")]
    lines += [f"{'retired_units':20} {found['retired_units']}"]
    lines += [f"{'bytes':20} {size:,.0f} of {site}" for site, size in found["bytes"].items()]
    for name, what in (("run", found["runs"]), ("claim", found["claims"])):
        lines += [f"{name:20} {key}: {words}" for key, words in what.items()]
        lines += [f"{name:20} none"] * (not what)
    return "".join(f"{line}\n" for line in lines)


def _store_urls(options: argparse.Namespace, run: "Run") -> Result:
    from dist_sae.commands.store import urls

    found = urls(run, options.site or run.site, heldout=options.heldout)
    return {"urls": found} if options.json else "".join(f"{url}\n" for url in found)


def _store_gc(options: argparse.Namespace, run: "Run") -> Result:
    from dist_sae.commands.store import gc

    return gc(run, hours=options.hours, delete=options.delete)


def _checkpoints_ls(options: argparse.Namespace, run: "Run") -> Result:
    from dist_sae.commands.checkpoints import ls

    found = ls(run)
    if options.json:
        return found
    lines = [
        f"step {c['step']:<10} {c['rows']:>14,} rows trained   "
        f"{c['bytes'] / 1e6:,.1f} MB in {c['parts']} parts"
        for c in found["checkpoints"]
    ]
    lines += [
        f"step {step:<10} damaged: its manifest does not match its checksum"
        for step in found["damaged"]
    ]
    return "".join(f"{line}\n" for line in lines)


def _checkpoints_verify(_: argparse.Namespace, run: "Run") -> Result:
    from dist_sae.commands.checkpoints import verify

    return verify(run)


def _checkpoints_convert(options: argparse.Namespace, run: "Run") -> Result:
    from dist_sae.checkpoint.folder import open_run
    from dist_sae.commands.checkpoints import convert, convert_to_run
    from dist_sae.errors import ConfigError

    if options.to_run and options.moments:
        raise ConfigError("--moments goes with --output: a run that begins anew has its own")
    if options.to_run:
        return convert_to_run(run, open_run(options.to_run, []), step=options.step)
    return convert(run, options.output, step=options.step, moments=options.moments)
