"""The command line: the list of commands, exit codes, and one-line error messages.

A command imports its program only when it runs, so that `--help` is fast. It reads the run file
first, so that mistakes in it are reported before torch is imported, which takes seconds.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from dist_sae import __version__, logs, signals
from dist_sae.commands import (
    analyse,
    bench,
    browse,
    cancel,
    checkpoints,
    compare,
    completion,
    config,
    estimate,
    evaluate,
    explain,
    export,
    importing,
    index,
    latents,
    plan,
    produce,
    publish,
    render,
    report,
    resume,
    run,
    status,
    store,
    submit,
    train,
)
from dist_sae.commands import logs as pod_logs
from dist_sae.commands.shared import notify_failure, rank
from dist_sae.distributed.supervisor import follow_parent
from dist_sae.errors import EXIT_DONE, EXIT_RESUMABLE, DistSaeError, Stopped

_COMMANDS = (
    *(run, estimate, plan, produce, train, index, latents, explain, analyse, browse),
    *(evaluate, compare, export, importing, publish, report, render),
    *(submit, resume, status, pod_logs, cancel),
    *(bench, config, store, checkpoints, completion),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return the exit code (see `dist_sae.errors`)."""
    options = command_parser().parse_args(arguments)
    # large pages for torch's large buffers, since on a CPU most are allocated again at every step
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    logs.configure(rank=rank())
    signals.install_handlers()
    follow_parent()
    try:
        code = options.command(options)
        sys.stdout.flush()
    except Stopped as stop:
        sys.stderr.write(f"stopped: {stop}\n")
        return stop.exit_code
    except DistSaeError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"error: {line}\n")
        notify_failure(options, error)
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write(signals.INTERRUPTED)
        return EXIT_RESUMABLE
    except BrokenPipeError:  # the reader of our output has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails at exit
        return EXIT_DONE
    except Exception:
        from dist_sae.storage.lives import crash_code

        if (crashed := crash_code()) is None:
            raise
        traceback.print_exc()
        return crashed
    return code or EXIT_DONE


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with every command and its options."""
    parser = argparse.ArgumentParser(
        prog="dist-sae",
        description="Train sparse autoencoders on language-model activations, "
        "on a laptop or a cluster.",
        epilog="Exit codes: 0 done, 2 something to fix, 75 stopped and resumable, 1 a bug.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
    return parser
