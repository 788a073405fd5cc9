"""`dist-sae import`: stores another library's dictionary as a checkpoint of a run.

With the scales s of what is read and s_out of what is written, and a factor v for each latent's
codes,

    z           = W_enc (x - c) + b_enc
    v z         = (v W_enc / s) (s x - s c) + v b_enc
    s_out y_hat = (s_out W_dec / v)^T (v f) + s_out b_dec + (s_out W_skip / s) (s x)

v is s |d|, with |d| the length of the latent's decoder row, so that rows have unit length. For
transcoders, whose rows may have any length, v is s. Thresholds and b_mag are multiplied by v.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_sae.checkpoint.layout import Checkpoints, Piece
from dist_sae.checkpoint.run_folder import run_file_key
from dist_sae.checkpoint.state import IDLE_ROWS
from dist_sae.config import Run, dump_run
from dist_sae.config.fingerprint import run_fingerprint
from dist_sae.config.load import with_absolute_paths
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.normaliser import measure
from dist_sae.data.plan import load_plan
from dist_sae.data.streams import START
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.interface import Widths
from dist_sae.dictionaries.normaliser import SiteNormalisers
from dist_sae.errors import ConfigError
from dist_sae.interop.foreign import read_dictionary, sae_section
from dist_sae.interop.readers import ImportedDictionary
from dist_sae.storage import open_store


def import_dictionary(source: Path, run: Run) -> dict[str, Any]:
    """Store a dictionary as step 0 of a run, for commands such as evaluate, index and report.

    Args:
        source: Folder or file, see `read_dictionary`.
        run: The run to create, with its name, stores, model, text and sites. All other settings in
            `sae` come from the source.

    Returns:
        `run`, the path or URL of the run; `library`, `kind`, `latents`.

    Raises:
        ConfigError: The source cannot be read or does not fit the sites, or the run already has
            checkpoints.
        PlanMismatchError: The store has another activation set than the run's.
        UnitMissingError: No activations have been produced yet.
    """
    imported = read_dictionary(source)
    sae = sae_section(imported, run, source)
    run = Run.model_validate(run.model_dump() | {"sae": sae})
    runs = open_store(run.store.runs, run.store.s3)
    checkpoints = Checkpoints(runs, run.name, 1)
    if checkpoints.steps():
        raise ConfigError(f"{runs.url}/{run.name}: already has checkpoints; choose another name")
    activations = open_store(run.store.activations, run.store.s3)
    plan = load_plan(activations, run)
    resolved = plan.resolve(run)
    activation_set = ActivationSet(activations, plan, run.sites, wait=False)
    normalisers = SiteNormalisers(
        run.reads, run.writes, measure(activation_set, resolved.train.normaliser_rows or 0)
    )
    columns = imported.W_dec.shape[1] // imported.layers
    for verb, sites, width in (
        ("reads", run.reads, imported.W_enc.shape[1]),
        ("writes", run.writes, columns),
    ):
        for site in sites:
            if len(normalisers.by_site[site].mean) != width:
                raise ConfigError(
                    f"{source}: {verb} vectors of width {width}, but {site} has width "
                    f"{len(normalisers.by_site[site].mean)}; name another site or model"
                )
    scales = ([normalisers.by_site[s].scale for s in sites] for sites in (run.reads, run.writes))
    dictionary = convert(resolved, imported, *scales)
    tensors = {name: tensor.detach() for name, tensor in dictionary.tensors()}
    tensors[IDLE_ROWS] = torch.zeros(dictionary.n_latents, dtype=torch.int64)
    pieces = (Piece(name, t, 0, len(t) if t.shape else 1) for name, t in tensors.items())
    places = dict.fromkeys(map(str, range(plan.streams)), START)
    scalars = {"plan": plan.hash, "run": run_fingerprint(resolved), "places": places}
    runs.put(run_file_key(run.name), dump_run(with_absolute_paths(resolved)).encode())
    checkpoints.commit(0, [checkpoints.write(0, pieces)], normalisers.to_scalars() | scalars)
    return {
        "run": f"{runs.url}/{run.name}",
        "library": imported.library,
        "kind": imported.kind,
        "latents": len(imported.W_dec),
    }


def convert(
    run: Run,
    imported: ImportedDictionary,
    read_scales: Sequence[float],
    written_scales: Sequence[float],
) -> Dictionary:
    """Convert a dictionary for raw activations to a recipe of dist_sae, for scaled activations.

    Args:
        run: The run, with the recipe.
        imported: The dictionary for raw activations.
        read_scales: Scale of each site that is read.
        written_scales: Scale of each site that is written.
    """
    n_latents, d_out = imported.W_dec.shape
    layers, d_write = imported.layers, d_out // imported.layers
    widths = Widths((imported.W_enc.shape[1],) * layers, (d_write,) * layers)
    dictionary = build_sae(run.sae, widths)
    norms = imported.W_dec.norm(dim=1).clamp_min(1e-30)
    if run.sae.kind in ("transcoder", "clt_jumprelu"):
        norms = torch.ones_like(norms)
    scales = torch.tensor(read_scales, dtype=torch.float64)[torch.arange(n_latents) % layers]
    out = torch.tensor(written_scales, dtype=torch.float64).repeat_interleave(d_write)
    factors = scales * norms
    per_latent = dict(imported.per_latent)
    subtracts_b_dec = run.sae.kind == "topk"  # the only one here that subtracts b_dec
    if imported.subtracts_b_dec and not subtracts_b_dec:
        shift = imported.W_enc @ imported.b_dec
        per_latent["b_enc"] = per_latent["b_enc"] - shift
        if "b_mag" in per_latent:
            per_latent["b_mag"] = per_latent["b_mag"] - per_latent["r_mag"].exp() * shift
    elif subtracts_b_dec and not imported.subtracts_b_dec:
        per_latent["b_enc"] = per_latent["b_enc"] + imported.W_enc @ imported.b_dec
    W_dec = imported.W_dec * out / factors[:, None]
    values: dict[str, Tensor] = {
        "W_enc": norms[:, None] * imported.W_enc,
        "W_dec": _in_groups(W_dec, layers) if layers > 1 else W_dec,
        "b_dec": out * imported.b_dec,
    }
    if imported.W_skip is not None:
        values["W_skip"] = imported.W_skip * out[:, None] / read_scales[0]
    for name, vector in per_latent.items():
        values[name] = vector if name == "r_mag" else factors * vector
    if "threshold" in values:  # theta is relative to the rows' root mean square norm
        values["theta"] = values.pop("threshold") / dictionary.W_enc.shape[1] ** 0.5
    with torch.no_grad():
        for name, tensor in dictionary.tensors():
            tensor.copy_(values.pop(name))
    assert not values
    return dictionary


def _in_groups(W_dec: Tensor, layers: int) -> Tensor:
    """Return a cross-layer decoder [n_latents, d_out] without its zeros, as in `recipes/clt.py`."""
    by_layer = W_dec.view(-1, layers, layers, W_dec.shape[1] // layers)
    written = [by_layer[:, layer, layer:] for layer in range(layers)]
    return torch.cat(written, 1).reshape(len(W_dec), -1)
