"""`dist-sae store`: list, verify or clean up the activation set."""

import argparse

from dist_sae.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    actions = shared.add_group(commands, "store", "list, verify or clean up the activation set")
    verify = shared.add_command(
        actions, "verify", _verify, "check every object against its manifest"
    )
    verify.add_argument("--text", action="store_true", help="also compare rows with the corpus")
    shared.add_command(
        actions, "ls", _ls, "list the units of the set, its producers and the runs that read it"
    )
    text = "list the URLs of one site's shards, for webdataset"
    urls = shared.add_command(actions, "urls", _urls, text)
    urls.add_argument("--site", help="site whose shards are listed; default: train.site")
    urls.add_argument(
        "--heldout", action="store_true", help="list the shards of the held-out units instead"
    )
    text = "list shards that no manifest names, which dead producers leave behind"
    gc = shared.add_command(actions, "gc", _gc, text)
    gc.add_argument("--delete", action="store_true", help="also delete them")
    gc.add_argument(
        "--hours",
        type=float,
        default=24.0,
        help="skip younger shards, whose producer may not have finished (default 24)",
    )


def _verify(options: argparse.Namespace) -> None:
    run = shared.load_run_or_sweep(options)
    from dist_sae.producing.verify import verify

    found = verify(run, text=options.text)
    shared.print_result(options, found)
    shared.raise_if_bad(
        run.store.activations,
        f"{found['bad']} of {found['objects']} objects are damaged; "
        f"delete the manifests (units/) of their units and produce them again",
        [f"{key}: {fault}" for key, fault in found["bad_objects"].items()],
    )


def _ls(options: argparse.Namespace) -> None:
    run = shared.load_run_or_sweep(options)
    from dist_sae.data.upkeep import ls

    found = ls(run)
    names = ("url", "plan", "train_units", "heldout_units", "retired_units")
    lines = [f"{name:20} {found[name]}" for name in names]
    lines += [f"{'bytes':20} {size:,.0f} of {site}" for site, size in found["bytes"].items()]
    for name, entries in (("run", found["runs"]), ("claim", found["claims"])):
        lines += [f"{name:20} {key}: {state}" for key, state in entries.items()]
        lines += [f"{name:20} none"] * (not entries)
    shared.print_lines(options, found, lines)


def _urls(options: argparse.Namespace) -> None:
    run = shared.load_run_or_sweep(options)
    from dist_sae.data.upkeep import urls

    found = urls(run, options.site or run.site, heldout=options.heldout)
    shared.print_lines(options, {"urls": found}, found)


def _gc(options: argparse.Namespace) -> None:
    run = shared.load_run_or_sweep(options)
    from dist_sae.data.upkeep import gc

    shared.print_result(options, gc(run, hours=options.hours, delete=options.delete))
