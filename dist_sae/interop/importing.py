"""`dist-sae import`: another library's dictionary, as the checkpoint of a run.

With s the scale of the site's activations, and |d| the lengths of decoder rows,

    z = W_enc (x - c) + b_enc = (W_enc / s) (s x - s c) + b_enc
    s x_hat = (s W_dec)^T f + s b_dec = (W_dec / |d|)^T (s |d| f) + s b_dec

so W_enc |d|, and b_enc, thresholds and b_mag times s |d| give a dictionary with unit rows. Lengths
that differ decide which latents TopK selects, so they stay there; rows then have the mean length 1.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_sae.checkpoint.folder import run_file_key
from dist_sae.checkpoint.layout import Checkpoints, Piece
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
from dist_sae.dictionaries.normaliser import SiteNormalisers
from dist_sae.errors import ConfigError
from dist_sae.interop.foreign import Foreign, read_foreign, settings
from dist_sae.storage import open_store

_EQUAL = 1e-3  # relative difference of decoder rows' lengths that is rounding


def import_dictionary(source: Path, run: Run) -> dict[str, Any]:
    """Store a dictionary as step 0 of a run, which evaluate, index and report then take.

    Args:
        source: Folder with the files of SAELens, sparsify or Gemma Scope.
        run: Names the run, its stores, model, text and site; `sae` is that of the source.

    Returns:
        `run`, its place; `library`, `kind`, `latents`.

    Raises:
        ConfigError: The source cannot be read or does not fit the site, or the run exists.
        PlanMismatchError: The run's activation set is another one.
        UnitMissingError: No activations have been produced yet.
    """
    found = read_foreign(source)
    sae = settings(found)
    run = Run.model_validate(run.model_dump() | {"sae": sae})
    runs = open_store(run.store.runs, run.store.s3)
    checkpoints = Checkpoints(runs, run.name, 1)
    if checkpoints.steps():
        raise ConfigError(f"{runs.url}/{run.name}: has checkpoints already; choose another name")
    activations = open_store(run.store.activations, run.store.s3)
    plan = load_plan(activations, run)
    resolved = plan.resolve(run)
    there = ActivationSet(activations, plan, run.sites, wait=False)
    normalisers = SiteNormalisers(
        run.reads, run.writes, measure(there, resolved.train.normaliser_rows or 0)
    )
    width = normalisers.widths.d_in
    if width != found.W_dec.shape[1]:
        raise ConfigError(
            f"{source}: reads {found.W_dec.shape[1]} numbers, and {run.site} has {width}; name "
            f"another site or model"
        )
    dictionary = converted(resolved, found, normalisers.of[run.site].scale)
    tensors = {name: tensor.detach() for name, tensor in dictionary.tensors()}
    tensors[IDLE_ROWS] = torch.zeros(dictionary.n_latents, dtype=torch.int64)
    pieces = (Piece(name, t, 0, len(t) if t.shape else 1) for name, t in tensors.items())
    places = dict.fromkeys(map(str, range(plan.streams)), START)
    scalars = {"plan": plan.hash, "run": run_fingerprint(resolved), "places": places}
    runs.put(run_file_key(run.name), dump_run(with_absolute_paths(resolved)).encode())
    checkpoints.commit(0, [checkpoints.write(0, pieces)], normalisers.to_scalars() | scalars)
    return {
        "run": f"{runs.url}/{run.name}",
        "library": found.library,
        "kind": found.kind,
        "latents": len(found.W_dec),
    }


def converted(run: Run, found: Foreign, scale: float) -> Dictionary:
    """The dictionary for activations times `scale`."""
    dictionary = build_sae(run.sae, found.W_dec.shape[1])
    norms = found.W_dec.norm(dim=1).clamp_min(1e-30)
    if found.kind == "topk" and (norms.max() - norms.min()) > _EQUAL * norms.mean():
        norms = norms.mean().expand_as(norms)
    of_latents = dict(found.of_latents)
    shift = found.W_enc @ found.b_dec
    centred = found.kind == "topk"  # what this recipe here does
    if found.centred and not centred:
        of_latents["b_enc"] = of_latents["b_enc"] - shift
        if "b_mag" in of_latents:
            of_latents["b_mag"] = of_latents["b_mag"] - of_latents["r_mag"].exp() * shift
    elif centred and not found.centred:
        of_latents["b_enc"] = of_latents["b_enc"] + shift
    values: dict[str, Tensor] = {
        "W_enc": norms[:, None] * found.W_enc,
        "W_dec": found.W_dec / norms[:, None],
        "b_dec": scale * found.b_dec,
    }
    for name, vector in of_latents.items():
        values[name] = vector if name == "r_mag" else scale * norms * vector
    if "threshold" in values:  # its parameter is in units of the rows' root mean square norm
        values["theta"] = values.pop("threshold") / dictionary.W_enc.shape[1] ** 0.5
    with torch.no_grad():
        for name, tensor in dictionary.tensors():
            tensor.copy_(values.pop(name))
    assert not values
    return dictionary
