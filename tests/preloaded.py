"""Programs `python` and `dist-sae` that start fast, because they fork from preloaded modules.

Importing torch and DeepSpeed takes seconds at every start. The program (`preloaded_client.py`)
sends its arguments, environment, working directory and open files to a server, which forks. The
program forwards signals, exits as its fork does, and if it is killed, the fork is killed too. The
fork runs `dist_sae.__main__.main` or a script in the namespaces, below the root and as the user of
the program, so this also works in containers.

Forks cannot show that modules are imported fast enough, without missing packages, and in a
container's environment. So some tests must start real interpreters.
"""

import array
import atexit
import ctypes
import io
import json
import os
import runpy
import select
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIG_DFL, SIGINT, SIGKILL, signal
from typing import Any

import torch

from tests.forks import processes

NAMES = ("python", "dist-sae")
"""Names of the programs. They are in the same folder as the server's socket."""
_SOCKET = "preloaded.sock"
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38  # of Linux's prctl
_NEW_PID = 0x20000000  # of Linux's setns
_NEW_OTHERS = 0x00020000 | 0x04000000 | 0x08000000 | 0x40000000  # mounts, UTS, IPC, network
_LONGEST = 2**20


@contextmanager
def preloaded_programs(folder: Path) -> Iterator[dict[str, Path]]:
    """Write the programs to a folder, and serve them until the end of the `with` block."""
    source = Path(__file__).with_name("preloaded_client.py").read_text()
    programs = {}
    for name in NAMES:
        programs[name] = path = folder / name
        path.unlink(missing_ok=True)  # else writing would follow an existing symlink
        path.write_text(f"#!{sys.executable} -IS\n{source}")
        path.chmod(0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(folder / _SOCKET))
        (folder / _SOCKET).chmod(0o777)
        listener.listen(64)
        server = processes.Process(target=_serve, args=(listener,), daemon=True)
        server.start()
    try:
        yield programs
    finally:
        server.kill()
        server.join()


def _serve(listener: socket.socket) -> None:
    """Fork for each connection. If the connection ends, its fork is killed."""
    _die_with_parent()
    signal(SIGINT, SIG_DFL)
    own = os.open("/proc/self/ns/pid", os.O_RDONLY)
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    asked: dict[int, tuple[socket.socket, int]] = {}  # by the connection's file descriptor
    ending: dict[int, int] = {}  # the connection's file descriptor by the fork's pidfd
    while True:
        for number, _ in poll.poll():
            if number == listener.fileno():
                connection, _ = listener.accept()
                try:
                    pid = _fork(connection, own)
                except OSError:  # the program was killed
                    connection.close()
                    continue
                ended = os.pidfd_open(pid)
                asked[connection.fileno()] = connection, pid
                ending[ended] = connection.fileno()
                poll.register(ended, select.POLLIN)
                poll.register(connection, select.POLLIN)
            elif number in ending:
                connection, pid = asked.pop(ending.pop(number))
                poll.unregister(number)
                os.close(number)
                with suppress(KeyError):  # the program was killed
                    poll.unregister(connection)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with suppress(OSError):
                    connection.send(str(status).encode())
                connection.close()
            elif number in asked:
                connection, pid = asked[number]
                sent = _received(connection)
                if not sent:
                    poll.unregister(connection)
                os.kill(pid, int(sent or SIGKILL))


def _received(connection: socket.socket) -> bytes:
    """Read the next message. Empty if the connection has ended."""
    with suppress(ConnectionError):
        return connection.recv(64)
    return b""


def _fork(connection: socket.socket, own: int) -> int:
    """Fork for the program that has connected, in its PID namespace. Returns the process id."""
    room = socket.CMSG_SPACE(3 * array.array("i").itemsize)
    words, ancillary, *_ = connection.recvmsg(_LONGEST, room)
    if not ancillary:
        raise BrokenPipeError
    files = array.array("i", ancillary[0][2])
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    asking = array.array("i", credentials)[0]
    who, root = os.pidfd_open(asking), os.open(f"/proc/{asking}/root", os.O_PATH)
    status = Path(f"/proc/{asking}/status").read_text()
    namespaces = [f"/proc/{{}}/ns/{kind}" for kind in ("pid", "mnt", "uts", "ipc", "net")]
    elsewhere = any(
        os.readlink(name.format(asking)) != os.readlink(name.format("self")) for name in namespaces
    )
    if elsewhere:
        _setns(who, _NEW_PID)
    pid = os.fork()
    if pid:
        if elsewhere:
            _setns(own, _NEW_PID)
        for number in (who, root, *files):
            os.close(number)
        return pid
    code = 1
    try:
        for number, file in enumerate(files):
            os.dup2(file, number)
        if elsewhere:
            _setns(who, _NEW_OTHERS)
            os.chdir(root)
            os.chroot(".")
        _become(dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line))
        _die_with_parent()
        os.closerange(3, 1024)
        code = _run(json.loads(words))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _run(asked: dict[str, Any]) -> int:
    """Run the program as a new interpreter would, and return its exit code."""
    os.environ.clear()
    os.environ.update(asked["env"])
    os.umask(asked["umask"])
    os.chdir(asked["cwd"])
    tempfile.tempdir = None
    script = asked["script"]
    sys.argv, sys.executable = [script or "dist-sae", *asked["arguments"]], asked["python"]
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as long as the process
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w"), write_through=True) for number in (1, 2)
    )
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    from dist_sae.__main__ import main  # the server has imported it

    code: Any = 0
    try:
        if script:
            sys.path.insert(0, str(Path(script).parent))
            runpy.run_path(script, run_name="__main__")
        else:
            code = main()
    except SystemExit as exc:
        code = exc.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined] # noqa: SLF001 - waits for other threads
    atexit._run_exitfuncs()  # noqa: SLF001
    if code is not None and not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
        return 1
    return code or 0


def _become(status: dict[str, str]) -> None:
    """Take the user, groups and no-new-privileges flag of another process."""
    os.setgroups([int(group) for group in status["Groups"].split()])
    group, user = (int(status[kind].split()[0]) for kind in ("Gid", "Uid"))
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)  # this drops all capabilities
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # else root owns its files in /proc
    if status["NoNewPrivs"].strip() == "1":
        ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(SIGKILL), 0, 0, 0)


def _setns(descriptor: int, kinds: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, kinds):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
