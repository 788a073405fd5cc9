"""Dictionaries and runs for the tests of notebooks."""

import json
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.state import IDLE_ROWS
from dist_sae.config import Run
from dist_sae.config.fingerprint import run_fingerprint
from dist_sae.data.plan import load_plan
from dist_sae.data.work_queue import Worker
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.normaliser import Normaliser, SiteNormalisers
from dist_sae.notebook.dictionary import RawDictionary
from dist_sae.notebook.texts import TextReader
from dist_sae.producing.loop import produce
from dist_sae.producing.planner import plan
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry
from tests.dictionaries.recipes import CONFIGS, make, sae_rows
from tests.world import save

SCALE = 0.37
SCALES = {"resid_post.1": SCALE, "attn_out.0": 0.53}
SITES = ("resid_pre", "resid_post", "mlp_in", "mlp_inner", "mlp_out", "attn_out", "attn_z")
hf: Any = transformers


def no_reader() -> TextReader:
    raise AssertionError("no text is read")


def wrap(sae: Dictionary, site: str = "synthetic") -> RawDictionary:
    """Wrap a dictionary as if it was trained at a site."""
    reads = sae.config.reads or (site,)
    normalisers = normalised(sae, reads, sae.config.writes or reads, 1.0)
    idle = torch.zeros(sae.n_latents, dtype=torch.int64)
    return RawDictionary(sae, normalisers, 7, idle, no_reader)


def normalised(
    sae: Dictionary, reads: tuple[str, ...], writes: tuple[str, ...], mean: float
) -> SiteNormalisers:
    """Return normalizers with scale `SCALE` (0.53 at attn_out.0), for raw rows with this mean."""
    widths = zip(reads + writes, sae.widths.reads + sae.widths.writes, strict=True)
    means = {site: torch.full((width,), SCALE * mean).double() for site, width in widths}
    of = {site: Normaliser(SCALES.get(site, SCALE), m, 1.0, 1) for site, m in means.items()}
    return SiteNormalisers(reads, writes, of)


def of_kind(kind: str, dtype: torch.dtype = torch.float64) -> RawDictionary:
    return wrap(make(CONFIGS[kind], dtype))


def raw_rows(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 5 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def save_language_model(
    folder: Path,
    layers: int = 3,
    width: int = 24,
    texts: Sequence[str] = (),
    n_tokens: int = 0,
) -> Path:
    """Save a random Llama model whose tokens are bytes and, with `texts`, frequent pieces.

    Its tokenizer has a BOS.
    """
    torch.manual_seed(1)
    bytes_ = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({byte: i for i, byte in enumerate(bytes_)}, [])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    if texts:
        made.train_from_iterator(
            texts,
            tokenizers.trainers.BpeTrainer(
                vocab_size=n_tokens, initial_alphabet=bytes_, show_progress=False
            ),
        )
    n = made.get_vocab_size()
    config = hf.LlamaConfig(
        vocab_size=n + 2,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=n,
        eos_token_id=n + 1,
        pad_token_id=n + 1,
    )
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    made.add_special_tokens(["<s>", "</s>"])
    hf.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


def write_text(path: Path, documents: int, words: int) -> list[str]:
    """Write documents of random words as JSON lines, and return their texts."""
    chance = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    made = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(200)]
    texts = [" ".join(chance.choices(made, k=words)) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def language_run(folder: Path, model: Path, sae: dict[str, Any] | None = None) -> Run:
    """Make a run with activations of 60 documents and without a checkpoint."""
    topk = {"kind": "topk", "n_latents": 64, "k": 4, "auxk": 0}
    write_text(folder / "text.jsonl", documents=60, words=6)
    run = Run.model_validate(
        {
            "name": "language",
            "store": {"activations": str(folder / "a"), "runs": str(folder / "r")},
            "model": {"kind": "huggingface", "path": str(model), "dtype": "fp32"},
            "corpus": {"kind": "files", "files": [str(folder / "text.jsonl")]},
            "activations": {
                "sites": ["resid_post.1", "attn_out.0"],
                "streams": 2,
                "unit_rows": 300,
                "block_rows": 64,
                "context_tokens": 80,
                "heldout_share": 0.2,
                "dtype": "fp32",
                "exclude": {"over_norm": None},
            },
            "sae": sae or topk,
            "train": {"rows": 640, "batch_rows": 64, "site": None if sae else "resid_post.1"},
        }
    ).resolved()
    fill(run)
    return run


def fill(run: Run) -> None:
    """Produce a run's activation set."""
    plan(run)
    produce(run, Worker("p"), threading.Event(), Telemetry(run.name, "produce", None))


def initialised(run: Run, d_in: int, seed: int) -> Dictionary:
    sae = build_sae(run.sae, d_in)
    x = torch.randn(64, d_in, generator=torch.Generator().manual_seed(seed))
    sae.initialise(sae_rows(x), seed)
    return sae


def save_dictionary(run: Run, sae: Dictionary, step: int) -> None:
    """Save a dictionary as a checkpoint of the run, with its run file."""
    runs = open_store(run.store.runs)
    made = load_plan(open_store(run.store.activations), run)
    resolved = made.resolve(run)
    runs.put(f"{run.name}/run.yaml", json.dumps(resolved.model_dump(mode="json")).encode())
    scalars = normalised(sae, run.reads, run.writes, 0.125 / SCALE).to_scalars()
    scalars["plan"] = made.hash
    tensors = sae.state_dict() | {IDLE_ROWS: torch.zeros(sae.n_latents, dtype=torch.int64)}
    checkpoints = Checkpoints(runs, run.name, 5)
    save(checkpoints, step, tensors, scalars | {"run": run_fingerprint(resolved)})
