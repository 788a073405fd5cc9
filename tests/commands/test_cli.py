import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dist_sae import __version__
from dist_sae.commands.cli import main
from dist_sae.config import Run, load_run
from tests.conftest import Bucket
from tests.runs import TINY, write_run
from tests.world import changed


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one error line of a command that must fail with exit code 2."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = (text for text in said.err.splitlines() if text.startswith("error: "))
    assert "Traceback" not in said.err
    return line.removeprefix("error: ")


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def real_run(folder: Path, corpus: str) -> Path:
    """Write a run over text whose language model does not exist.

    The text is checked before the model.
    """
    path = write_run(folder, TINY, activations={"sites": ["resid_post.0"]})
    run = yaml.safe_load(path.read_text())
    run["model"] = {"kind": "huggingface", "path": str(folder / "no-model")}
    run["corpus"] = {"kind": "files", "files": [corpus]}
    path.write_text(yaml.safe_dump(run))
    return path


@pytest.fixture
def produced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The run file of a run with a complete activation set."""
    path = write_run(tmp_path, TINY)
    assert main(["plan", str(path)]) == 0
    assert main(["produce", str(path)]) == 0
    capsys.readouterr()
    return path


@pytest.mark.parametrize("command", ["plan", "produce", "train", "evaluate", "export", "run"])
@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("sae.n_latent=8", "sae.n_latent: unknown key; did you mean n_latents?"),
        ("sae.k=33", "sae: k (33) must not exceed n_latents (32)"),
    ],
)
def test_bad_setting_ends_every_command_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, override: str, problem: str
) -> None:
    path = write_run(tmp_path, TINY)
    assert fail(capsys, command, str(path), "--set", override) == f"{path}: {problem}"
    assert files_in(tmp_path) == ["run.yaml"]


BAD = """
import sys
from dist_sae.commands.cli import main
for command in sys.argv[2:]:
    assert main([*command.split(), sys.argv[1], "--set", "sae.kk=1"]) == 2
heavy = {"torch", "deepspeed", "transformers", "boto3", "kubernetes"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_a_mistake_in_the_run_file_is_told_before_anything_heavy_is_imported(
    tmp_path: Path,
) -> None:
    commands = ["plan", "produce", "train", "run", "evaluate", "export", "report", "render"]
    commands += ["store ls", "store verify", "store gc", "checkpoints ls", "checkpoints verify"]
    commands += ["submit", "status", "logs", "cancel", "resume", "bench produce"]
    code = [sys.executable, "-c", BAD, str(write_run(tmp_path, TINY)), *commands]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("sae.kk: unknown key; did you mean k?") == len(commands)


def test_several_problems_make_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, TINY, sae={"kk": 1, "k": 0})
    assert main(["plan", str(path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {path}: sae.k: input should be greater than 0 (got 0)",
        f"error: {path}: sae.kk: unknown key; did you mean k?",
    ]


def test_missing_corpus_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = real_run(tmp_path, str(tmp_path / "none.txt"))
    problem = f"{tmp_path}/none.txt: no such file; correct corpus.files"
    assert fail(capsys, "plan", str(path)) == problem
    assert files_in(tmp_path) == ["run.yaml"]


def test_empty_corpus_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    path = real_run(tmp_path, str(tmp_path / "empty.txt"))
    problem = f"corpus: no documents in {tmp_path}/empty.txt; give files that contain text"
    assert fail(capsys, "plan", str(path)) == problem
    assert files_in(tmp_path) == ["empty.txt", "run.yaml"]


def test_corpus_too_small_for_a_batch_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 5 % of 40 documents are held out. The other 38 give 38 * 63 rows, because the first token of
    # each context is left out
    path = write_run(tmp_path, TINY, corpus={"documents": 40})
    sizes = ["--set", "train.batch_rows=4096", "--set", "train.rows=4096"]
    problem = "corpus: about 2394 rows to train on, less than one batch (train.batch_rows 4096)"
    assert fail(capsys, "plan", str(path), *sizes).startswith(problem)
    assert files_in(tmp_path) == ["run.yaml"]


def test_wrong_bucket_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bucket: Bucket
) -> None:
    s3 = {"endpoint_url": bucket.endpoint_url}
    path = write_run(tmp_path, TINY, store={"activations": "s3://no-such-bucket/a", "s3": s3})
    problem = "s3://no-such-bucket/a: no such bucket; create it or correct the URL"
    assert fail(capsys, "plan", str(path)) == problem
    assert fail(capsys, "produce", str(path)) == problem


def test_store_with_another_plan_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_run(tmp_path, TINY))
    assert main(["plan", path]) == 0
    before = (tmp_path / "activations/plan.json").read_bytes()
    capsys.readouterr()
    for command in ("plan", "produce"):
        problem = fail(capsys, command, path, "--set", "activations.seed=1")
        assert "has a different plan (activations.seed: 0 -> 1)" in problem
    assert files_in(tmp_path / "activations") == ["plan.json"]
    assert (tmp_path / "activations/plan.json").read_bytes() == before


