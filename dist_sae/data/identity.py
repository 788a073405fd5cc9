"""Comparison of a run with a plan: text and model are compared by content, not by path.

A run's settings must equal the plan's, with two exceptions: the paths of text and model may differ,
and the run may need fewer sites. If a path differs, the content is compared. Producers and
evaluation read text and model, and compare everything. Other programs compare what they can without
reading them.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dist_sae.config import Run, differences
from dist_sae.config.data import ActivationsConfig, CorpusConfig, ModelConfig, SyntheticModel
from dist_sae.data.corpus import Corpus
from dist_sae.data.corpus_files import CorpusFile
from dist_sae.errors import AccessError, CorpusError, HubUnavailableError, ModelError
from dist_sae.hub import cached_commit
from dist_sae.storage.model_files import WEIGHTS, checksum, name_or_path, weight_checksums

_SPEED_ONLY = ("batch_tokens", "tensor_parallel", "shards")  # the last is an old name
_PATH_KEYS = {"model": ("path", "revision", "other"), "corpus": ("files", "name", "revision")}
_MOST_NAMED = 5  # most files that a message names
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken"),
)


class _Settings(BaseModel):
    """Sections of a run file that determine the content of an activation set."""

    model: ModelConfig
    corpus: CorpusConfig
    activations: ActivationsConfig


def plan_settings(run: Run) -> dict[str, Any]:
    """Return the settings that are part of the plan; those that only affect speed are not."""
    return _settings(run.model_dump(mode="json", include={"model", "corpus", "activations"}))


def setting_changes(planned: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """List the settings, except paths, that differ from a plan's, as `["a.b: 1 -> 2"]`.

    Args:
        planned: `Plan.settings`; missing keys have their defaults.
        current: `plan_settings` of a run.
    """
    old, new = _without_paths(_with_defaults(planned)), _without_paths(current)
    recorded, wanted = old["activations"].pop("sites"), new["activations"].pop("sites")
    changes = differences(old, new)
    if more := [site for site in wanted if site not in recorded]:
        changes.append(
            f"activations.sites: {', '.join(more)} was not recorded, only {', '.join(recorded)}"
        )
    return changes


def moved_paths(other: Run, run: Run) -> list[str]:
    """List the paths of text or model that differ between two runs, after resolving them.

    For programs that cannot read text and model, and may have no plan.
    """
    old, new = plan_settings(other), plan_settings(run)
    return [
        change
        for section in _PATH_KEYS
        if _resolved(old[section]) != _resolved(new[section])
        for change in _moved(section, old, new)
    ]


def path_changes(
    planned: Mapping[str, Any],
    files: Sequence[CorpusFile],
    commit: str | None,
    content: Mapping[str, str] | None,
    run: Run,
) -> list[str]:
    """List the paths of text or model that differ from the plan's and have different content.

    For programs that otherwise read neither text nor model. Only paths that differ from the plan's
    are checked. Text is compared by `Corpus.consists_of`: by size or (on the hub) commit where
    possible. A model is compared by all files except the weights.

    Args:
        planned: `Plan.settings`.
        files: `Plan.files`.
        commit: `Plan.corpus_commit`.
        content: `Plan.model_content`.
    """
    current = plan_settings(run)
    model, corpus = (_moved(section, planned, current) for section in ("model", "corpus"))
    changes: list[str] = []
    if model and not _is_planned_model(planned, content, run):
        changes += model
    if corpus:
        try:
            if not Corpus(run.corpus, run.store.s3).consists_of(files, commit):
                changes += corpus
        except HubUnavailableError:
            raise
        except (CorpusError, AccessError) as exc:
            changes += [f"{change} ({exc})" for change in corpus]
    return changes


def model_content(model: ModelConfig, *, weights: bool = True) -> dict[str, str] | None:
    """Identify a model by checksums of its files, or by its commit on the hub.

    Files are in a local folder or in a store. The commit is known if the model's configuration was
    loaded before, or if the revision is a commit.

    Args:
        weights: Whether to read the weight files too.

    Returns:
        Checksums by file name, or {"commit": commit}; None for a synthetic model or if nothing is
        known. Names of a second model's files begin with `other/`.

    Raises:
        ModelError: A file cannot be read.
    """
    if isinstance(model, SyntheticModel):
        return None
    if model.other:
        parts = {"": model.of_site("")[0], "other/": model.of_site("@")[0]}
        found = {key: model_content(part, weights=weights) for key, part in parts.items()}
        known = {f"{k}{n}": v for k, names in found.items() for n, v in (names or {}).items()}
        return known or None
    folder = Path(name_or_path(model, weights=False))
    if folder.is_dir():
        local = weights and not model.is_stored
        try:
            content = {
                path.name: checksum(path) for path in _identifying_files(folder, weights=local)
            }
        except OSError as exc:
            raise ModelError(f"model.path {model.path}: cannot be read: {exc}") from exc
        return content | weight_checksums(model) if weights and model.is_stored else content
    commit = cached_commit(model.path, model.revision)
    return {"commit": commit} if commit else None


def content_changes(planned: Mapping[str, str], current: Mapping[str, str] | None) -> list[str]:
    """List the names whose content differs between two models."""
    current = current or {}
    return sorted(name for name in {*planned, *current} if planned.get(name) != current.get(name))


def file_changes(planned: Sequence[CorpusFile], current: Sequence[CorpusFile]) -> list[str]:
    """List the corpus files that have changed, regardless of their order and paths."""
    counts = Counter(file.fingerprint for file in current)
    counts.subtract(Counter(file.fingerprint for file in planned))
    gone = {file.name for file in planned if counts[file.fingerprint] < 0}
    new = {file.name for file in current if counts[file.fingerprint] > 0}
    changes = [
        *(f"{name} has changed" for name in sorted(gone & new)),
        *(f"{name} is gone" for name in sorted(gone - new)),
        *(f"{name} is new" for name in sorted(new - gone)),
    ]
    more = [f"{len(changes) - _MOST_NAMED} more"] * (len(changes) > _MOST_NAMED)
    named = ", ".join(changes[:_MOST_NAMED] + more)
    return [f"the corpus files have changed: {named}"] if changes else []


def _is_planned_model(
    planned: Mapping[str, Any], content: Mapping[str, str] | None, run: Run
) -> bool:
    if content is None:  # a plan of an earlier version has only the path of the model
        old, new = (
            Path(os.path.expanduser(m["path"]))
            for m in (planned["model"], plan_settings(run)["model"])
        )
        return old.is_dir() and old.resolve() == new.resolve()
    known = {name: value for name, value in content.items() if not name.endswith(WEIGHTS)}
    return not content_changes(known, model_content(run.model, weights=False))


def _identifying_files(folder: Path, *, weights: bool) -> Iterator[Path]:
    patterns = ["config.json", "adapter_config.json", *_TOKENIZER]
    if weights:
        patterns.append(f"*{WEIGHTS}")
    for pattern in patterns:
        yield from sorted(folder.glob(pattern))


def _settings(sections: dict[str, Any]) -> dict[str, Any]:
    for key in _SPEED_ONLY:
        sections["model"].pop(key, None)
    return sections


def _with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of settings that are newer than the plan."""
    try:
        known = _settings({**settings, "model": dict(settings["model"])})
        return _settings(_Settings.model_validate(known).model_dump(mode="json"))
    except ValidationError:  # the plan was made by a later version
        return dict(settings)


def _without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        section: {k: v for k, v in keys.items() if k not in _PATH_KEYS.get(section, ())}
        for section, keys in settings.items()
    }


def _resolved(section: Mapping[str, Any]) -> tuple[tuple[Any, Any], set[str]]:
    """Return the revisions and the paths, with links resolved for files that exist here."""
    other = section.get("other") or {}
    names = [
        *section.get("files", ()),
        *(of[key] for of in (section, other) for key in ("path", "name") if key in of),
    ]
    found = set[str]()
    for name in names:
        path = os.path.expanduser(name)
        matches = [path] if os.path.exists(path) else glob(path, recursive=True)
        is_path = matches or Path(path).is_absolute()
        if is_path:
            found |= {os.path.realpath(match) for match in matches or [path]}
        else:  # a file that exists only in pods, or a name on the hub
            found.add(os.path.normpath(name))
    return (section.get("revision"), other.get("revision")), found


def _moved(section: str, planned: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    old, new = (
        {key: settings[section].get(key) for key in _PATH_KEYS[section]}
        for settings in (planned, current)
    )
    return differences(old, new, f"{section}.")
