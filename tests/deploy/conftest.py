"""Clusters for the tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.deploy.podrunner import Cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster
