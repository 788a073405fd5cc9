import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from dist_sae.config import (
    Run,
    differences,
    dump_run,
    load_run,
    validate_run,
    with_absolute_paths,
)
from dist_sae.config.sae import TopKConfig
from dist_sae.errors import ConfigError
from tests.config.problems import problems
from tests.runs import TINY, make_run, write_run


def test_load_run_reports_every_problem_at_once(tmp_path: Path) -> None:
    path = write_run(
        tmp_path, TINY, sae={"k": 0, "auxk": -1}, train={"rows": "many"}, evaluate={"rowz": 1}
    )
    assert problems(path) == [
        "sae.k: input should be greater than 0 (got 0)",
        "sae.auxk: input should be greater than or equal to 0 (got -1)",
        "train.rows: input should be a valid integer, "
        "unable to parse string as an integer (got 'many')",
        "evaluate.rowz: unknown key; did you mean rows?",
    ]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("sae.n_latent=3", "sae.n_latent: unknown key; did you mean n_latents?"),
        ("trian={}", "trian: unknown key; did you mean train?"),
        ("store.s3.endpoint=x", "store.s3.endpoint: unknown key; did you mean endpoint_url?"),
        (
            "model.layers=3",
            "model.layers: unknown key; known keys: kind, d_in, n_features, l0, zipf, p_max, seed",
        ),
        (
            "activations.exclude.norm=3",
            "activations.exclude.norm: unknown key; did you mean over_norm?",
        ),
    ],
)
def test_load_run_suggests_what_an_unknown_key_may_mean(
    tmp_path: Path, override: str, problem: str
) -> None:
    assert problems(write_run(tmp_path, TINY), [override]) == [problem]


def test_auxk_left_open_fits_a_small_dictionary() -> None:
    assert TopKConfig(n_latents=256, k=8).auxk == 256
    assert TopKConfig(n_latents=4096, k=8).auxk == 512


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        # `files` is the union's tag and also the name of a key
        (
            "corpus={kind: files, files: [1]}",
            "corpus.files.0: input should be a valid string (got 1)",
        ),
        ("corpus={kind: files, files: a}", "corpus.files: input should be a valid list (got 'a')"),
        ("corpus={kind: file}", "corpus.kind: unknown kind file; did you mean files?"),
        ("corpus={}", "corpus.kind: missing; give one of files, dataset, synthetic"),
        ("corpus={kind: dataset}", "corpus.name: missing"),
        ("corpus=3", "corpus: must be a section with its own keys (got 3)"),
        ("sae.k=1e3", "sae: k (1000) must not exceed n_latents (32)"),
        ("sae.auxk=33", "sae: auxk (33) must not exceed n_latents (32)"),
        (
            "sae={kind: jumprelu, n_latents: 32, target_l0: 33}",
            "sae: target_l0 (33) must not exceed n_latents (32)",
        ),
        (
            "sae={kind: jumprelu, n_latents: 32, target_l0: 7.5, sparsity: 0.01}",
            "sae: target_l0 and sparsity exclude each other; leave one of them out",
        ),
        (
            "activations.sites=[]",
            "activations.sites: list should have at least 1 item after validation, not 0 (got [])",
        ),
    ],
)
def test_load_run_keeps_union_tags_out_of_the_path(
    tmp_path: Path, override: str, problem: str
) -> None:
    assert problems(write_run(tmp_path, TINY), [override]) == [problem]


@pytest.mark.parametrize("site", ["resid_post", "resid_post.x", "resid_mid.3", "RESID_POST.3"])
def test_load_run_names_the_bad_site_and_no_consequence_of_it(tmp_path: Path, site: str) -> None:
    (problem,) = problems(write_run(tmp_path, TINY), [f"activations.sites=[{site}]"])
    assert problem.startswith(f"activations.sites.0: {site!r} is not a site: use NAME.LAYER")


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_load_run_refuses_numbers_that_are_not_finite(tmp_path: Path, value: str) -> None:
    (problem,) = problems(write_run(tmp_path, TINY), [f"train.lr={value}"])
    assert problem.startswith("train.lr: input should be")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("store.runs=s3://", "store.runs: s3:// has no bucket: use s3://bucket/prefix"),
        ("store.runs=s3:///a", "store.runs: s3:///a has no bucket: use s3://bucket/prefix"),
        (
            "store.runs=gs://a/b",
            "store.runs: unknown scheme 'gs': use s3://bucket/prefix, file:///path or a path",
        ),
        (
            "store.runs=file://a/b",
            "store.runs: file://a/b contains a host: use file:///path, with three slashes",
        ),
        (
            "store.runs=~nobody-here/a",
            "store.runs: ~nobody-here/a begins with the home folder of an unknown user",
        ),
        ("store.runs=''", "store.runs: is empty: use s3://bucket/prefix, file:///path or a path"),
        ("store.runs=/", "store.runs: is the root of the file system: use a folder in it"),
        ("store.runs=file:///", "store.runs: is the root of the file system: use a folder in it"),
        (
            "store.s3.endpoint_url=localhost:9000",
            "store.s3.endpoint_url: localhost:9000 has no scheme: "
            "write http://host:port or https://host",
        ),
        (
            "corpus={kind: files, files: ['s3://bucket']}",
            "corpus.files.0: s3://bucket is not a file: use a path, a pattern or s3://bucket/key",
        ),
        (
            "corpus={kind: files, files: ['https://a/b']}",
            "corpus.files.0: https://a/b is not a file: use a path, a pattern or s3://bucket/key",
        ),
    ],
)
def test_load_run_refuses_urls_that_lead_nowhere(
    tmp_path: Path, override: str, problem: str
) -> None:
    assert problems(write_run(tmp_path, TINY), [override]) == [problem]


