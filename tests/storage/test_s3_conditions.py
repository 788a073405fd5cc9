"""Conditional writes to S3 whose responses are lost."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.conftest import Bucket
from tests.faults import FaultProxy
from tests.storage.endpoints import make_store


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("lost", [1, 4])
@pytest.mark.parametrize("fault", ["reset_after", "error_after"])
@pytest.mark.parametrize("kind", ["moto", "seaweedfs"])
def test_put_if_absent_whose_answer_is_lost_has_won(
    kind: str, make_bucket: Callable[[str], Bucket], fault: str, lost: int
) -> None:
    bucket = make_bucket(kind)

    def only(method: str, _: str) -> bool:
        return method == "PUT"

    # boto sends a request three times before the store retries
    with FaultProxy(
        bucket.endpoint_url, 0, {fault: 1.0}, only=only, most_per_request=lost
    ) as proxy:
        store = make_store(bucket, proxy.endpoint_url)
        vars(store)["exclusive"] = True
        assert store.put("key", b"mine", if_absent=True)
        assert proxy.injected[fault] == lost
        assert store.put("key", b"other", if_absent=False)
        assert not store.put("key", b"mine", if_absent=True)


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.system
def test_put_if_absent_does_not_win_what_was_there_when_it_asked_again(
    weed: Bucket,
) -> None:
    with FaultProxy(weed.endpoint_url, 0, {}) as proxy:
        store = make_store(weed, proxy.endpoint_url)
        assert store.put("key", b"theirs", if_absent=True)
        proxy.rates = {"reset_after": 0.5}
        assert not any(store.put("key", b"mine %d" % i, if_absent=True) for i in range(20))
        assert proxy.injected["reset_after"] > 5
    assert (
        weed.client.get_object(Bucket=weed.name, Key="some/prefix/key")["Body"].read() == b"theirs"
    )


@pytest.mark.usefixtures("short_pauses")
def test_put_if_absent_that_lost_to_an_object_gone_since_has_lost(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(bucket)
    assert store.exclusive
    answers = itertools.chain(
        ["ConditionalRequestConflict"], itertools.repeat("PreconditionFailed")
    )

    def answer(**_: Any) -> None:
        raise ClientError({"Error": {"Code": next(answers)}}, "PutObject")

    monkeypatch.setattr(store.client, "put_object", answer)  # type: ignore[attr-defined]
    assert not store.put("key", b"", if_absent=True)
