"""A container runtime: namespaces, a root file system, a user, an entry point.

With util-linux and iproute2, as root. The image is this machine: its root file system is the lower
layer of the container's, with the interpreter, the packages and this repository in it, and
`launch/Dockerfile` says what is run in it, where, and with which environment. A container has its
own mount, UTS, IPC and PID namespaces, and shares the network namespace of its pod.

Not reproduced: an image's own packages, limits of CPU and memory (cgroups), seccomp.
"""

import json
import os
import random
import re
import select
import shlex
import signal
import string
import subprocess
import sys
import sysconfig
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[2]
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LAST_POD = 254  # addresses of a subnet
_LETTERS = list(string.ascii_lowercase)  # of this process's networks


class Mount(NamedTuple):
    """A file or folder mounted into a container."""

    source: Path
    target: str
    read_only: bool = False


class Image(NamedTuple):
    """Image of `launch/Dockerfile`, made of this machine's files."""

    entrypoint: list[str]
    workdir: str
    env: dict[str, str]
    mounts: list[Mount]
    programs: Path
    """Folder of this machine with its own programs."""


class User(NamedTuple):
    """User of a container."""

    user: int
    group: int
    groups: list[int]
    no_new_privileges: bool
    drop_capabilities: bool


def read_image(folder: Path) -> Image:
    """Read the image from the Dockerfile; its own programs are put in `folder`."""
    text = (REPOSITORY / "launch/Dockerfile").read_text().replace("\\\n", " ")
    found = re.findall(r"^(ENTRYPOINT|WORKDIR|ENV|COPY launch/\S+) (.+)$", text, re.M)
    said: dict[str, str] = dict(reversed(found))  # the base says it first; stages may add
    env = dict(word.split("=", 1) for word in shlex.split(said["ENV"]))
    programs = env["PATH"].partition(":")[0]
    env["PATH"] = env["PATH"].replace("$PATH", _SYSTEM_PATH)
    env["PYTHONPATH"] = str(REPOSITORY)  # installed, as far as Python can tell
    folder.mkdir()
    copied = next(words for what, words in said.items() if what.startswith("COPY"))
    assert copied.split()[-1].rstrip("/") == programs, copied
    for name in copied.split()[:-1]:
        (folder / Path(name).name).symlink_to(REPOSITORY / name)
    (folder / "dist-sae").symlink_to(Path(sysconfig.get_path("scripts")) / "dist-sae")
    own = {Path(sys.base_prefix), Path(sys.prefix), REPOSITORY}
    mounts = [Mount(path, str(path), read_only=True) for path in sorted(own)]
    return Image(
        json.loads(said["ENTRYPOINT"]),
        said["WORKDIR"],
        env,
        [*mounts, Mount(folder, programs, read_only=True)],
        folder,
    )


