"""Entry point of `dist-sae` and `python -m dist_sae`. Handles signals before other imports."""

import sys

from dist_sae import signals


def main() -> int:
    """Run the command given by the arguments, and return the exit code."""
    signals.install_handlers()
    signals.register_early_exit()
    from dist_sae.commands.cli import main as run_command

    code = run_command()
    signals.exit_on_signal(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
