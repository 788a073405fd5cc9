"""`dist-sae completion`: a script that lets a shell complete commands, options and settings."""

import argparse
import sys
from collections.abc import Iterator

from dist_sae.commands import shared

_SHELLS = ("bash", "zsh", "fish")
_BASH = """\
# eval "$(dist-sae completion bash)", or save it in a file that the shell reads when it starts
_dist_sae() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} at=dist-sae word known
    known="COMMANDS"
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        case "$known" in *"|$at $word|"*) at="$at $word" ;; esac
    done
    if [ "$prev" = --set ]; then
        compopt -o nospace 2>/dev/null
        COMPREPLY=($(compgen -W "KEYS" -S = -- "$cur"))
        return
    fi
    case "$at" in
CASES
    esac
}
complete -o filenames -F _dist_sae dist-sae
"""
_CASE = """\
        "AT") COMPREPLY=($(compgen -W "WORDS" -- "$cur")FILES) ;;"""
_FILES = """ $(compgen -f -X '!*.y*ml' -- "$cur") $(compgen -d -- "$cur")"""
_ZSH = """\
# source <(dist-sae completion zsh), after compinit
autoload -U +X bashcompinit && bashcompinit
"""


def add(commands: shared.Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("completion", help="print the completion script for a shell")
    parser.add_argument("shell", choices=_SHELLS, help="shell that will run the script")
    parser.set_defaults(command=main)


def main(options: argparse.Namespace) -> None:
    """Print the script."""
    from dist_sae.commands.cli import command_parser  # here, since it imports this module

    parser = command_parser()
    if options.shell == "fish":
        script = "\n".join(_fish(parser)) + "\n"
    else:
        script = (_ZSH if options.shell == "zsh" else "") + _bash(parser)
    sys.stdout.write(script)


def _bash(parser: argparse.ArgumentParser) -> str:
    """Return the script for bash, which zsh can also run."""
    cases = []
    commands = dict(_commands(parser, ("dist-sae",)))
    for path, command in commands.items():
        words = " ".join([*_choices(command), *_options(command)])
        case = _CASE.replace("AT", " ".join(path)).replace("WORDS", words)
        cases.append(case.replace("FILES", _FILES if _takes_run(command) else ""))
    known = "|".join(["", *(" ".join(path) for path in commands), ""])
    script = _BASH.replace("COMMANDS", known).replace("CASES", "\n".join(cases))
    return script.replace("KEYS", " ".join(_keys()))


def _fish(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield "# dist-sae completion fish | source"
    yield "complete -c dist-sae -f"
    for path, command in _commands(parser, ()):
        seen = "; and ".join(f"__fish_seen_subcommand_from {name}" for name in path)
        choices = " ".join(_choices(command))
        if choices:
            none = f"not __fish_seen_subcommand_from {choices}"
            when = f"{seen}; and {none}" if seen else none
            yield f"complete -c dist-sae -n '{when}' -a '{choices}'"
        for option in _options(command) if path else ():
            name = option.removeprefix("--")
            keys = f" -x -a '{' '.join(f'{key}=' for key in _keys())}'" if name == "set" else ""
            yield f"complete -c dist-sae -n '{seen}' -l {name}{keys}"
        if _takes_run(command):
            yield f"complete -c dist-sae -n '{seen}' -k -a '(__fish_complete_suffix .yaml)'"


def _commands(
    parser: argparse.ArgumentParser, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Yield every parser with the words on the command line that select it."""
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from _commands(command, (*path, name))


def _choices(command: argparse.ArgumentParser) -> list[str]:
    """Return the possible next words: commands, or values of a positional argument."""
    positional = [action for action in command._actions if not action.option_strings]
    return [str(choice) for action in positional for choice in action.choices or ()]


def _options(command: argparse.ArgumentParser) -> list[str]:
    options = [option for action in command._actions for option in action.option_strings]
    return [option for option in options if option.startswith("--")]


def _takes_run(command: argparse.ArgumentParser) -> bool:
    return any(action.dest == "run" for action in command._actions)


def _keys() -> list[str]:
    """Return the keys of the run file, for --set."""
    from dist_sae.config import Run
    from dist_sae.config.messages import dotted_keys

    return sorted(set(dotted_keys(Run)))