class Network:
    """Subnet of this machine: every pod has an address, and reaches this process as the gateway."""

    def __init__(self) -> None:
        if os.geteuid():
            raise PermissionError("pods get namespaces and addresses, which root alone can give")
        _sweep()
        self.name = f"ds{os.getpid():06x}{_LETTERS.pop(0)}"
        self._pods = 1
        _ip("link", "add", self.name, "type", "bridge")
        _ip("link", "set", self.name, "up")
        for number in random.SystemRandom().sample(range(256), 256):
            with suppress(subprocess.CalledProcessError):  # others of this machine have it
                _ip("route", "add", f"10.77.{number}.0/24", "dev", self.name)
                break
        else:
            raise RuntimeError("10.77.0.0/16: no subnet is free")
        self._prefix = f"10.77.{number}"
        self.gateway = f"{self._prefix}.1"
        _ip("addr", "add", f"{self.gateway}/24", "dev", self.name, "noprefixroute")

    def attach(self) -> tuple[str, str]:
        """Make a network namespace for a pod; returns its name and the pod's address."""
        self._pods += 1
        assert self._pods <= _LAST_POD, "no addresses left"
        namespace, address = f"{self.name}.{self._pods}", f"{self._prefix}.{self._pods}"
        _ip("netns", "add", namespace)
        _ip("link", "add", namespace, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("link", "set", namespace, "master", self.name, "up")
        _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", namespace, "link", "set", device, "up")
        return namespace, address

    def detach(self, namespace: str) -> None:
        """Remove a network namespace with its links."""
        _ip("link", "delete", namespace)  # by itself it would go some time after the namespace
        _ip("netns", "delete", namespace)

    def close(self) -> None:
        """Remove the network; all pods must have been detached.

        Raises:
            RuntimeError: Something of it is left.
        """
        _ip("link", "delete", self.name)
        if left := [name for name in (*_names("netns"), *_names("link")) if self.name in name]:
            raise RuntimeError(f"left behind: {', '.join(left)}")


def _sweep() -> None:
    """Remove leftovers of killed tests, found by the process id in their names."""
    for what in ("link", "netns"):
        for name in _names(what):
            made = re.match(r"ds([0-9a-f]{6})[a-z]", name)
            if made and not Path(f"/proc/{int(made[1], 16)}").exists():
                with suppress(subprocess.CalledProcessError):  # others of this machine were faster
                    _ip(what, "delete", name)


class Container:
    """A running container.

    Args:
        command: Entry point and arguments.
        env: Its whole environment.
        mounts: In this order; a later one may be inside an earlier one.
        workdir: Where it begins.
        root: An empty folder, for its root file system.
        read_only: Whether that cannot be written.
        namespace: Of the network.
        hostname: What it takes its machine to be called.
        user: As whom it runs.
        log: What it says is added here.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        mounts: Sequence[Mount],
        *,
        workdir: str,
        root: Path,
        read_only: bool,
        namespace: str,
        hostname: str,
        user: User,
        log: Path,
    ) -> None:
        self._command = list(command)
        ready, begun = os.pipe()
        first = "\n".join(
            [
                shlex.join(["mount", "-t", "proc", "proc", f"{root}/root/proc"]),
                f"echo >&{begun}; exec {begun}>&-",
                shlex.join(
                    [
                        *("exec", "chroot", f"{root}/root", "setpriv", *_privileges(user)),
                        *("env", "-C", workdir, *command),
                    ]
                ),
            ]
        )
        script = [
            *map(shlex.join, _preparation(root, mounts, hostname, read_only=read_only)),
            # what it forks next is the first process of a PID namespace, and its exit code ours
            shlex.join(["exec", "unshare", "--pid", "bash", "-euc", f"({first}) & wait $!"]),
        ]
        # the container ends with the thread that starts it: nothing outlives the test's process
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", namespace),
                    *("unshare", "--mount", "--uts", "--ipc", "bash", "-euc", "\n".join(script)),
                ],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(begun,),
                start_new_session=True,
            )
        os.close(begun)
        self._ended = os.pidfd_open(self._process.pid)
        weakref.finalize(self, os.close, self._ended)
        self._first: int | None = None
        with os.fdopen(ready, "rb") as pipe:
            if pipe.read(1):
                children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
                with suppress(IndexError, OSError):  # it has ended already
                    self._first = int(children.read_text().split()[0])

    def wait(self, seconds: float | None) -> int | None:
        """Wait for the exit code as in Kubernetes (137: SIGKILL); None after the time-out."""
        if not select.select([self._ended], [], [], seconds)[0]:
            return None
        code = self._process.wait()
        return 128 - code if code < 0 else code

    def signal(self, number: signal.Signals) -> None:
        """Signal the first process; if it is killed, all others die too.

        The kernel drops a SIGTERM for the first process of a PID namespace that does not handle it
        yet. tini does once it has a child; so wait for that.
        """
        while number == signal.SIGTERM and self._is_without_handler():
            if self.wait(0.01) is not None:
                return
        if self._first is not None and self.wait(0) is None:
            with suppress(ProcessLookupError):
                os.kill(self._first, number)

    def _is_without_handler(self) -> bool:
        """True while the first process is, or is about to become, a tini without a child."""
        if self._command[0] != "tini" or self._first is None:
            return False
        with suppress(OSError):
            folder = Path(f"/proc/{self._first}")
            words = (folder / "cmdline").read_text().split("\0")[:-1]
            children = (folder / f"task/{self._first}/children").read_text().split()
            return words != self._command or not children
        return False

    def processes(self) -> Iterator[tuple[int, list[str]]]:
        """Processes in the container, as (process id, command)."""
        own = os.readlink(f"/proc/{self._first}/ns/pid")
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.readlink(folder / "ns/pid") == own:
                    yield int(folder.name), (folder / "cmdline").read_text().split("\0")[:-1]


def _preparation(
    root: Path, mounts: Sequence[Mount], hostname: str, *, read_only: bool
) -> Iterator[list[str]]:
    """Commands that build the root file system at `root`/root, in the container's namespaces."""
    yield ["hostname", hostname]
    yield ["mount", "-t", "tmpfs", "layers", str(root)]
    layers = {name: f"{root}/{name}" for name in ("upper", "work", "root")}
    yield ["mkdir", *layers.values()]
    options = "lowerdir=/,upperdir={upper},workdir={work}".format(**layers)
    yield ["mount", "-t", "overlay", "-o", options, "image", layers["root"]]
    closed = {p for m in mounts for p in Path(m.target).parents if _is_closed(p)}
    if closed:  # an interpreter below /root, which in an image any user may run
        yield ["chmod", "a+rx", *(f"{layers['root']}{path}" for path in sorted(closed))]
    yield ["mount", "--rbind", "/dev", f"{layers['root']}/dev"]
    yield ["mount", "--rbind", "/sys", f"{layers['root']}/sys"]
    for mount in mounts:
        target = f"{layers['root']}{mount.target}"
        if mount.source.is_dir():
            yield ["mkdir", "-p", target]
        yield ["mount", "--bind", str(mount.source), target]
        if mount.read_only:
            yield ["mount", "-o", "remount,bind,ro", target]
    if read_only:
        yield ["mount", "-o", "remount,bind,ro", layers["root"]]


def _privileges(user: User) -> list[str]:
    """Options of setpriv."""
    options = ["--pdeathsig=KILL", f"--reuid={user.user}", f"--regid={user.group}"]
    options += (
        [f"--groups={','.join(map(str, user.groups))}"] if user.groups else ["--clear-groups"]
    )
    options += ["--no-new-privs"] if user.no_new_privileges else []
    options += ["--bounding-set=-all", "--inh-caps=-all"] if user.drop_capabilities else []
    return options


def _is_closed(folder: Path) -> bool:
    return folder.is_dir() and folder.stat().st_mode & 0o005 != 0o005


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def _names(what: str) -> list[str]:
    """Names of all links or network namespaces of this machine."""
    found = json.loads(_ip("-json", what, "show") or "[]")
    return [item.get("ifname", item.get("name")) for item in found]
