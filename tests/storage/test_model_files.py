"""Models stored as folders in an object store: which files are fetched, when, and how often."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_sae.storage.model_files
from dist_sae.config import Run
from dist_sae.config.data import HuggingFaceModel
from dist_sae.data.identity import model_content
from dist_sae.data.plan import check_model, load_plan, pin_to_plan
from dist_sae.errors import ModelError, PlanMismatchError
from dist_sae.models import build_source, build_tokenizer
from dist_sae.producing.planner import plan
from dist_sae.storage import Entry, ObjectStore, open_store
from dist_sae.storage.model_files import name_or_path
from tests.conftest import Bucket
from tests.models.test_huggingface import random_tokens, save_model
from tests.runs import make_run

SITES = ["resid_post.0"]
READ = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


class Counting:
    """A store that counts the bytes read from it."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.url = store.url
        self.got = 0

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        return self._store.entries(prefix)

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        data = self._store.get(key, start, stop)
        self.got += len(data)
        return data


@pytest.fixture
def got(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that returns the bytes read from model stores since its last call."""
    stores: list[Counting] = []

    def opened(*arguments: Any) -> Counting:
        stores.append(Counting(open_store(*arguments)))
        return stores[-1]

    monkeypatch.setattr(dist_sae.storage.model_files, "open_store", opened)

    def since() -> int:
        total = sum(store.got for store in stores)
        stores.clear()
        return total

    return since


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model, saved by transformers."""
    return save_model(tmp_path / "model", "gpt2")


def upload(bucket: Bucket, folder: Path, to: str = "models/gpt2") -> None:
    for path in folder.iterdir():
        bucket.client.put_object(
            Bucket=bucket.name, Key=f"{to}/{path.name}", Body=path.read_bytes()
        )


def run_of(tmp_path: Path, bucket: Bucket, path: str, name: str = "set") -> Run:
    (tmp_path / "a.txt").write_text("".join(f"w{i % 40 + 3} w{i % 7 + 3}\n\n" for i in range(900)))
    return make_run(
        tmp_path,
        store={
            "activations": f"s3://{bucket.name}/{name}",
            "runs": f"s3://{bucket.name}/runs",
            "s3": {"endpoint_url": bucket.endpoint_url},
        },
        model={"kind": "huggingface", "path": path, "dtype": "fp32"},
        corpus={"kind": "files", "files": [str(tmp_path / "a.txt")]},
        activations={"sites": SITES},
        train={"site": SITES[0]},
    )


def stored(bucket: Bucket, tmp_path: Path, to: str = "models/gpt2") -> HuggingFaceModel:
    model = run_of(tmp_path, bucket, f"s3://{bucket.name}/{to}").model
    assert isinstance(model, HuggingFaceModel)
    return model


@pytest.mark.parametrize("server_name", ["moto", "seaweedfs"])
def test_what_is_read_is_fetched_once_and_weights_when_they_are_needed(
    make_bucket: Callable[[str], Bucket],
    folder: Path,
    tmp_path: Path,
    got: Callable[[], int],
    server_name: str,
) -> None:
    bucket = make_bucket(server_name)
    for name in ("pytorch_model.bin", "modeling_gpt2.py"):  # code, which must never be run
        (folder / name).write_bytes(b"code")
    upload(bucket, folder)
    upload(bucket, folder, "models/gpt2/onnx")
    model = stored(bucket, tmp_path)
    weights = (folder / "model.safetensors").stat().st_size
    here = Path(name_or_path(model, weights=False))
    assert not (here / "model.safetensors").exists()
    assert 0 < got() < weights
    assert name_or_path(model, weights=True) == str(here)
    assert got() == weights
    name_or_path(model, weights=True)
    assert got() == 0
    for name in READ:
        assert (here / name).read_bytes() == (folder / name).read_bytes()
    assert not {"pytorch_model.bin", "modeling_gpt2.py", "onnx"} & {p.name for p in here.iterdir()}


def test_processes_that_share_a_cache_fetch_together(
    bucket: Bucket, folder: Path, tmp_path: Path, got: Callable[[], int]
) -> None:
    upload(bucket, folder)
    model = stored(bucket, tmp_path)
    together = [
        threading.Thread(target=name_or_path, args=(model,), kwargs={"weights": True})
        for _ in range(4)
    ]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    fetched = [path for path in folder.iterdir() if path.name in READ or path.suffix == ".json"]
    assert got() == sum(path.stat().st_size for path in fetched)


def test_a_damaged_file_is_fetched_again(
    bucket: Bucket, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    upload(bucket, folder)
    model = stored(bucket, tmp_path)
    file = Path(name_or_path(model, weights=True)) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    name_or_path(model, weights=True)
    assert file.read_bytes() == whole
    assert f"{file}: is damaged; downloading it again" in caplog.text


def test_a_moved_folder_is_the_same_one_and_a_new_model_is_not(
    bucket: Bucket, folder: Path, tmp_path: Path, got: Callable[[], int]
) -> None:
    upload(bucket, folder)
    upload(bucket, folder, "elsewhere")
    first = name_or_path(stored(bucket, tmp_path), weights=True)
    got()
    assert name_or_path(stored(bucket, tmp_path, "elsewhere"), weights=True) == first
    assert got() == 0
    save_model(folder, "gpt2", dtype=torch.float16)
    upload(bucket, folder)
    assert name_or_path(stored(bucket, tmp_path), weights=True) != first


@pytest.mark.parametrize(
    ("left_out", "missing"),
    [
        ("*", "no config.json, no tokenizer (tokenizer.json), no weights (*.safetensors)"),
        ("*.safetensors", "no weights (*.safetensors)"),
        ("tokenizer.json", "no tokenizer (tokenizer.json)"),
        ("model-00002-of-00002.safetensors", "no model-00002-of-00002.safetensors"),
    ],
)
def test_one_line_says_what_is_missing(
    bucket: Bucket, folder: Path, tmp_path: Path, left_out: str, missing: str
) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"code")
    if left_out.startswith("model-"):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        shards = {"a": "model-00001-of-00002.safetensors", "b": left_out}
        index = f'{{"weight_map": {str(shards).replace(chr(39), chr(34))}}}'
        (folder / "model.safetensors.index.json").write_text(index)
    for path in folder.glob(left_out):
        path.unlink()
    upload(bucket, folder)
    with pytest.raises(ModelError) as refused:
        name_or_path(stored(bucket, tmp_path), weights=False)
    told = str(refused.value)
    assert told.startswith(f"model.path s3://{bucket.name}/models/gpt2: has {missing}; copy")
    assert "\n" not in told


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": []}'])
def test_a_damaged_index_of_weights_is_named(
    bucket: Bucket, folder: Path, tmp_path: Path, index: str
) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    upload(bucket, folder)
    with pytest.raises(ModelError, match=r"index\.json is not an index of weights \("):
        model_content(stored(bucket, tmp_path))


def test_a_full_or_missing_place_is_named(
    bucket: Bucket, folder: Path, tmp_path: Path, home: Path
) -> None:
    upload(bucket, folder)
    home.write_text("no folder")
    with pytest.raises(ModelError, match=r"cannot be stored in .*; free space there \(in a pod: "):
        name_or_path(stored(bucket, tmp_path), weights=False)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"path": "gs://bucket/model"}, "gs://bucket/model is not a model: use a name"),
        ({"path": "s3://bucket"}, "s3://bucket is not a model: use a name on the model hub, a"),
        (
            {"path": "s3://b/m", "revision": "v1"},
            "revision: v1: a folder in a store has no revision",
        ),
    ],
)
def test_what_is_no_folder_of_a_store_is_refused(model: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        HuggingFaceModel.model_validate(model)


@pytest.mark.system
def test_a_model_is_the_same_from_a_folder_and_from_a_store(
    bucket: Bucket, folder: Path, tmp_path: Path
) -> None:
    """A model gives the same plan, rows and tokens from a folder and from a store.

    A model that was overwritten in the store is refused.
    """
    upload(bucket, folder)
    local = run_of(tmp_path, bucket, str(folder))
    remote = run_of(tmp_path, bucket, f"s3://{bucket.name}/models/gpt2")
    made = plan(local)
    assert made.model_content == model_content(remote.model)
    store = open_store(remote.store.activations, remote.store.s3)
    assert load_plan(store, remote) == made == plan(remote)
    check_model(pin_to_plan(remote, made), made)
    rows = [
        build_source(run.model, tuple(SITES)).run(*random_tokens(5, 3))[SITES[0]]
        for run in (local, remote)
    ]
    assert torch.equal(*rows)
    assert build_tokenizer(remote)(["w3 w9"]) == build_tokenizer(local)(["w3 w9"]) == [[3, 9]]

    other = save_model(tmp_path / "other", "gpt2", dtype=torch.float16)
    upload(bucket, other)
    with pytest.raises(PlanMismatchError, match=r"\(.*model\.safetensors.* differ\)"):
        check_model(pin_to_plan(remote, made), made)


@pytest.mark.system
def test_a_file_that_was_damaged_on_the_way_is_fetched_again(
    bucket: Bucket, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was damaged during its download is fetched again.

    The checksum stored next to the file matches the damaged bytes, but the plan's checksum does
    not.
    """
    upload(bucket, folder)
    remote = run_of(tmp_path, bucket, f"s3://{bucket.name}/models/gpt2")
    made = plan(run_of(tmp_path, bucket, str(folder)))
    damaged: list[str] = []

    class Damaging(Counting):
        def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
            data = super().get(key, start, stop)
            if key == "model.safetensors" and not damaged:
                damaged.append(key)
                return data[:-1] + bytes([data[-1] ^ 1])
            return data

    def opened(*arguments: Any) -> Counting:
        return Damaging(open_store(*arguments))

    monkeypatch.setattr(dist_sae.storage.model_files, "open_store", opened)
    check_model(remote, made)
    assert damaged
