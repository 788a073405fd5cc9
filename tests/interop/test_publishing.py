"""Publishing uploads the right files and card, and sends nothing without `--yes`.

The hub is a local server that implements what `huggingface_hub` uses: small files are part of the
commit, and weights go by the LFS protocol.
"""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.commands.cli import main
from dist_sae.storage import open_store
from tests.interop.test_export import HF
from tests.interop.test_formats import MLP, trained
from tests.servers import free_ports

NAME = "org/name"
# raised by the hub's client
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class Hub(ThreadingHTTPServer):
    """A hub with one account, whose token is `good`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.made: dict[str, Any] | None = None
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.summaries: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers["Content-Length"]))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.headers.get("Authorization") != "Bearer good":
            self.answer({"error": "Invalid credentials"}, 401)
            return
        assert self.path.startswith(f"/api/models/{NAME}/tree/main")
        self.answer(
            [
                {"type": "file", "path": name, "size": len(data), "oid": "0"}
                for name, data in self.server.files.items()
            ]
        )

    def do_PUT(self) -> None:
        self.server.requests.append(self.path)
        self.server.blobs[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        hub, path = self.server, self.path
        hub.requests.append(path)
        body = self.body()
        if self.headers.get("Authorization") != "Bearer good":
            self.answer({"error": "Invalid credentials"}, 401)
        elif path == "/api/repos/create":
            hub.made = json.loads(body)
            self.answer({"url": f"{hub.url}/{NAME}", "name": NAME, "id": NAME})
        elif path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            self.answer({"errors": [], "warnings": []})
        elif path == f"/api/models/{NAME}/preupload/main":
            files = json.loads(body)["files"]
            modes = {
                file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular"
                for file in files
            }
            self.answer(
                {
                    "files": [
                        {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None}
                        for name, mode in modes.items()
                    ]
                }
            )
        elif path == f"/{NAME}.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            for thing in objects:
                href = f"{hub.url}/blobs/{thing['oid']}"
                thing["actions"] = {"upload": {"href": href, "header": {}}}
            self.answer({"transfer": "basic", "objects": objects})
        else:
            assert path == f"/api/models/{NAME}/commit/main"
            for entry in map(json.loads, body.splitlines()):
                value = entry["value"]
                match entry["key"]:
                    case "header":
                        hub.summaries.append(value["summary"])
                    case "file":
                        hub.files[value["path"]] = base64.b64decode(value["content"])
                    case "lfsFile":
                        hub.files[value["path"]] = hub.blobs[value["oid"]]
            commit = f"{hub.url}/{NAME}/commit/1"
            self.answer({"success": True, "commitOid": "1", "commitUrl": commit})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "good")
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield server
        huggingface_hub.close_session()
        server.shutdown()
        thread.join()


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Arguments that publish a run with an evaluated checkpoint."""
    run, _, _ = trained(tmp_path, {"kind": "jumprelu"})
    checkpoint = Checkpoints(open_store(run.store.runs), run.name, 1).latest()
    assert checkpoint
    numbers = {"fvu": 0.125, "ce_recovered": 0.975, "made_from": {"checkpoint": checkpoint.digest}}
    (tmp_path / "runs/world/evaluation.json").write_text(json.dumps(numbers))
    settings = [*HF, "export.model_name=some/model"]
    words = [word for setting in settings for word in ("--set", setting)]
    return ["publish", str(tmp_path / "run.yaml"), NAME, *words]


def test_nothing_is_sent_without_the_word(
    hub: Hub, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said == (
        "error: nothing was sent; inspect the files with --dry-run FOLDER, then send them "
        "with --yes\n"
    )
    folder = tmp_path / "look"
    licences = ["--licence", "mit", "--model-licence", "apache-2.0"]
    assert main([*command, "--dry-run", str(folder), *licences]) == 0
    assert hub.requests == []
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"README.md", "mlp_in.0/cfg.json", "mlp_in.0/sae_weights.safetensors"}
    exported = tmp_path / "runs/world/export/sae_weights.safetensors"
    assert (folder / "mlp_in.0/sae_weights.safetensors").read_bytes() == exported.read_bytes()
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert (metadata["license"], metadata["base_model"]) == ("mit", "some/model")
    for line in (
        "| kind | `jumprelu`, 32 latents |",
        "| model | some/model (license: apache-2.0) |",
        "| text | x.txt (license: not stated) |",
        "| fraction of variance unexplained (FVU) | 0.125 |",
        "| cross-entropy recovered, relative to zero ablation | 97.50% |",
        'sae = SAE.from_pretrained("org/name", "mlp_in.0")',
    ):
        assert f"{line}\n" in body
    # a second dry run into the same folder is allowed
    assert main([*command, "--dry-run", str(folder)]) == 0
    (folder / "mine").touch()
    assert main([*command, "--dry-run", str(folder)]) == 2
    assert "look: already contains mine; name an empty folder" in capsys.readouterr().err


