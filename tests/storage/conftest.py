"""Fixtures for the storage tests."""

import logging
from collections.abc import Callable, Iterator

import botocore.loaders
import pytest
from botocore.retries.standard import ExponentialBackoff

from dist_sae import retry
from dist_sae.storage import ObjectStore
from tests.conftest import Bucket
from tests.storage.endpoints import SECONDS, make_store


@pytest.fixture(scope="session")
def loader() -> botocore.loaders.Loader:
    return botocore.loaders.create_loader()


@pytest.fixture(autouse=True)
def shared_service_model(loader: botocore.loaders.Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let boto read its description of S3 only once, because every test creates its own clients."""
    monkeypatch.setattr(botocore.loaders, "create_loader", lambda *_: loader)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry after milliseconds. The number of attempts and the deadline are unchanged."""
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.005)
    monkeypatch.setattr(retry, "LONGEST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.002)


@pytest.fixture
def store(bucket: Bucket) -> ObjectStore:
    return make_store(bucket, seconds=SECONDS)


@pytest.fixture
def weed(make_bucket: Callable[[str], Bucket]) -> Bucket:
    return make_bucket("seaweedfs")


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Collect what the store logs during the test."""
    said: list[str] = []
    logger, handler = logging.getLogger("dist_sae.storage"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)
