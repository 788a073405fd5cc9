"""Fixtures for several test modules."""

import contextlib
import functools
import gc
import logging
import os
import signal
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jaxtyping
import pytest
import torch

from tests.preloaded import preloaded_programs
from tests.servers import OWNER, SERVERS, Server

# several workers with one thread per core each would mostly wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Without a GPU, the Triton kernels run in Triton's interpreter. Triton reads this variable when a
# kernel is defined, so it must be set before any test imports one. It does not affect torch and
# DeepSpeed.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _where_shapes_are_named(checked: Callable[..., Any]) -> Callable[..., Any]:
    """Let jaxtyping check only signatures with shapes. mypy checks the others.

    A check takes longer than most functions. With checks of all signatures, some tests take twice
    as long.
    """

    def jaxtyped(**options: Any) -> Callable[[Any], Any]:
        def decorate(item: Any) -> Any:
            named = "jaxtyping." in str(getattr(item, "__annotations__", {}))
            return checked(item, **options) if named else item

        return decorate

    return jaxtyped


# must come before the imports of the modules that jaxtyping's import hook decorates
jaxtyping.jaxtyped = _where_shapes_are_named(jaxtyping.jaxtyped)

REAL_SERVERS = {"seaweedfs", "rclone"}  # moto runs in threads of the tests' own process
_LONGEST = (
    "tests/kubernetes/test_pods.py",
    "tests/commands/test_run.py",
    "tests/distributed/test_sharding.py",
    "tests/dictionaries/test_recovery.py",
    "tests/bench/test_gpu_check.py",
    "tests/training/test_resume.py",
    "tests/chaos/test_chaos.py",
    "tests/index/test_chaos.py",
    "tests/producing/test_produce_together.py",
    "tests/monitoring/test_live.py",
    "tests/storage/test_s3_refusals.py",
    "tests/storage/test_s3_outages.py",
    "tests/training/test_train.py",
    "tests/data/test_many_workers.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="train as long as the acceptance tests ask (an hour)"
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Disable the garbage collector during imports, and let it ignore the modules afterwards."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases on real servers, and run the longest files first.

    Otherwise, one worker would be busy with a long file while the others have nothing left to do.
    """
    for item in items:
        case = getattr(item, "callspec", None)
        if case and REAL_SERVERS & {str(value) for value in case.params.values()}:
            item.add_marker("system")
    places = {file: place for place, file in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


class Bucket(NamedTuple):
    """An empty bucket of an S3 server, with a client that bypasses the code under test."""

    endpoint_url: str
    name: str
    client: Any


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Programs that start from preloaded modules: `python -m dist_sae`, and `dist-sae`."""
    with preloaded_programs(tmp_path_factory.mktemp("preloaded")) as programs:
        yield programs


@pytest.fixture(scope="session")
def server() -> Iterator[Callable[[str], Server]]:
    """Function that returns a server by its name in `SERVERS`. Starts it at the first call."""
    with ExitStack() as running:
        yield functools.cache(lambda name: running.enter_context(SERVERS[name]()))


@pytest.fixture(scope="session")
def server_client(server: Callable[[str], Server]) -> Iterator[Callable[[str], Any]]:
    """Function that returns the owner's client for a server. Cached, because creation is slow."""
    with ExitStack() as clients:
        yield functools.cache(
            lambda name: clients.enter_context(contextlib.closing(server(name).client()))
        )


@pytest.fixture
def make_bucket(
    server: Callable[[str], Server],
    server_client: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], Bucket]:
    """Function that creates a bucket on a server. Its owner's key is in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", OWNER.id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", OWNER.secret)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def make(name: str) -> Bucket:
        bucket = Bucket(
            server(name).endpoint_url, f"bucket-{uuid.uuid4().hex[:8]}", server_client(name)
        )
        bucket.client.create_bucket(Bucket=bucket.name)
        return bucket

    return make


@pytest.fixture
def bucket(make_bucket: Callable[[str], Bucket]) -> Bucket:
    """A bucket on moto, which starts fast."""
    return make_bucket("moto")


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    """Restore what `main` changes in its process: logging and signal handlers."""
    root, numbers = logging.getLogger(), (signal.SIGINT, signal.SIGTERM)
    handlers, level = list(root.handlers), root.level
    signals = [signal.getsignal(number) for number in numbers]
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for number, handler in zip(numbers, signals, strict=True):
        signal.signal(number, handler)
