"""Fixtures for the storage tests."""

import botocore.loaders
import pytest
from botocore.retries.standard import ExponentialBackoff

from dist_sae.storage import s3


@pytest.fixture(scope="session")
def loader() -> botocore.loaders.Loader:
    return botocore.loaders.create_loader()


@pytest.fixture(autouse=True)
def shared_service_model(loader: botocore.loaders.Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let boto read its description of S3 once, since every test makes its own clients."""
    monkeypatch.setattr(botocore.loaders, "create_loader", lambda *_: loader)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry after milliseconds; the number of attempts and the deadline stay as they are."""
    monkeypatch.setattr(s3, "FIRST_PAUSE_SECONDS", 0.005)
    monkeypatch.setattr(s3, "LONGEST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.002)
