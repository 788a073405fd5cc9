"""The peers, their versions, and a virtual environment for each."""

import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

TORCH = "torch==2.13.0"

SETTINGS = ("as_shipped", "matched", "as_shipped_bf16", "matched_bf16")


@dataclass(frozen=True)
class Peer:
    """A trainer under comparison.

    Attributes:
        name: Name on PyPI.
        version: Release; None for this copy of dist_sae.
        script: File name of the runner, in this folder.
        settings: Settings that the peer can run in.
        transcoders: Whether the peer also trains transcoders.
        removed: Requirements to uninstall after the installation.
    """

    name: str
    version: str | None
    script: str
    settings: tuple[str, ...] = SETTINGS
    transcoders: bool = False
    removed: tuple[str, ...] = ()


PEERS = (
    Peer("dist-sae", None, "run_dist_sae.py", ("matched", "matched_bf16"), transcoders=True),
    Peer("sae-lens", "6.54.12", "run_sae_lens.py"),
    Peer("eai-sparsify", "1.3.3", "run_sparsify.py", transcoders=True),
    Peer(
        "dictionary-learning",
        "0.1.0",
        "run_dictionary_learning.py",
        # torchvision is unused, but transformers imports it if it is installed, and its compiled
        # part does not load with a CPU build of torch
        removed=("torchvision",),
    ),
)


class PeerError(Exception):
    """A peer could not be installed or run. Reported in the peer's row of the result."""


def ensure_environment(peer: Peer, folder: Path) -> Path:
    """Return the peer's Python, after building its environment if it is missing or outdated.

    Raises:
        PeerError: The installation failed.
    """
    if peer.version is None:
        return Path(sys.executable)
    home = folder.expanduser() / peer.name
    python = home / "bin" / "python"
    marker = home / "complete.json"  # written last
    content = json.dumps([TORCH, peer.version, *peer.removed, *sys.version_info[:2]])
    if python.exists() and marker.exists() and marker.read_text(encoding="utf-8") == content:
        return python
    logger.info("installing %s==%s into %s", peer.name, peer.version, home)
    home.mkdir(parents=True, exist_ok=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _call([sys.executable, "-m", "venv", "--clear", str(home)])
    # torch first and alone, so that a local CPU build that pip is pointed at stays installed
    _call([*pip, "install", TORCH])
    _call([*pip, "install", f"{peer.name}=={peer.version}", TORCH])
    if peer.removed:
        _call([*pip, "uninstall", "--yes", *peer.removed])
    marker.write_text(content, encoding="utf-8")
    return python


def last_line(text: str) -> str:
    """Return the last non-empty line, where Python and pip put the reason of a failure."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerError(f"{' '.join(command[1:])}: {last_line(done.stderr or done.stdout)}")
