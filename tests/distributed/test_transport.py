import logging
import os
import socket
from pathlib import Path

import pytest

from dist_sae.distributed.transport import check_rdma, pod_environment, rdma_is_requested
from dist_sae.errors import ConfigError

HEAD = "node:7:7 [0] NCCL INFO Bootstrap : Using eth0:10.0.0.4<0>\n"
SOCKETS = (
    "node:7:7 [0] NCCL INFO NET/Plugin: Could not find: libnccl-net.so\n"
    "node:7:7 [0] NCCL INFO NET/IB : No device found.\n"
    "node:7:7 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.4<0>\n"
    "node:7:7 [0] NCCL INFO Using network Socket\n"
)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The NCCL log of this process, in a pod that requests RDMA."""
    for name, value in pod_environment(str(tmp_path)).items():
        monkeypatch.setenv(name, value)
    return tmp_path / f"nccl.{socket.gethostname()}.{os.getpid()}.log"


def test_sockets_where_rdma_was_asked_for_are_refused_with_what_nccl_says(log: Path) -> None:
    assert rdma_is_requested()
    log.write_text(HEAD + SOCKETS)
    with pytest.raises(ConfigError) as refused:
        check_rdma()
    said = str(refused.value)
    assert said.startswith("cluster.trainer.rdma: NCCL uses sockets instead of RDMA (NET/Plugin: ")
    assert "; NET/IB : No device found.)" in said
    assert "eth0" not in said


@pytest.mark.parametrize("network", ["IB", "AWS Libfabric", "Libfabric"])
def test_any_other_network_is_taken(
    log: Path, network: str, caplog: pytest.LogCaptureFixture
) -> None:
    log.write_text(f"{HEAD}node:7:7 [0] NCCL INFO Using network {network}\n")
    with caplog.at_level(logging.INFO):
        check_rdma()
    assert caplog.messages == [f"NCCL uses the network {network}"]


@pytest.mark.parametrize("text", [None, HEAD])
def test_a_log_that_does_not_say_it_is_a_warning(
    log: Path, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if text is not None:
        log.write_text(text)
    check_rdma()
    assert caplog.messages == [
        f"cannot tell whether NCCL uses RDMA: {log} does not mention a network"
    ]


def test_nobody_asks_without_rdma_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIST_SAE_RDMA", raising=False)
    assert not rdma_is_requested()
