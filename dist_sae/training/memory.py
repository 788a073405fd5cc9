"""Memory that training a dictionary takes, computed before any of it is allocated."""

import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from dist_sae.config import Run
from dist_sae.dictionaries import PRODUCT_DTYPES, build_sae
from dist_sae.dictionaries.axis import WHOLE, LatentAxis
from dist_sae.dictionaries.interface import Widths
from dist_sae.distributed.mesh import Mesh
from dist_sae.distributed.zero import deepspeed_config
from dist_sae.errors import ConfigError

logger = logging.getLogger(__name__)

_CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # cgroup v2 and v1
_MOMENTS = 2


class StateBytes(NamedTuple):
    """Bytes of a rank's training state, the minimum memory that the rank needs."""

    weights: int
    gradients: int
    moments: int
    running_mean: int
    encoder_copy: int
    """A copy of W_enc in the products' precision."""


def state_bytes(run: Run, widths: Widths, axis: LatentAxis = WHOLE) -> StateBytes:
    """Compute the bytes of a rank's training state.

    Args:
        run: The run.
        widths: Widths of the sites.
        axis: The rank's place among shards and replicas.
    """
    with torch.device("meta"):
        sae = build_sae(run.sae, widths, axis)
    weights = sum(parameter.nbytes for parameter in sae.parameters())
    zero = deepspeed_config(run)["zero_optimization"]
    stage = zero.get("stage", 0)
    gradients = weights // (axis.replicas if stage > 1 else 1)
    moments = _MOMENTS * weights // (axis.replicas if stage else 1)
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        moments = 0  # offloaded to the CPU's memory
    mean = weights if run.train.ema_decay else 0
    products = PRODUCT_DTYPES[run.train.products]
    is_copied = not stage and products != sae.W_enc.dtype
    copy = sae.W_enc.numel() * products.itemsize if is_copied else 0
    return StateBytes(weights, gradients, moments, mean, copy)


def check_memory(jobs: Sequence[tuple[Run, Widths, Mesh]], mesh: Mesh) -> None:
    """Log the memory that the dictionaries take, and refuse those that do not fit on a device.

    Collective, because ranks on the CPU of one machine share its memory.

    Args:
        jobs: For each dictionary its run, the widths of its sites, and its mesh.
        mesh: The ranks.

    Raises:
        ConfigError: A machine or GPU has less memory than weights, gradients and moments take.
    """
    own = [sum(state_bytes(run, widths, own.axis)) for run, widths, own in jobs]
    place, there = memory_of(mesh.device)
    if mesh.groups_here > 1 and mesh.device.type == "cpu":  # the sweep's other groups take the rest
        place = f"{place} (an equal share for each of {mesh.groups_here} groups of ranks)"
        there //= mesh.groups_here
    needs: dict[str, int] = {}
    for where, room, taken in mesh.all_gather_objects(
        (place, there, own), tuple[str, int, list[int]]
    ):
        needs[where] = needs.get(where, 0) + sum(taken)
        if needs[where] > room:
            if len(jobs) > 1:
                each = ", ".join(
                    f"{run.name} {bytes_ / 1e9:,.3g}"
                    for (run, *_), bytes_ in zip(jobs, taken, strict=True)
                )
                raise ConfigError(
                    f"sweep: the dictionaries take {needs[where] / 1e9:,.1f} GB on {where} with "
                    f"gradients and Adam's moments, but it has only {room / 1e9:,.1f} GB; "
                    f"GB per rank: {each}; train fewer or narrower ones at a time, or divide them "
                    f"over more GPUs or machines (processes.latent_shards)"
                )
            run, widths, _ = jobs[0]
            raise ConfigError(
                f"sae.n_latents: {run.sae.n_latents:,} latents that read {widths.d_in:,} and write "
                f"{widths.d_out:,} numbers take {needs[where] / 1e9:,.1f} GB on {where} with "
                f"gradients and Adam's moments, but it has only {room / 1e9:,.1f} GB; use fewer "
                f"latents or sites, or divide them over more GPUs or machines "
                f"(processes.latent_shards)"
            )
    if mesh.is_first:
        logger.info(
            "%s %.3g of %.3g GB on %s: weights, gradients and moments",
            "the dictionary takes" if len(jobs) == 1 else f"{len(jobs)} dictionaries take",
            needs[place] / 1e9,
            there / 1e9,
            place,
        )


def memory_of(device: torch.device) -> tuple[str, int]:
    """Return the location of a device's memory (host, or host and GPU) and its size in bytes."""
    host = socket.gethostname()
    if device.type == "cuda":
        return f"{host}, GPU {device.index}", torch.cuda.mem_get_info(device)[1]
    there = psutil.virtual_memory().total
    for name in _CGROUP_LIMITS:
        limit = Path("/sys/fs/cgroup", name)
        words = limit.read_text().strip() if limit.exists() else ""
        there = min(there, int(words)) if words.isdecimal() else there
    return host, there
