"""One of two ranks that exchange messages. The second can send a pickle as an attack."""

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dist_sae.distributed.mesh import Mesh, join_mesh
from dist_sae.distributed.rendezvous import rendezvous
from dist_sae.errors import DistSaeError
from dist_sae.storage.records import Record


class Part(Record):
    key: str
    bytes: int


class Message(NamedTuple):
    parts: dict[int, Part]
    none: Part | None
    steps: set[int]
    number: float


class Command:
    """An object that creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def message(rank: int) -> Message:
    return Message({rank: Part(key="x" * 9 * rank, bytes=2**60)}, None, {rank, 7}, 0.1 + rank / 3)


def talk(mesh: Mesh) -> Any:
    everyone = mesh.all_gather_objects(message(mesh.rank), Message)
    first = mesh.on_first_rank(lambda: {"fvu": float("inf"), "site": ["a", None, mesh.rank]})
    return [everyone == [message(0), message(1)], repr(first)]


def attacked(mesh: Mesh, folder: Path) -> Any:
    if mesh.is_first:
        return mesh.all_gather_objects(None)
    command: Any = Command(folder / "reached")
    dist.all_gather_object([None, None], command, mesh.control)
    return None


def rank(what: str, folder: Path, env: dict[str, str]) -> None:
    """Run the process. Writes its result to a file named by its rank."""
    os.environ.update(env)
    torch.set_num_threads(1)
    unpickled = []

    def watch(event: str, arguments: Any) -> None:
        if event == "pickle.find_class":
            unpickled.append(arguments[1])

    sys.addaudithook(watch)
    with rendezvous(2) as ranks, join_mesh(ranks) as mesh:
        unpickled.clear()
        try:
            found = talk(mesh) if what == "talk" else attacked(mesh, folder)
        except DistSaeError as error:
            found = str(error)
        (folder / env["RANK"]).write_text(json.dumps([found, unpickled]))
        os._exit(0)
