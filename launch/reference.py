"""Write docs/run-file.md from the schema of run files, and docs/commands.md from the CLI's parser.

A test checks that the committed pages are up to date.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dist_sae.commands.cli import command_parser
from dist_sae.config import Run
from dist_sae.config.base import Section
from dist_sae.config.cluster import ClusterConfig

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RUN_FILE = """\
<!-- Generated from dist_sae/config/ by launch/render.sh: edit the former. -->

# The run file

One YAML file describes a whole run. This page lists all of its keys, by section. [The
glossary](glossary.md) explains the words.

- `dist-sae config show RUN.yaml` prints the run with all defaults.
- `--set section.key=value` overrides a key on the command line.
- An unknown key is an error.
- `null` means that a key is not set. Its meaning says what happens then.
- The column "values" lists the words that a key accepts. For other keys it shows an example.

Some keys were renamed, and the old names still work:

| old name | new name |
|---|---|
| `model.shards` | `model.tensor_parallel` |
| `processes.shards` | `processes.latent_shards` |
| `missing_seconds`, `lost_seconds`, `hung_seconds` in `train` | the same in `timeouts` |

One key is not in a section:
"""
COMMANDS = """\
<!-- Generated from dist_sae/commands/ by launch/render.sh: edit the former. -->

# Commands

This page lists all commands and their options. `RUN` is a run file, or the folder of a run (a path
or a URL). Every command that takes `RUN` also takes these options:

- `--set KEY=VALUE`: override a key of [the run file](run-file.md)
- `--job NAME`: use one job of [a sweep](sweeps.md)
- `--json`: print the result as one JSON object

| exit code | meaning |
|---|---|
| 0 | done |
| 2 | something for you to fix; one line says what |
| 75 | stopped; the same command continues |
| 1 | a bug |
"""
# examples for keys that have no default and that no run file in launch/runs/ sets
EXAMPLES: dict[str, Any] = {
    "cluster.config_maps": ["proxy"],
    "cluster.context": "my-cluster",
    "cluster.env": {"HF_HUB_OFFLINE": "1"},
    "cluster.pull_secrets": ["registry-login"],
    "export.model_name": "HuggingFaceTB/SmolLM2-135M",
    "export.neuronpedia.model": "smollm2-135m",
    "export.neuronpedia.source_set": "res-4k",
    "index.name": "first-half",
    "least": 100,
    "pod_patch": {"metadata": {"annotations": {"sidecar.istio.io/inject": "false"}}},
    "sae.bandwidth": 0.03,
    "model.other.path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "model.other.revision": "main",
    "sae.capacity": 1.5,
    "sae.initial_l0": 50.0,
    "sae.initial_threshold": 0.03,
    "sae.k_start": 128,
    "sae.multi_factor": 4,
    "sae.prefix_weights": "[1, 1, 1, 1, 1]",
    "sae.sparsity": 0.3,
    "sae.target_l0": 32.0,
    "store.s3.ca_bundle": "/etc/ssl/my-ca.pem",
    "store.s3.endpoint_url": "http://127.0.0.1:8333",
    "store.s3.kms_key_id": "alias/activations",
    "store.s3.region": "eu-central-1",
    "sweep.jobs": {"k32": {"sae.k": 32}},
    "sweep.over": {"train.seed": [0, 1]},
    "telemetry.port": 9400,
    "telemetry.pushgateway_url": "http://127.0.0.1:9091",
    "telemetry.tensorboard": "work/tensorboard",
    "telemetry.wandb": "my-project",
    "tolerations.key": "nvidia.com/gpu",
    "tolerations.value": "spot",
    "train.ema_decay": 0.999,
    "train.parent.run": "old",
    "train.parent.step": 4000,
    "train.site": "resid_post.7",
    "sae.reads": "[mlp_in.7]",
    "sae.writes": "[mlp_out.7]",
}
SHARED = {"--help", "--set", "--job", "--json", "run"}
PODS = ("planner", "producer", "trainer", "index", "reporter")


def render_reference() -> dict[str, str]:
    """Return the generated pages by file name in docs/."""
    return {"run-file.md": render_run_file(), "commands.md": render_commands()}


class Key(NamedTuple):
    """A line of a table."""

    name: str
    default: str
    values: str
    meaning: str


def render_run_file() -> str:
    """Render docs/run-file.md: a heading for each section, a table line for each key."""
    own = {name for name, field in Run.model_fields.items() if not sections_of(field.annotation)}
    lines = [RUN_FILE, *_table({"": _keys(Run, "", own.__contains__)}, "")]
    for name, field in Run.model_fields.items():
        kinds = sections_of(field.annotation)
        if not kinds:
            continue
        lines += [f"## {name}", ""]
        if len(kinds) > 1:
            words = {str(kind.model_fields["kind"].default): kind for kind in kinds}
            lines += [f"- `kind: {word}`: {_text(kind.__doc__)}" for word, kind in words.items()]
            lines.append("")
            lines += _table({word: _keys(kind, f"{name}.") for word, kind in words.items()}, "kind")
        else:
            lines += [_text(kinds[0].__doc__), ""]
            lines += _table({"": _keys(kinds[0], f"{name}.", lambda key: key not in PODS)}, "")
    parts = {name: ClusterConfig.model_fields[name] for name in PODS}
    pods = {
        name: _keys(sections_of(field.annotation)[0], "", given=field.default)
        for name, field in parts.items()
    }
    about = f"Settings of the pods of one part. PART is one of: {', '.join(PODS)}."
    lines += ["### cluster.PART", "", about, ""]
    lines += [*_table(pods, "part"), *_about_parts(parts)]
    return "\n".join(lines)


def _about_parts(parts: Mapping[str, FieldInfo]) -> list[str]:
    return [
        f"- `{name}`: {_text(field.description)}"
        for name, field in parts.items()
        if field.description
    ]


def _table(tables: Mapping[str, list[Key]], what: str) -> list[str]:
    """Render one table for all kinds of a section. A key that several kinds share has one line."""
    having: dict[Key, list[str]] = {}
    for kind, keys in tables.items():
        for key in keys:
            having.setdefault(key, []).append(kind)
    columns = ["key", *([what] if what else []), "default", "values", "meaning"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for key, kinds in having.items():
        of = "all" if len(kinds) == len(tables) else ", ".join(kinds)
        cells = [f"`{key.name}`", *([of] if what else []), key.default, key.values, key.meaning]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _keys(
    section: type[Section],
    prefix: str,
    wanted: Callable[[str], bool] = lambda _: True,
    given: Any = None,
) -> list[Key]:
    """Return the keys of a section and of the sections in it.

    Args:
        section: The section.
        prefix: Path of the section in the run file, with a trailing dot.
        wanted: Predicate that selects keys by name.
        given: The section's default value, if that differs from the defaults of its keys.
    """
    keys: list[Key] = []
    for name, field in section.model_fields.items():
        if name == "kind" or not wanted(name):
            continue
        default = getattr(given, name) if isinstance(given, BaseModel) else _default(field)
        inner = sections_of(field.annotation)
        if field.description or not inner:
            keys.append(_key(prefix + name, field, default))
        for one in inner:
            keys += _keys(one, f"{prefix}{name}.", given=default)
    return keys


def _key(name: str, field: FieldInfo, default: Any) -> Key:
    assert field.description, f"{name} of the run file has no meaning: write a docstring under it"
    words = words_of(field.annotation)
    if words:
        values = ", ".join(f"`{_yaml(word)}`" for word in words)
    elif sections_of(field.annotation):
        values = ""  # the section's keys follow in the table
    else:
        example = _shipped().get(name, default)
        if example in (None, ..., (), {}):
            assert name in EXAMPLES, f"{name} of the run file has no example: add one"
            example = EXAMPLES[name]
        values = f"`{_yaml(example)}`"
    shown = "**required**" if default is ... else f"`{_yaml(default)}`"
    return Key(name, shown, values, _text(field.description))


def _default(field: FieldInfo) -> Any:
    if field.is_required():
        return ...
    return field.get_default(call_default_factory=True, validated_data={})


def sections_of(annotation: Any) -> list[type[Section]]:
    """Return the sections that a key can contain: none for a value, several if it has a `kind`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inner in get_args(annotation) for section in sections_of(inner)]