def test_overrides_are_yaml_and_the_last_one_wins(tmp_path: Path) -> None:
    run = load_run(
        write_run(tmp_path, TINY),
        ["train.lr=1e-3", "train.lr=2e-3", "train.rows=1e5", "train.betas=[0.8, 0.9]",
         "train.clip_norm=null", "train.deepspeed={zero: {eps: 1e-5}}"],
    )  # fmt: skip
    assert run.train.lr == 0.002
    assert run.train.rows == 100_000
    assert run.train.betas == (0.8, 0.9)
    assert run.train.clip_norm is None
    # parsed as a number, although the schema does not require one
    assert run.train.deepspeed == {"zero": {"eps": 1e-5}}


def test_overrides_create_the_sections_they_need(tmp_path: Path) -> None:
    path = write_run(tmp_path, TINY)
    path.write_text(path.read_text() + "telemetry:\n")  # a section without a value
    run = load_run(path, ["telemetry.port=9000", "store.s3.region=eu-west-1"])
    assert run.telemetry.port == 9000
    assert run.store.s3.region == "eu-west-1"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sae.k", "--set sae.k: write it as section.key=value"),
        ("=3", "--set =3: write it as section.key=value"),
        ("sae..k=3", "--set sae..k=3: write it as section.key=value"),
        ("sae.k=[", "--set sae.k=[: the value is not valid YAML"),
        # a byte that is not text
        ("name=\udcff", "--set name=\udcff: the value is not valid YAML"),
        ("sae.k.x=1", "--set sae.k.x=1: k is a value, not a section"),
    ],
)
def test_override_errors_name_the_override(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(write_run(tmp_path, TINY), [override])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", ":2:1: not valid YAML: key 'name' appears twice"),
        ("sae:\n  k: 1\n  k: 2\n", ":3:3: not valid YAML: key 'k' appears twice"),
        ("sae: [1\nname: x\n", ":2:5: not valid YAML: did not find expected ',' or ']'"),
        ("name: \x07\n", ": not valid YAML: unacceptable character #x0007"),
        ("? [a, b]\n: 1\n", ":1:3: not valid YAML: found unhashable key"),
        ("- a\n", ": must contain a mapping with the keys name, store, model"),
        ("", ": must contain a mapping with the keys name, store, model"),
    ],
)
def test_load_run_says_where_the_yaml_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"name: \xff\n", "cannot be read")]
)
def test_load_run_says_so_when_the_file_cannot_be_read(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "run.yaml"
    if content:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{path}: {message}"):
        load_run(path)


def test_dumped_run_loads_to_an_equal_run(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, TINY), ["train.lr=1e-3", "train.deepspeed={a: [1, 2]}"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_run(run))
    assert load_run(again) == run
    assert load_run(again, ["sae.k=1"]) != run


def test_the_schema_asks_for_a_kind_wherever_loading_does(tmp_path: Path) -> None:
    validator = jsonschema.Draft202012Validator(Run.model_json_schema())
    data = yaml.safe_load(write_run(tmp_path, TINY).read_text())
    assert not list(validator.iter_errors(data))
    for section in ("sae", "model", "corpus"):
        without = data | {section: {k: v for k, v in data[section].items() if k != "kind"}}
        assert list(validator.iter_errors(without)), section
        with pytest.raises(ConfigError, match=rf"{section}\.kind: missing"):
            validate_run(without, "run.yaml")


def test_local_stores_resolve_to_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    path = write_run(tmp_path, TINY)
    run = load_run(path, ["store.activations=a b/../c/", "store.runs=~/r"])
    assert run.store.activations == f"{tmp_path}/c"
    assert run.store.runs == "/home/someone/r"
    for url in ("file:///a%20\u00e4#1?x", "file:///a \u00e4#1?x"):
        assert load_run(path, [f"store.runs={url}"]).store.runs == "/a \u00e4#1?x"
    assert load_run(path, ["store.runs=s3://b/p/"]).store.runs == "s3://b/p"


def test_run_cannot_be_changed(tmp_path: Path) -> None:
    run: Any = load_run(write_run(tmp_path, TINY))
    with pytest.raises(ValidationError, match="frozen"):
        run.name = "other"
    with pytest.raises(ValidationError, match="frozen"):
        run.sae.k = 3


def test_json_schema_documents_every_key() -> None:
    schema = json.loads(json.dumps(Run.model_json_schema()))
    latents = schema["$defs"]["TopKConfig"]["properties"]["n_latents"]
    assert latents["description"] == "Number of latents in the dictionary."
    assert schema["additionalProperties"] is False


def test_differences_name_the_nested_keys_that_differ() -> None:
    old = {"a": {"b": 1, "c": 2}, "d": 3, "gone": 1}
    new = {"a": {"b": 1, "c": 4}, "d": 3, "new": {"x": 1}}
    assert differences(old, new) == ["a.c: 2 -> 4", "gone: 1 -> None", "new: None -> {'x': 1}"]
    assert differences(old, old) == []


def test_learning_rate_follows_the_width_unless_given(tmp_path: Path) -> None:
    path = write_run(tmp_path, TINY)
    # 2e-4 * sqrt(2^14 / 2^18) = 2e-4 / 4
    assert load_run(path, ["sae.n_latents=262144", "sae.init=random"]).lr == pytest.approx(5e-5)
    assert load_run(path, ["train.lr=0.5"]).lr == 0.5


@pytest.mark.parametrize(("trainers", "shards", "replicas"), [(1, 1, 1), (4, 1, 4), (4, 2, 2)])
def test_ranks_are_replicas_times_shards(
    tmp_path: Path, trainers: int, shards: int, replicas: int
) -> None:
    settings = [f"processes.trainers={trainers}", f"processes.latent_shards={shards}"]
    assert load_run(write_run(tmp_path, TINY), settings).replicas == replicas


def test_steps_are_full_batches(tmp_path: Path) -> None:
    assert load_run(write_run(tmp_path, TINY), ["train.rows=1023"]).steps == 3  # of 256 rows


SLOW = {"torch", "deepspeed", "transformers", "boto3", "numpy"}
"""Libraries that are slow to import."""


def test_importing_the_configuration_needs_no_torch() -> None:
    modules = "dist_sae.config, dist_sae.commands.cli, dist_sae.interop.sae_lens"
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "dist_sae.config" in loaded
    assert SLOW.isdisjoint(loaded)


def test_help_loads_no_slow_library() -> None:
    """`--help` answers within 0.1 s, because it does not import torch, which takes 2 s."""
    command = [sys.executable, "-X", "importtime", "-m", "dist_sae", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "produce" in done.stdout
    assert "dist_sae.commands.cli" in loaded
    assert (SLOW | {"pydantic", "yaml", "rich"}).isdisjoint(loaded)


def test_yaml_written_for_people_reads_back(tmp_path: Path) -> None:
    assert list(yaml.safe_load(dump_run(load_run(write_run(tmp_path, TINY))))) == list(
        Run.model_fields
    )


RUN_FILES = sorted((Path(__file__).parents[2] / "launch/runs").glob("*.yaml"))


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_run_files_that_ship_are_valid(path: Path) -> None:
    assert load_run(path).name


def test_the_million_latents_train_on_the_quickstarts_activations() -> None:
    """The plan is built from these sections, and the store refuses a run with a different plan."""
    shipped = {path.stem: load_run(path) for path in RUN_FILES}
    one, other = (shipped[f"smollm2-resid7-{kind}-cpu"] for kind in ("topk", "routed-1m"))
    for section in ("model", "corpus", "activations", "store"):
        assert getattr(one, section) == getattr(other, section)
    assert one.name != other.name


def test_a_run_s_text_and_model_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local files get absolute paths. Names on a hub and in buckets do not change."""
    (tmp_path / "models/tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def placed(path: str) -> tuple[str, tuple[str, ...]]:
        run = make_run(
            tmp_path,
            TINY,
            model={"kind": "huggingface", "path": path},
            corpus={"kind": "files", "files": ["text/*.txt", "s3://bucket/a.jsonl", "/else/b.txt"]},
            activations={"sites": ["resid_post.1"]},
        )
        run = with_absolute_paths(run)
        assert run.model.kind == "huggingface"
        assert run.corpus.kind == "files"
        return run.model.path, tuple(run.corpus.files)

    path, files = placed("models/tiny")
    assert path == str(tmp_path / "models/tiny")
    assert files == (str(tmp_path / "text/*.txt"), "s3://bucket/a.jsonl", "/else/b.txt")
    assert placed("HuggingFaceTB/SmolLM2-135M")[0] == "HuggingFaceTB/SmolLM2-135M"
