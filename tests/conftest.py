"""Fixtures that several test modules use."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest
import torch
import yaml
from moto.server import ThreadedMotoServer

# Without a GPU the Triton kernels run in Triton's interpreter. Triton reads this when a kernel is
# defined, so it is set before any test can import one; torch and DeepSpeed work with it either way.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="train as long as the acceptance tests ask (an hour)"
    )


class Bucket(NamedTuple):
    """An empty bucket of an S3 server, with a client to look into it past the code under test."""

    endpoint_url: str
    name: str
    client: Any


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def s3_client(s3_endpoint: str) -> Iterator[Any]:
    client = boto3.client(
        "s3",
        endpoint_url=s3_endpoint,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    yield client
    client.close()


@pytest.fixture
def bucket(s3_endpoint: str, s3_client: Any, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    s3_client.create_bucket(Bucket=name)
    return Bucket(s3_endpoint, name, s3_client)


def synthetic_run(folder: Path, **sections: dict[str, Any]) -> Path:
    """Write a tiny synthetic run file into `folder`; `sections` are merged over it.

    8,000 rows in 125 documents: 4 training units of about 1,900 rows and one held-out unit.
    """
    run: dict[str, Any] = {
        "name": "tiny",
        "store": {"activations": str(folder / "activations"), "runs": str(folder / "runs")},
        "model": {"kind": "synthetic", "d_in": 8, "n_features": 32, "l0": 2},
        "corpus": {"kind": "synthetic", "documents": 125, "document_rows": 64},
        "activations": {
            "sites": ["synthetic"],
            "streams": 4,
            "unit_rows": 2048,
            "block_rows": 512,
            "context_tokens": 64,
            "dtype": "fp32",
        },
        "sae": {"kind": "topk", "n_latents": 32, "k": 2, "auxk": 4, "dead_after_rows": 4096},
        "train": {"rows": 4096, "batch_rows": 256, "normaliser_rows": 2048},
    }
    for name, section in sections.items():
        run[name] = run.get(name, {}) | section
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path