def test_what_is_sent_is_what_was_shown(
    hub: Hub, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files sent are those of the dry run, in one commit to a private repository.

    The weights are sent by the LFS protocol.
    """
    folder = tmp_path / "look"
    assert main([*command, "--dry-run", str(folder)]) == 0
    assert main([*command, "--yes"]) == 0
    shown = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert hub.files == shown
    assert list(hub.blobs.values()) == [shown["mlp_in.0/sae_weights.safetensors"]]
    assert hub.summaries == ["world: jumprelu dictionary of mlp_in.0"]
    assert hub.made
    assert hub.made["visibility"] == "private"
    assert f"{hub.url}/{NAME}/commit/1" in capsys.readouterr().out


def test_files_of_others_are_replaced_only_on_request(
    hub: Hub, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files = {"README.md": b"theirs", ".gitattributes": b""}
    assert main([*command, "--yes"]) == 2
    assert hub.files["README.md"] == b"theirs"
    assert "org/name: already has 1 files; choose another name" in capsys.readouterr().err
    assert main([*command, "--yes", "--replace", "--public"]) == 0
    assert hub.files["README.md"].startswith(b"---")
    assert hub.made
    assert hub.made["visibility"] == "public"


def test_a_hub_that_refuses_or_is_away_is_one_line(
    hub: Hub,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", "bad")
    assert main([*command, "--yes"]) == 2
    said = capsys.readouterr().err
    assert "error: org/name: the current token does not allow writing there; log in" in said
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_ports(1)}")
    assert main([*command, "--yes"]) == 75
    assert (
        "does not respond (ConnectError); run the same command again later"
        in capsys.readouterr().err
    )
    assert hub.files == {}


def test_a_folder_is_no_name_of_a_model(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A local folder is refused as the model's name.

    The card would reveal a path of this machine.
    """
    model = tmp_path / "model"
    more = ["--set", f"model.path={model}", "--set", "export.model_name=null"]
    assert main([*command, *more, "--dry-run", str(tmp_path / "look")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: model.path: {model} is a local folder; give the model")
    command[2] = "name"
    assert main([*command, "--dry-run", str(tmp_path / "look")]) == 2
    assert "error: name: not a repository name; use ORG/NAME" in capsys.readouterr().err
    assert not (tmp_path / "look").exists()


def test_numbers_of_another_checkpoint_are_not_told(command: list[str], tmp_path: Path) -> None:
    numbers = {"fvu": 0.125, "made_from": {"checkpoint": "another"}}
    (tmp_path / "runs/world/evaluation.json").write_text(json.dumps(numbers))
    more = ["--format", "dictionary-learning", "--dry-run", str(tmp_path / "look")]
    assert main([*command, *more]) == 0
    text = (tmp_path / "look/README.md").read_text()
    assert "Not evaluated." in text
    assert "0.125" not in text
    assert (tmp_path / "look/mlp_in.0/ae.pt").exists()


def test_a_transcoder_is_loaded_as_that_of_its_layer(tmp_path: Path) -> None:
    """The card of a single-layer transcoder shows how to load that layer.

    circuit-tracer loads a whole repository only if it has all layers.
    """
    trained(tmp_path, {"kind": "transcoder", "selection": "batch", **MLP})
    settings = [*HF, "export.model_name=some/model"]
    words = [word for setting in settings for word in ("--set", setting)]
    more = ["--format", "circuit-tracer", "--dry-run", str(tmp_path / "look")]
    assert main(["publish", str(tmp_path / "run.yaml"), NAME, *words, *more]) == 0
    text = (tmp_path / "look/README.md").read_text()
    assert 'path = hf_hub_download("org/name", "layer_0.safetensors")\n' in text
    assert "transcoder = load_relu_transcoder(path, 0)\n" in text
    assert (tmp_path / "look/layer_0.safetensors").exists()
