"""Creation of the boto3 client for an S3-compatible endpoint."""

import base64
import functools
import hashlib
import json
import os
import ssl
from typing import Any

import boto3
import botocore.session
from botocore.config import Config
from botocore.loaders import Loader, create_loader
from botocore.utils import conditionally_calculate_md5

from dist_sae.config.data import S3Config
from dist_sae.errors import AccessError
from dist_sae.storage.s3_errors import line_of, mapped

_ATTEMPTS = 3  # attempts of boto within each attempt of the store


def make_client(url: str, config: S3Config, connections: int) -> Any:
    """Create a client.

    Args:
        url: URL of the store, for messages.
        config: Settings of the endpoint.
        connections: Size of the connection pool.

    Raises:
        AccessError: `config` or the environment names something that is malformed or missing.
    """
    bundle = config.ca_bundle
    if bundle is not None:
        bundle = os.path.expanduser(bundle)
        try:
            ssl.create_default_context(cafile=bundle)
        except OSError as exc:
            reason = exc.strerror or "no certificates"
            raise AccessError(f"store.s3.ca_bundle {bundle}: {reason}", url=url) from exc
    with mapped(url, None, config.endpoint_url):
        own = botocore.session.get_session()
        own.register_component("data_loader", _service_data())
        session = boto3.session.Session(botocore_session=own)
        try:
            client = session.client(
                "s3",
                endpoint_url=config.endpoint_url,
                region_name=config.region or session.region_name or "us-east-1",
                verify=bundle,
                config=Config(
                    retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
                    connect_timeout=5,
                    read_timeout=60,
                    max_pool_connections=connections,
                    s3={"addressing_style": "path" if config.path_style else "virtual"},
                    # many endpoints reject boto's checksums; ours are in the manifests
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )
        except ValueError as exc:  # the endpoint, the region or a setting below is malformed
            setting = "store.s3.endpoint_url"
            if "retrieve metadata" in str(exc) or "Auth token" in str(exc):
                setting = "AWS_CONTAINER_CREDENTIALS_FULL_URI and its token"
            elif isinstance(exc, json.JSONDecodeError):
                setting = "the output of credential_process"
            raise AccessError(f"{line_of(exc)}; check {setting}", url=url) from exc
    for operation in ("PutObject", "UploadPart"):  # for servers that do not check signed hashes
        client.meta.events.register(f"before-call.s3.{operation}", conditionally_calculate_md5)
    client.meta.events.register("before-call.s3.DeleteObjects", _add_md5)
    return client


@functools.cache
def _service_data() -> Loader:
    """Return a shared loader, because parsing S3's descriptions takes 70 of a client's 80 ms."""
    return create_loader()


def _add_md5(params: Any, **_: object) -> None:
    """Add the checksum that older servers require for deleting several objects."""
    md5 = hashlib.md5(params["body"], usedforsecurity=False)
    params["headers"]["Content-MD5"] = base64.b64encode(md5.digest()).decode()