def words_of(annotation: Any) -> list[Any]:
    """Return the words that a key accepts, or an empty list if it accepts other values."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if annotation is bool:
        return [True, False]
    return [word for inner in get_args(annotation) for word in words_of(inner)]


@cache
def _shipped() -> dict[str, Any]:
    """Return the values in launch/runs/ by key."""
    values: dict[str, Any] = {}

    def collect(section: dict[str, Any], prefix: str) -> None:
        for key, value in section.items():
            if isinstance(value, dict):
                collect(value, f"{prefix}{key}.")
            values[f"{prefix}{key}"] = value
            if prefix.startswith("cluster."):
                values[key] = value  # the keys of a part's pods are listed without a prefix

    for path in sorted((ROOT / "launch" / "runs").glob("*.yaml"), reverse=True):
        collect(yaml.safe_load(path.read_text()), "")
    return values


def _yaml(value: Any) -> str:
    """Return a value as in a run file, on one line."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value) if not isinstance(value, str) else value


def _text(text: str | None) -> str:
    return " ".join((text or "").replace("|", "\\|").replace("<", "&lt;").split())


def render_commands() -> str:
    """Render docs/commands.md: a heading for each command, a line for each of its own options."""
    lines = [COMMANDS]
    for path, about, command in _commands(command_parser(), "dist-sae", ""):
        actions = command._actions
        given = [_value(action) for action in actions if not action.option_strings]
        lines += [f"## {' '.join([path, *given])}", "", f"{about[:1].upper()}{about[1:]}.", ""]
        own = [action for action in actions if not {*action.option_strings, action.dest} & SHARED]
        lines += [f"- `{_usage(action)}`{_description(action)}" for action in own]
        lines += [""] * bool(own)
    return "\n".join(lines)


def _commands(
    parser: argparse.ArgumentParser, path: str, about: str
) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Yield path, help text and parser of each command that has no subcommands."""
    groups = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    if not groups:
        yield path, about, parser
    for group in groups:
        descriptions = {each.dest: each.help or "" for each in group._choices_actions}
        for name, command in group.choices.items():
            yield from _commands(command, f"{path} {name}", descriptions[name])


def _value(action: argparse.Action) -> str:
    if action.choices:
        return "|".join(str(choice) for choice in action.choices)
    return str(action.metavar or action.dest.upper())


def _usage(action: argparse.Action) -> str:
    if not action.option_strings:
        return _value(action)
    value = "" if action.nargs == 0 else f" {_value(action)}"
    return max(action.option_strings, key=len) + value


def _description(action: argparse.Action) -> str:
    plain = isinstance(action.default, int | float | str) and action.nargs != 0
    text = argparse.HelpFormatter("")._expand_help(action) if action.help else ""
    default = f"default {action.default}" if plain and "default" not in text else ""
    description = "; ".join(part for part in (_text(text), default) if part)
    return description and f": {description}"


if __name__ == "__main__":
    for page, text in render_reference().items():
        (DOCS / page).write_text(text)
