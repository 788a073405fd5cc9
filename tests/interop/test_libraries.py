"""Exports in other libraries' own classes, and imports: 100,000 rows, every format and kind.

Run with --long: this installs the libraries into separate environments, shared with `bench peers`.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dist_sae.bench.peers.environments import Peer, ensure_environment
from dist_sae.config import Run
from dist_sae.errors import ConfigError
from dist_sae.interop.export import export
from dist_sae.interop.foreign import read_dictionary, sae_section
from dist_sae.interop.importing import convert
from tests.interop.test_export import dense
from tests.interop.test_formats import BATCH, HELD, MLP, SCALES, infer, named, raw_rows, trained

ROWS = 100_000
PEERS = os.environ.get("DIST_SAE_PEERS", "~/.cache/dist_sae/peers")
LIBRARIES = {
    "sae_lens": Peer("sae-lens", "6.54.12", ""),
    "sparsify": Peer("eai-sparsify", "1.3.3", ""),
    "dictionary_learning": Peer("dictionary-learning", "0.1.0", "", removed=("torchvision",)),
    "sae_bench": Peer("sae-bench", "0.6.0", ""),
    "circuit_tracer": Peer("circuit-tracer", "0.5.0", ""),
}
KINDS = ("topk", "batchtopk", "matryoshka", "relu", "jumprelu", "jumprelu_tanh", "gated")
OF_SAE_LENS: list[tuple[str, dict[str, Any]]] = [
    *(("sae-lens", {"kind": kind}) for kind in KINDS),
    *(("sae-lens", {**BATCH, "skip": skip, **MLP}) for skip in (False, True)),
]
THEIRS = ("standard", "topk", "jumprelu", "gated", "transcoder", "jumprelu_transcoder")
"""Architectures that SAELens saves and that have a recipe here."""
NO_RECIPE = {"skip_transcoder": "skip connection", "jumprelu_skip_transcoder": "skip connection"}


class Found(NamedTuple):
    codes: NDArray[np.float64]
    y_hat: NDArray[np.float64]


def ask(library: str, jobs: Sequence[dict[str, str]], folder: Path) -> list[Found]:
    """Run jobs with a library in one process of its environment; return the results."""
    python = ensure_environment(LIBRARIES[library], Path(PEERS))
    for job in jobs:
        Path(job["out"]).mkdir(parents=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).parent / "library_codes.py"
    command = [str(python), str(script), library, str(folder / "jobs.json")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [Found(*(np.load(f"{j['out']}/{n}.npy") for n in ("codes", "y_hat"))) for j in jobs]


def check(ours: tuple[Any, Any], theirs: tuple[Any, Any], what: str) -> None:
    """Check that the same latents are active, and that x_hat agrees within 1e-5.

    Files are fp32, so a code that is barely above its threshold may be inactive on the other side.
    """
    (codes, y_hat), (their_codes, their_y_hat) = ours, theirs
    differ = (codes > 0) != (their_codes > 0)
    assert differ.sum() <= 1e-6 * (codes > 0).sum(), (what, int(differ.sum()))
    same = ~differ.any(1)
    error = np.abs(y_hat[same] - their_y_hat[same]).max() / np.abs(y_hat).max()
    assert error < 1e-5, (what, error)


CASES = [*OF_SAE_LENS, *HELD]


@pytest.mark.parametrize("library", list(LIBRARIES))
def test_libraries_compute_what_we_do(
    library: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    if not pytestconfig.getoption("--long"):
        pytest.skip("installs the library; needs --long")
    source = {"sae_bench": "dictionary-learning"}.get(library, library.replace("_", "-"))
    jobs, ours, names = [], [], []
    for number, (format_name, sae) in enumerate(CASES):
        if format_name != source:
            continue
        place = tmp_path / str(number)
        run, dictionary, normalisers = trained(place, sae)
        x = raw_rows(run, ROWS)
        np.save(place / "rows.npy", x)
        folder = export(run, format_name=format_name)
        jobs.append({"folder": folder, "rows": f"{place}/rows.npy", "out": f"{place}/out"})
        ours.append(infer(dictionary, normalisers, x))
        names.append(f"{library} {named(sae)}")
        if _has_no_way_back(format_name, sae):
            continue
        found = read_dictionary(Path(folder))
        back = Run.model_validate(run.model_dump() | {"sae": sae_section(found, run, Path(folder))})
        scales = ([SCALES[site] for site in sites] for sites in (run.reads, run.writes))
        again = infer(convert(back, found, *scales).double(), normalisers, x)
        check(ours[-1], again, f"{names[-1]}, imported")
    for one, theirs, name in zip(ours, ask(library, jobs, tmp_path), names, strict=True):
        check(one, theirs, name)


def _has_no_way_back(format_name: str, sae: dict[str, Any]) -> bool:
    """Return whether the export cannot be imported: no recipe has both thresholds and a skip."""
    return bool(sae.get("skip")) and format_name != "sparsify"


def test_dictionaries_that_saelens_saves_are_read(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    if not pytestconfig.getoption("--long"):
        pytest.skip("installs the library; needs --long")
    run, _, _ = trained(tmp_path / "sae", {"kind": "topk"})
    other, _, _ = trained(tmp_path / "transcoder", {**BATCH, **MLP})
    x = raw_rows(run, ROWS)
    np.save(tmp_path / "rows.npy", x)
    jobs = [
        {"make": name, "folder": f"{tmp_path}/{name}", "rows": f"{tmp_path}/rows.npy"}
        | {"out": f"{tmp_path}/{name}-out"}
        for name in (*THEIRS, *NO_RECIPE)
    ]
    answers = dict(zip((*THEIRS, *NO_RECIPE), ask("sae_lens", jobs, tmp_path), strict=True))
    for name, theirs in answers.items():
        of = other if "transcoder" in name else run
        folder = tmp_path / name
        if name in NO_RECIPE:
            with pytest.raises(ConfigError, match=NO_RECIPE[name]):
                sae_section(read_dictionary(folder), of, folder)
            continue
        found = read_dictionary(folder)
        own = Run.model_validate(of.model_dump() | {"sae": sae_section(found, of, folder)})
        scales = [[SCALES[site] for site in sites] for sites in (of.reads, of.writes)]
        dictionary = convert(own, found, *scales).double()
        (in_scale,), (out_scale,) = scales
        rows = in_scale * np.load(tmp_path / "rows.npy")
        check(_computed(dictionary, rows, out_scale), theirs, name)


def _computed(dictionary: Any, rows: Any, out_scale: float) -> tuple[Any, Any]:
    tensor = torch.from_numpy(rows)
    codes = dictionary.encode(tensor)
    y_hat = dictionary.decode(codes, tensor).detach().numpy() / out_scale
    return dense(codes, dictionary.n_latents), y_hat
