"""One rank of a job that uses all collectives of its control group, and counts its sockets."""

import os
import resource
from pathlib import Path

import torch

from dist_sae.distributed.mesh import join_mesh
from dist_sae.distributed.rendezvous import rendezvous

FEW_FILES = 256


def rank(folder: Path, env: dict[str, str]) -> None:
    """Run the process. Writes its number of sockets and its limit of open files."""
    os.environ.update(env)
    torch.set_num_threads(1)
    files = resource.RLIMIT_NOFILE
    resource.setrlimit(files, (FEW_FILES, resource.getrlimit(files)[1]))
    with rendezvous(int(env["WORLD_SIZE"])) as ranks, join_mesh(ranks) as mesh:
        before = mesh.all_gather_objects(mesh.rank)
        assert mesh.on_first_rank(lambda: before) == list(range(mesh.world))
        mesh.in_background().all_gather_objects(mesh.rank)
        assert mesh.any_rank(mesh.rank == 1)
        sockets = sum(
            os.readlink(file).startswith("socket:")
            for file in Path("/proc/self/fd").iterdir()
            if file.is_symlink()
        )
        (folder / str(mesh.rank)).write_text(f"{sockets} {resource.getrlimit(files)[0]}")
        mesh.barrier()
