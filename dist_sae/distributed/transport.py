"""Finds out whether NCCL uses RDMA between nodes, or has silently fallen back to sockets.

NCCL reports its choice only in its log. In trainer pods that ask for RDMA devices
(`cluster.trainer.rdma`), `pod_environment` makes NCCL write a log. It is read once the first
collective has connected the ranks.
"""

import logging
import os
import re
import socket
from pathlib import Path

from dist_sae.errors import ConfigError

logger = logging.getLogger(__name__)

_ASKED = "DIST_SAE_RDMA"
_LOG = "NCCL_DEBUG_FILE"


def pod_environment(folder: str) -> dict[str, str]:
    """Return variables for a pod that asks for RDMA, with which NCCL logs to this folder."""
    return {
        _ASKED: "1",
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": "INIT,NET",
        _LOG: f"{folder}/nccl.%h.%p.log",
    }


def rdma_is_requested() -> bool:
    """Return True in a pod that asks for RDMA devices."""
    return _ASKED in os.environ


def check_rdma() -> None:
    """Check in NCCL's log that this process does not use sockets. Call after the first collective.

    Raises:
        ConfigError: NCCL uses sockets.
    """
    name = os.environ.get(_LOG, "")
    path = Path(name.replace("%h", socket.gethostname()).replace("%p", str(os.getpid())))
    log = path.read_text(errors="replace") if path.is_file() else ""
    networks = re.findall(r"NCCL INFO Using network (.+)", log)
    if not networks:
        logger.warning("cannot tell whether NCCL uses RDMA: %s does not mention a network", path)
    elif "Socket" in (networks := [network.strip() for network in networks]):
        said = re.findall(r"NCCL INFO (NET/(?!Socket).+)", log)
        raise ConfigError(
            f"cluster.trainer.rdma: NCCL uses sockets instead of RDMA ({'; '.join(said[-3:])}); "
            f"check the image's RDMA libraries, the nodes' devices and the limit on locked memory, "
            f"or set it to 0 to train over sockets"
        )
    else:
        logger.info("NCCL uses the network %s", networks[-1])
