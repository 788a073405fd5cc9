"""`dist-sae publish`: an export with a model card, in a folder or in a repository on the hub."""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dist_sae import __version__, hub
from dist_sae.config import Run
from dist_sae.config.data import DatasetCorpus, HuggingFaceModel, layer_of
from dist_sae.config.transcoder import TranscoderConfig
from dist_sae.errors import ConfigError, ObjectNotFoundError
from dist_sae.interop.export import Exported, export_checkpoint
from dist_sae.interop.raw import model_name, origin
from dist_sae.storage import UNMETERED, Meter, ObjectStore, open_store

CARD = "README.md"
_PIECE_BYTES = 16 * 2**20
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w-][\w.-]*", re.ASCII)
_NUMBERS = {
    "fvu": ("fraction of variance unexplained (FVU)", "{:.4g}"),
    "l0": ("active latents per vector (L0)", "{:.4g}"),
    "dead_share": ("dead latents", "{:.2%}"),
    "ce_recovered": ("cross-entropy recovered, relative to zero ablation", "{:.2%}"),
    "ce_clean": ("cross-entropy of the model", "{:.4g} nats"),
    "ce_spliced": ("cross-entropy with reconstructed activations", "{:.4g} nats"),
    "rows": ("held-out vectors", "{:,}"),
}
_FOLDER_LIBRARIES = {"SAELens", "dictionary_learning"}
"""Libraries whose tools, including SAEBench, look for dictionaries in folders of a repository."""
_LOADING = {
    "SAELens": (
        'from sae_lens import SAE\n\nsae = SAE.from_pretrained("{repository}", "{folder}")'
    ),
    "sparsify": (
        'from sparsify import SparseCoder\n\nsae = SparseCoder.load_from_hub("{repository}")'
    ),
    "dictionary_learning": (
        "from dictionary_learning.utils import load_dictionary\n"
        "from huggingface_hub import snapshot_download\n\n"
        'sae, config = load_dictionary(snapshot_download("{repository}") + "/{folder}", "cpu")'
    ),
    "circuit-tracer": (
        "from circuit_tracer.utils.hf_utils import load_transcoder_from_hub\n\n"
        'transcoders, config = load_transcoder_from_hub("{repository}")'
    ),
    "layer": (
        "from circuit_tracer.transcoder.single_layer_transcoder import load_relu_transcoder\n"
        "from huggingface_hub import hf_hub_download\n\n"
        'path = hf_hub_download("{repository}", "layer_{layer}.safetensors")\n'
        "transcoder = load_relu_transcoder(path, {layer})"
    ),
}


class Licences(NamedTuple):
    """Names of licenses, as their owners write them; None if not stated."""

    dictionary: str | None = None
    model: str | None = None
    text: str | None = None


def write(
    run: Run,
    repository: str,
    folder: Path,
    licences: Licences,
    meter: Meter = UNMETERED,
    step: int | None = None,
    format_name: str = "sae-lens",
) -> list[Path]:
    """Write the files of a repository: the export's files and a model card. Returns their paths.

    Args:
        run: The run.
        repository: Name of the repository, as org/name, for the card.
        folder: Folder to write to, created if missing. It may contain only files of an earlier
            call.
        licences: Licenses for the card.
        meter: Receives the store's metrics.
        step: Step of the checkpoint; None for the newest.
        format_name: Format of the export.

    Raises:
        ConfigError: `check` fails, the folder has other files, or the run cannot be exported.
    """
    check(run, repository)
    exported = export_checkpoint(run, meter, step, format_name)
    runs = open_store(run.store.runs, run.store.s3, meter)
    subfolder = exported.run.site if exported.library in _FOLDER_LIBRARIES else ""
    names = {
        f"{subfolder}/{name}".lstrip("/"): f"{exported.folder}/{name}" for name in exported.files
    }
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if others := sorted(there - names.keys() - {CARD}):
        raise ConfigError(f"--dry-run {folder}: already contains {others[0]}; name an empty folder")
    for name, key in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            size = runs.size(key) or 0
            for start in range(0, size, _PIECE_BYTES):
                file.write(runs.get(key, start, min(start + _PIECE_BYTES, size)))
    text = model_card(exported, repository, subfolder, licences, _evaluation(runs, exported))
    (folder / CARD).write_text(text)
    return [folder / name for name in (CARD, *names)]