def test_port_in_use_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path, TINY)
    assert main(["plan", str(path)]) == 0
    capsys.readouterr()
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        problem = fail(capsys, "produce", str(path), "--set", f"telemetry.port={port}")
    assert problem.startswith(f"telemetry.port {port}: cannot be opened (Address already in use)")
    assert files_in(tmp_path / "activations") == ["plan.json"]


def test_produce_before_plan_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, TINY)
    assert fail(capsys, "produce", str(path)).endswith("has no plan yet; run `dist-sae plan` first")
    assert files_in(tmp_path) == ["run.yaml"]


def test_json_is_the_last_line_of_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_run(tmp_path, TINY))
    assert main(["plan", path, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    # 125 documents of 63 rows: 6 held out, 119 * 63 / 2048 = 3.7, a multiple of 4 streams
    assert result["documents"] == 125
    assert result["train_units"] == 4
    assert result["heldout_units"] == 1
    assert result["train_rows"] == 119 * 63
    # 29 documents in the shortest stream, 30 in three others
    assert result["pass_rows"] == 4 * 29 * 63
    assert result["unusable_rows"] == 3 * 63
    # 8 values of 4 bytes, and 16 bytes that locate the row
    assert result["bytes"] == 125 * 63 * (4 * 8 + 16)
    assert result["run_rows"] == 4096
    assert result["passes"] == round(4096 / (4 * 29 * 63), 3)

    assert main(["config", "show", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["name"] == "tiny"
    assert main(["config", "schema", "--json"]) == 0
    assert "properties" in json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["render", path, "--json"]) == 0
    assert "deepspeed" in json.loads(capsys.readouterr().out.splitlines()[-1])


def test_plan_tells_a_mistake_in_deepspeeds_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, TINY, train={"deepspeed": {"zero_optimisation": {"stage": 1}}})
    assert "train.deepspeed.zero_optimisation: unknown to DeepSpeed" in fail(
        capsys, "plan", str(path)
    )
    assert files_in(tmp_path) == ["run.yaml"]


def test_plan_made_twice_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_run(tmp_path, TINY))
    outputs = []
    for _ in range(2):
        assert main(["plan", path, "--json"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_config_show_prints_a_run_file_with_the_overrides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, TINY)
    assert main(["config", "show", str(path), "--set", "sae.k=1"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert load_run(shown) == load_run(path, ["sae.k=1"])


def test_config_schema_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == Run.model_json_schema()


def test_store_verify_passes_a_sound_store(
    produced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", "verify", str(produced), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    units = list((produced.parent / "activations/units").iterdir())
    shards = list((produced.parent / "activations/shards").rglob("*.tar"))
    assert len(units) == len(shards) == 5
    assert result == {
        "objects": 10,
        "bytes": sum(path.stat().st_size for path in units + shards),
        "missing_units": 0,
        "retired_units": 0,
        "bad": 0,
        "bad_objects": {},
    }


def test_store_verify_names_every_bad_object(
    produced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = produced.parent / "activations"
    cut, flipped, gone, *_ = sorted((store / "shards").rglob("*.tar"))
    units = sorted((store / "units").iterdir())
    content = cut.read_bytes()
    cut.write_bytes(content[:-1])
    damaged = bytearray(flipped.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    flipped.write_bytes(damaged)
    gone.unlink()
    units[3].write_bytes(units[3].read_bytes()[:-1])
    units[4].write_bytes(changed(units[4].read_bytes(), plan="another"))

    bad = {
        str(cut.relative_to(store)): f"has {len(content) - 1} bytes, but {len(content)} were",
        str(flipped.relative_to(store)): "does not match its checksum",
        str(gone.relative_to(store)): "is missing",
        "units/00000003.json": "is damaged: ",
        "units/00000004.json": "was produced under a different plan",
    }
    assert main(["store", "verify", str(produced), "--json"]) == 2
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert result["bad"] == 5
    assert result["bad_objects"].keys() == bad.keys()
    lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert lines[0].startswith(f"error: {store}: 5 of 8 objects are damaged; delete the")
    for line, (key, fault) in zip(lines[1:], bad.items(), strict=True):
        assert line.startswith(f"error: {key}: {fault}")


def test_store_verify_checks_the_manifest_against_the_shard(
    produced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unit = produced.parent / "activations/units/00000000.json"
    sites = json.loads(unit.read_bytes())["sites"]
    shard = sites["synthetic"]
    shard["blocks"][0]["offset"] += 1
    unit.write_bytes(changed(unit.read_bytes(), sites=sites))
    assert main(["store", "verify", str(produced)]) == 2
    said = capsys.readouterr()
    assert f"error: {shard['key']}: does not match its manifest's list of blocks" in said.err
    assert "bad                  1" in said.out


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["plan"], ["no-such-command"], ["store", "verify"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "usage: dist-sae" in capsys.readouterr().err


def test_version_and_help_exit_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    for line, text in (("--version", __version__), ("run --help", "--set KEY=VALUE")):
        with pytest.raises(SystemExit) as caught:
            main(line.split())
        assert caught.value.code == 0
        assert text in capsys.readouterr().out


def test_interrupt_is_resumable_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dist_sae.checkpoint.run_folder.open_run", interrupt)
    assert main(["config", "show", str(write_run(tmp_path, TINY))]) == 75
    assert capsys.readouterr().err == "stopped: interrupted; start the same command again\n"


def test_reader_that_closes_early_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "dist_sae", "config", "show", str(write_run(tmp_path, TINY))],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


DYING = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIG{name})
except BaseException:  # as C extensions do with what interrupts their import
    pass
raise ImportError("no interrupt, it seems")
"""


@pytest.mark.system
@pytest.mark.parametrize("name", ["TERM", "INT"])
# imported at the start, and by a command
@pytest.mark.parametrize("module", ["argparse", "webdataset"])
def test_signal_during_an_import_ends_in_one_line(tmp_path: Path, name: str, module: str) -> None:
    (tmp_path / f"{module}.py").write_text(DYING.format(name=name))
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "dist_sae", "store", "ls", str(write_run(tmp_path, TINY))],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 75
    assert done.stderr == "stopped: interrupted; start the same command again\n"


def test_signal_at_the_very_end_does_not_change_the_exit_code() -> None:
    """A late signal is ignored because the program exits before the interpreter shuts down.

    At shutdown, Python restores the default handlers before it destroys modules, so a SIGTERM
    during the latter would end the process with 143.
    """
    program = """
import os, signal, sys
from dist_sae import signals

class Late:
    def __del__(self, kill=os.kill, me=os.getpid(), number=signal.SIGTERM):
        kill(me, number)

late = Late()
signals.install_handlers()
signals.register_early_exit()
signals.exit_on_signal(0)
sys.exit(0)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
