"""The program of `preloaded.py`. Requests a fork from the server in its folder, and acts for it."""

import array
import json
import os
import signal
import socket
import sys

folder = os.path.dirname(os.path.abspath(sys.argv[0]))
arguments, script = sys.argv[1:], ""
if os.path.basename(sys.argv[0]) == "python":
    if arguments[:2] == ["-m", "dist_sae"]:
        arguments = arguments[2:]
    elif arguments[:1] and arguments[0].endswith(".py"):
        script, *arguments = arguments
    else:
        os.execv(sys.executable, [sys.executable, *arguments])
umask = os.umask(0)
os.umask(umask)
asked = {
    "script": script,
    "arguments": arguments,
    "env": dict(os.environ),
    "cwd": os.getcwd(),
    "umask": umask,
    "python": os.path.join(folder, "python"),
}
signals = (signal.SIGINT, signal.SIGTERM)
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect(os.path.join(folder, "preloaded.sock"))
    files = array.array("i", [0, 1, 2])
    server.sendmsg([json.dumps(asked).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    null = os.open(os.devnull, os.O_RDWR)
    for number in files:  # close the originals, so that only the fork has them open
        os.dup2(null, number)
    for number in signals:
        signal.signal(number, lambda which, _: server.send(str(int(which)).encode()))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    code = int(server.recv(64) or -9)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