def send(
    run: Run, repository: str, licences: Licences, *, public: bool, replace: bool, **export: Any
) -> str:
    """Write the files to a temporary folder, and upload them. Returns the commit's URL.

    Args:
        run: The run.
        repository: Name of the repository, as org/name.
        licences: Licenses for the card.
        public: Whether a repository that is created is public.
        replace: Whether the repository may already have files.
        **export: Arguments for `write`: meter, step, format_name.

    Raises:
        ConfigError: `write` fails, or the hub rejects the upload.
        HubUnavailableError: The hub cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="dist-sae-publish-") as place:
        folder = Path(place)
        write(run, repository, folder, licences, **export)
        message = f"{run.name}: {run.sae.kind} dictionary of {run.described_sites}"
        return hub.upload(folder, repository, message, public=public, replace=replace)


def check(run: Run, repository: str) -> None:
    """Check the names of the repository and of the model before a run is published.

    Raises:
        ConfigError: `repository` is not a valid name, or the model's name is only a local folder.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
        raise ConfigError(f"{repository}: not a repository name; use ORG/NAME")
    name = model_name(run)
    is_folder = not _HUB_NAME.fullmatch(name) or Path(name).exists()
    if isinstance(run.model, HuggingFaceModel) and is_folder and not run.export.model_name:
        raise ConfigError(
            f"model.path: {name} is a local folder; give the model's name on the hub with --set "
            f"export.model_name=ORG/NAME"
        )


def model_card(
    exported: Exported,
    repository: str,
    subfolder: str,
    licences: Licences,
    evaluation: Mapping[str, Any] | None,
) -> str:
    """Return the model card, in Markdown with the hub's metadata first.

    Args:
        exported: The export.
        repository: Name of the repository, as org/name.
        subfolder: Folder of the export in the repository; empty for the root.
        licences: Licenses for the card.
        evaluation: The checkpoint's `evaluation.json`, if there is one.
    """
    run, sae = exported.run, exported.run.sae
    model, is_language_model = model_name(run), isinstance(run.model, HuggingFaceModel)
    metadata: dict[str, Any] = {"tags": ["sparse-autoencoder", "interpretability", "dist_sae"]}
    if exported.library == "SAELens":
        metadata["library_name"] = "saelens"
    if is_language_model:
        metadata["base_model"] = model
    if isinstance(run.corpus, DatasetCorpus):
        metadata["datasets"] = [run.corpus.name]
    if licences.dictionary:
        metadata["license"] = licences.dictionary
    rows = exported.checkpoint.step * run.train.batch_rows
    facts = {
        "kind": f"`{sae.kind}`, {sae.n_latents:,} latents",
        "model": f"{model} (license: {licences.model or 'not stated'})",
        "sites": f"`{run.described_sites}`",
        "text": f"{run.corpus.label} (license: {licences.text or 'not stated'})",
        "contexts": f"{run.activations.context_tokens} tokens",
        "trained on": f"{rows:,} vectors",
        "format": exported.library,
        "license": licences.dictionary or "not stated",
    }
    numbers = "Not evaluated."
    if evaluation:
        found = {
            text: form.format(evaluation[name])
            for name, (text, form) in _NUMBERS.items()
            if evaluation.get(name) is not None
        }
        numbers = _table("held out", "", found)
    settings = {"sae": sae.model_dump(), "train": run.train.model_dump(exclude={"parent"})}
    is_single_layer = exported.library == "circuit-tracer" and isinstance(sae, TranscoderConfig)
    loading = _LOADING["layer" if is_single_layer else exported.library].format(
        repository=repository,
        folder=subfolder,
        layer=layer_of(run.site) if is_single_layer else None,
    )
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False).rstrip()}\n---",
        f"# {run.name}",
        f"A dictionary of activations of {model}, trained with dist_sae {__version__}.",
        _table("", "", facts),
        numbers,
        f"## Loading\n\n```python\n{loading}\n```",
        "It takes raw activations. The scale factors of training are folded into the weights.",
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(settings, sort_keys=False).rstrip()}\n```",
        f"## Origin\n\n```json\n{json.dumps(origin(run, exported.checkpoint), indent=2)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _table(first: str, second: str, rows: Mapping[str, str]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [f"| {cell(name)} | {cell(value)} |" for name, value in rows.items()]
    return "\n".join([f"| {first} | {second} |", "|---|---|", *lines])


def _evaluation(runs: ObjectStore, exported: Exported) -> Mapping[str, Any] | None:
    """Return this checkpoint's evaluation, or None if the stored one is for another checkpoint."""
    suffix = exported.folder.rpartition("-step-")
    name = f"evaluation-step-{suffix[2]}.json" if suffix[1] else "evaluation.json"
    try:
        found: dict[str, Any] = json.loads(runs.get(f"{exported.run.name}/{name}"))
    except ObjectNotFoundError:
        return None
    same = found.get("made_from", {}).get("checkpoint") == exported.checkpoint.digest
    return found if same else None
