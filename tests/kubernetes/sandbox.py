"""A container runtime: namespaces, a root file system, a user, an entry point.

Needs root, util-linux and iproute2. The image is this machine: its root file system, with the
interpreter, the packages and this repository, is the lower layer of the container's file system.
Entry point, working directory and environment come from `launch/Dockerfile`. A container has its
own mount, UTS, IPC and PID namespaces, and shares the network namespace of its pod.

Not reproduced: the packages of a real image, limits of CPU and memory (cgroups), seccomp.
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
_LAST_POD = 254  # last address in a subnet
_LETTERS = list(string.ascii_lowercase)  # unused suffixes for names of this process's networks


class Mount(NamedTuple):
    """A file or folder mounted into a container."""

    source: Path
    target: str
    read_only: bool = False


class Image(NamedTuple):
    """Image as described by `launch/Dockerfile`, from this machine's files."""

    entrypoint: list[str]
    workdir: str
    env: dict[str, str]
    mounts: list[Mount]
    programs: Path
    """Folder on this machine with the programs that the image adds."""


class User(NamedTuple):
    """User and privileges of a container."""

    user: int
    group: int
    groups: list[int]
    no_new_privileges: bool
    drop_capabilities: bool


def read_image(folder: Path) -> Image:
    """Read the image from the Dockerfile, and link the programs that it adds into `folder`."""
    text = (REPOSITORY / "launch/Dockerfile").read_text().replace("\\\n", " ")
    found = re.findall(r"^(ENTRYPOINT|WORKDIR|ENV|COPY launch/\S+) (.+)$", text, re.M)
    # reversed, so that the first stage's instruction wins over later ones
    said: dict[str, str] = dict(reversed(found))
    env = dict(word.split("=", 1) for word in shlex.split(said["ENV"]))
    programs = env["PATH"].partition(":")[0]
    env["PATH"] = env["PATH"].replace("$PATH", _SYSTEM_PATH)
    env["PYTHONPATH"] = str(REPOSITORY)  # has the same effect as installing it
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
    """A subnet on this machine. Each pod has an address, and reaches this process at `gateway`."""

    def __init__(self) -> None:
        if os.geteuid():
            raise PermissionError("pods get namespaces and addresses, which root alone can give")
        _sweep()
        self.name = f"ds{os.getpid():06x}{_LETTERS.pop(0)}"
        self._pods = 1
        _ip("link", "add", self.name, "type", "bridge")
        _ip("link", "set", self.name, "up")
        for number in random.SystemRandom().sample(range(256), 256):
            with suppress(subprocess.CalledProcessError):  # another process has this subnet
                _ip("route", "add", f"10.77.{number}.0/24", "dev", self.name)
                break
        else:
            raise RuntimeError("10.77.0.0/16: no subnet is free")
        self._prefix = f"10.77.{number}"
        self.gateway = f"{self._prefix}.1"
        _ip("addr", "add", f"{self.gateway}/24", "dev", self.name, "noprefixroute")

    def attach(self) -> tuple[str, str]:
        """Create a network namespace for a pod. Returns its name and the pod's address."""
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
        _ip("link", "delete", namespace)  # otherwise deleted some time after the namespace
        _ip("netns", "delete", namespace)

    def close(self) -> None:
        """Remove the network. All pods must have been detached.

        Raises:
            RuntimeError: A network namespace or a link of it is left.
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
                with suppress(subprocess.CalledProcessError):  # another process has removed it
                    _ip(what, "delete", name)


class Container:
    """A running container.

    Args:
        command: Entry point and arguments.
        env: Complete environment.
        mounts: Mounts in order. A later one can be inside an earlier one.
        workdir: Working directory.
        root: Empty folder for the root file system.
        read_only: Whether the root file system is read-only.
        namespace: Network namespace.
        hostname: Host name.
        user: User and privileges.
        log: File that stdout and stderr are appended to.
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
            # The next fork is the first process of a PID namespace. Its exit code is the result.
            shlex.join(["exec", "unshare", "--pid", "bash", "-euc", f"({first}) & wait $!"]),
        ]
        # pdeathsig: the container ends with the thread that starts it, so nothing outlives the test
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
                with suppress(IndexError, OSError):  # the process has ended already
                    self._first = int(children.read_text().split()[0])

    def wait(self, seconds: float | None) -> int | None:
        """Wait for the exit code, as in Kubernetes (137: SIGKILL). Returns None after a timeout."""
        if not select.select([self._ended], [], [], seconds)[0]:
            return None
        code = self._process.wait()
        return 128 - code if code < 0 else code

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the first process. If it is killed, all others die too.

        The kernel drops a SIGTERM for the first process of a PID namespace if that process has no
        handler yet. tini has one as soon as it has a child, so this waits for the child.
        """
        while number == signal.SIGTERM and self._is_without_handler():
            if self.wait(0.01) is not None:
                return
        if self._first is not None and self.wait(0) is None:
            with suppress(ProcessLookupError):
                os.kill(self._first, number)

    def _is_without_handler(self) -> bool:
        """Return whether the first process is, or will become, a tini without a child."""
        if self._command[0] != "tini" or self._first is None:
            return False
        with suppress(OSError):
            folder = Path(f"/proc/{self._first}")
            words = (folder / "cmdline").read_text().split("\0")[:-1]
            children = (folder / f"task/{self._first}/children").read_text().split()
            return words != self._command or not children
        return False

    def processes(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the processes in the container as (process id, command)."""
        own = os.readlink(f"/proc/{self._first}/ns/pid")
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.readlink(folder / "ns/pid") == own:
                    yield int(folder.name), (folder / "cmdline").read_text().split("\0")[:-1]


def _preparation(
    root: Path, mounts: Sequence[Mount], hostname: str, *, read_only: bool
) -> Iterator[list[str]]:
    """Yield commands that build the root file system at `root`/root in the new namespaces."""
    yield ["hostname", hostname]
    yield ["mount", "-t", "tmpfs", "layers", str(root)]
    layers = {name: f"{root}/{name}" for name in ("upper", "work", "root")}
    yield ["mkdir", *layers.values()]
    options = "lowerdir=/,upperdir={upper},workdir={work}".format(**layers)
    yield ["mount", "-t", "overlay", "-o", options, "image", layers["root"]]
    closed = {p for m in mounts for p in Path(m.target).parents if _is_closed(p)}
    if closed:  # for example an interpreter below /root; any user may run an image's interpreter
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
    """Return the options of setpriv."""
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
    """Return the names of all links or network namespaces of this machine."""
    found = json.loads(_ip("-json", what, "show") or "[]")
    return [item.get("ifname", item.get("name")) for item in found]
