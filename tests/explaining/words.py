"""A run on documents of eight words, in which each latent fires on known words.

Words have numbers. The embedding of word n is the n-th unit vector. The site is the embedding, so
an encoder row contains the latent's activation on each word. Each document is a separate passage.
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from dist_sae.config import Run
from dist_sae.dictionaries import build_sae
from tests.index.indexed import make_index
from tests.notebook.raw import SCALE, fill, save_dictionary

WORDS, WIDTH, LENGTH = 60, 64, 8
FIRES_ON: tuple[Mapping[int, float], ...] = (
    {10: 2.0, 11: 1.0},  # half of its passages contain only w10, the others only w11
    {12: 1.0},
    {10: 1.0, 13: 3.0},  # near latent 0; its passages without w10 and w11 are near misses of that
    {14: 1.0},  # too rare
    {},  # never fires
    dict.fromkeys(range(3, WORDS), 1.0),  # always fires
)
"""Activation of each latent on each word."""
hf: Any = transformers


def word(n: int) -> str:
    """Return word n, which the tokenizer does not split."""
    return f"w{chr(97 + n // 8)}{chr(97 + n % 8)}"


def number(text: str) -> int:
    """Return the number of a word."""
    return next(n for n in range(WORDS) if word(n) == text.strip())


def documents() -> list[list[int]]:
    """Return the documents' words: 30 with w10, 30 w11, 40 w12, 40 w13, 9 w14, 100 with w15."""
    chance = random.Random(0)
    of = [*[10] * 30, *[11] * 30, *[12] * 40, *[13] * 40, *[14] * 9, *[15] * 100]
    chance.shuffle(of)
    made = []
    for one in of:
        others = chance.choices(range(20, WORDS), k=LENGTH - 1)
        others.insert(chance.randrange(LENGTH), one)
        made.append(others)
    return made


def save_words_model(folder: Path) -> Path:
    config = hf.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    model.model.embed_tokens.weight.data.copy_(torch.eye(WORDS, WIDTH))
    model.save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, "?": 2} | {f"\u0120{word(n)}": n for n in range(3, WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = tokenizers.decoders.ByteLevel()
    hf.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


def words_run(folder: Path, **index: Any) -> Run:
    """Make an indexed run."""
    texts = [" ".join(map(word, document)) for document in documents()]
    (folder / "text.txt").write_text("\n".join(texts))
    run = Run.model_validate(
        {
            "name": "words",
            "store": {"activations": str(folder / "a"), "runs": str(folder / "r")},
            "model": {
                "kind": "huggingface",
                "path": str(save_words_model(folder / "model")),
                "dtype": "fp32",
            },
            "corpus": {
                "kind": "files",
                "files": [str(folder / "text.txt")],
                "txt_documents": "line",
            },
            "activations": {
                "sites": ["resid_pre.0"],
                "streams": 2,
                "unit_rows": 200,
                "context_tokens": 16,
                "heldout_share": 0.2,
                "dtype": "fp32",
                "exclude": {"over_norm": None},
            },
            "sae": {"kind": "relu", "n_latents": len(FIRES_ON)},
            "train": {"rows": 640, "batch_rows": 64},
            "index": index,
        }
    ).resolved()
    fill(run)
    sae = build_sae(run.sae, WIDTH)
    with torch.no_grad():
        for _, tensor in sae.tensors():
            tensor.zero_()
        for latent, on in enumerate(FIRES_ON):
            for n, act in on.items():
                sae.W_enc[latent, n] = act / SCALE
                sae.W_dec[latent, n] = act
        sae.W_dec[4, -1] = 1.0  # orthogonal to all other latents
    save_dictionary(run, sae, 7)
    make_index(run)
    return run
