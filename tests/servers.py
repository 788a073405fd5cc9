"""Real S3 servers on loopback, each with a separate folder. They stop after the `with` block."""

import json
import logging
import random
import re
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import boto3
from botocore.config import Config
from moto.server import ThreadedMotoServer

START_SECONDS = 60.0
_POLL_SECONDS = 0.05
_STARTS = 3  # attempts, because another process may take a port before the server does
_GRPC = 10_000  # SeaweedFS also opens each port plus this number


class Key(NamedTuple):
    """An access key with its secret."""

    id: str
    secret: str


OWNER = Key("test", "test-secret")
READER = Key("reader", "reader-secret")
"""Key that may only read and list, on SeaweedFS."""


class Server(NamedTuple):
    """A running S3 server."""

    name: str
    endpoint_url: str
    pid: int | None = None
    """Process id, or None if the server runs in this process."""
    kill: Callable[[], None] | None = None
    """Function that sends SIGKILL, or None if the server cannot be restarted."""
    start: Callable[[], None] | None = None
    """Function that restarts the server on the same port with the same data."""

    def client(self, key: Key = OWNER) -> Any:
        """Create a client that bypasses the code under test."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id=key.id,
            aws_secret_access_key=key.secret,
            config=Config(
                s3={"addressing_style": "path"}, request_checksum_calculation="when_required"
            ),
        )


@contextmanager
def moto() -> Iterator[Server]:
    """Start moto in this process. It stores everything in memory, and accepts any key.

    Its threads' logs are suppressed, because they do not always belong to the current test. For
    example, an upload that another test has aborted may still be failing.
    """
    log = logging.getLogger("werkzeug")
    log.propagate = False
    log.addHandler(logging.NullHandler())  # without a handler, it would write to the test's stderr
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield Server("moto", f"http://{host}:{port}")
    finally:
        server.stop()


@contextmanager
def seaweedfs(address: str = "127.0.0.1") -> Iterator[Server]:
    """Start SeaweedFS, which supports conditional writes."""
    with ExitStack() as stack:
        folder = stack.enter_context(_folder())
        identities = [
            _identity(OWNER, "Admin", "Read", "Write", "List", "Tagging"),
            _identity(READER, "Read", "List"),
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        for attempt in range(_STARTS):
            port = free_ports(4)
            stack.callback(_remove_sockets, range(port, port + 4))
            command = _weed(folder, address, port)
            log = folder / f"{attempt}.log"
            process = stack.enter_context(running(command, log))
            endpoint = f"http://{address}:{port}"
            if answers(process, endpoint, 403):
                break
        else:
            raise RuntimeError(log.read_text()[-2000:])
        living = [process]

        def kill() -> None:
            living[-1].kill()
            living[-1].wait()

        def start() -> None:
            living.append(stack.enter_context(running(command, log)))
            assert answers(living[-1], endpoint, 403), log.read_text()[-2000:]

        yield Server("seaweedfs", endpoint, process.pid, kill, start)


@contextmanager
def rclone() -> Iterator[Server]:
    """Start rclone, which accepts conditional writes and ignores the condition."""
    with _folder() as folder:
        (folder / "data").mkdir()
        command = [
            *(_binary("rclone"), "serve", "s3", "--addr", "127.0.0.1:0"),
            *("--config", str(folder / "none"), "--cache-dir", str(folder / "cache")),
            *("--auth-key", f"{OWNER.id},{OWNER.secret}", str(folder / "data")),
        ]
        with running(command, folder / "log") as process:
            deadline = time.monotonic() + START_SECONDS
            while not (said := re.search(r"http://[\d.:]+", (folder / "log").read_text())):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((folder / "log").read_text()[-2000:])
                time.sleep(_POLL_SECONDS)
            yield Server("rclone", said[0], process.pid)


SERVERS = {"moto": moto, "seaweedfs": seaweedfs, "rclone": rclone}


def _weed(folder: Path, address: str, port: int) -> list[str]:
    """Return the arguments of SeaweedFS: no telemetry, few ports, fast restart after a kill."""
    flags = {
        "dir": folder,
        "ip": address,
        "ip.bind": address,
        "s3.port": port,
        "master.port": port + 1,
        "volume.port": port + 2,
        "filer.port": port + 3,
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.config": folder / "s3.json",
        "volume.max": 10_000,  # every bucket uses several volumes
        "master.volumeSizeLimitMB": 64,
        "volume.preStopSeconds": 0,
        "master.telemetry": "false",
        "master.electionTimeout": "1s",
        "master.heartbeatInterval": "100ms",
        "master.resumeState": "false",
    }
    settings = [f"-{name}={value}" for name, value in flags.items()]
    return [_binary("weed"), "-logtostderr=true", "server", *settings, "-filer", "-s3"]


def _identity(key: Key, *actions: str) -> dict[str, object]:
    credentials = [{"accessKey": key.id, "secretKey": key.secret}]
    return {"name": key.id, "credentials": credentials, "actions": actions}


def _binary(name: str) -> str:
    """Return the path of a program that a package in this environment installed."""
    return str(Path(sysconfig.get_path("scripts")) / name)


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="s3-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process, and kill it at the end. On Linux, it also dies with the starting thread."""
    setpriv = shutil.which("setpriv")
    dies_too = [setpriv, "--pdeathsig", "KILL"] if setpriv else []
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*dies_too, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def answers(process: subprocess.Popen[bytes], url: str, status: int) -> bool:
    """Wait until a server responds with this status. False if it has ended, or after a timeout."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError):
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    said = answer.status
            except urllib.error.HTTPError as exc:
                exc.close()
                said = exc.code
            if said == status:
                return True
        time.sleep(_POLL_SECONDS)
    return False


def free_ports(n_ports: int) -> int:
    """Return the first of n consecutive free ports, below the range of ephemeral ports."""
    while True:
        port = random.SystemRandom().randrange(11_000, 22_000)
        with ExitStack() as stack, suppress(OSError):
            for number in range(port, port + n_ports):
                for offset in (0, _GRPC):
                    probe = stack.enter_context(socket.socket())
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", number + offset))
            return port


def _remove_sockets(ports: range) -> None:
    """Remove the sockets that a killed SeaweedFS leaves behind."""
    for port in ports:
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            path.unlink(missing_ok=True)
        for path in Path("/tmp").glob(f"seaweedfs-*-grpc-{port + _GRPC}.sock"):
            path.unlink(missing_ok=True)
