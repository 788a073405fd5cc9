"""Tiny random models of eight architectures, compared with handwritten forward passes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor, nn

from dist_sae.config.data import SITE_NAMES, HuggingFaceModel
from dist_sae.errors import ModelError
from dist_sae.models.huggingface import HuggingFaceSource
from dist_sae.models.loading import load_tokenizer
from dist_sae.models.sites import blocks

LAYERS, D, HEADS, VOCABULARY = 3, 24, 4, 50
hf: Any = transformers  # transformers is only partly typed
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**COMMON, num_key_value_heads=2),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=D,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**COMMON),
    "bert": lambda: hf.BertConfig(**COMMON),
    "mistral": lambda: hf.MistralConfig(**COMMON, num_key_value_heads=2),
    "qwen3": lambda: hf.Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(
        **COMMON,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=2.0,
    ),
    "mixtral": lambda: hf.MixtralConfig(
        **COMMON, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    ),
}


def save_model(
    folder: Path,
    name: str,
    config: Any = None,
    dtype: torch.dtype = torch.float32,
    kind: Any = None,
) -> Path:
    torch.manual_seed(1)
    kind = kind or (hf.AutoModel if name == "bert" else hf.AutoModelForCausalLM)
    model = kind.from_config(config or CONFIGS[name]())
    for parameter in model.parameters():  # norms of ones and biases of zero would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, "?": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    if name == "bert":
        special = {"cls_token": "<s>", "pad_token": "</s>", "mask_token": "?"}
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HuggingFaceModel]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: HuggingFaceModel(path=str(save_model(folder / name, name)), dtype="fp32")
        for name in CONFIGS
    }


def random_tokens(*lengths: int) -> tuple[Tensor, Tensor]:
    """Return right-padded token ids and their mask."""
    generator = torch.Generator().manual_seed(sum(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(3, VOCABULARY, mask.shape, generator=generator, dtype=torch.int32)
    return tokens * mask, mask


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scalar: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """Compute softmax attention, from [batch, heads, seq, d_head] to [batch, seq, d]."""
    scores = q @ k.transpose(2, 3) / (scalar or q.shape[-1]) ** 0.5
    if cap is not None:
        scores = cap * (scores / cap).tanh()
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    z: Tensor = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return z


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply a rotary embedding to the first dimensions of every head."""
    n = cos.shape[-1]
    first, second = x[..., : n // 2], x[..., n // 2 : n]
    turned = x[..., :n] * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    return torch.cat([turned, x[..., n:]], -1)


def heads(x: Tensor, n: int = HEADS) -> Tensor:
    return x.view(*x.shape[:2], n, -1).transpose(1, 2)


def attention_of(
    attention: Any, x: Tensor, cos: Tensor, sin: Tensor, *, norms: bool = False, **how: float
) -> Tensor:
    """Compute grouped-query attention with two key-value heads, and concatenate the heads."""
    q, k = heads(attention.q_proj(x)), heads(attention.k_proj(x), 2)
    if norms:
        q, k = attention.q_norm(q), attention.k_norm(k)
    v = heads(attention.v_proj(x), 2).repeat_interleave(2, 1)
    k = rotate(k, cos, sin).repeat_interleave(2, 1)
    return attend(rotate(q, cos, sin), k, v, causal=True, **how)


def hand_llama(model: Any, tokens: Tensor, *, norms: bool = False) -> list[dict[str, Tensor]]:
    x = model.embed_tokens(tokens)
    cos, sin = model.rotary_emb(x, torch.arange(tokens.shape[1])[None])
    sites = []
    for layer in model.layers:
        here = {"resid_pre": x}
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        here["attn_z"] = attention_of(attention, normed, cos, sin, norms=norms)
        here["attn_out"] = attention.o_proj(here["attn_z"])
        x = x + here["attn_out"]
        here["mlp_in"] = normed = layer.post_attention_layernorm(x)
        gate = nn.functional.silu(layer.mlp.gate_proj(normed))
        here["mlp_inner"] = gate * layer.mlp.up_proj(normed)
        here["mlp_out"] = layer.mlp.down_proj(here["mlp_inner"])
        here["resid_post"] = x = x + here["mlp_out"]
        sites.append(here)
    return sites


def hand_qwen3(model: Any, tokens: Tensor) -> list[dict[str, Tensor]]:
    """Compute Qwen3's sites: Llama with a norm over each head of q and k."""
    return hand_llama(model, tokens, norms=True)


def hand_gemma2(model: Any, tokens: Tensor) -> list[dict[str, Tensor]]:
    """Compute Gemma 2's sites: norms before and after attention and MLP, and capped scores."""
    x = model.embed_tokens(tokens)  # embed_tokens also scales the embeddings
    cos, sin = model.rotary_emb(x, torch.arange(tokens.shape[1])[None])
    sites = []
    for layer in model.layers:
        here = {"resid_pre": x}
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        here["attn_z"] = attention_of(attention, normed, cos, sin, scalar=5, cap=2.0)
        here["attn_out"] = attention.o_proj(here["attn_z"])
        x = x + layer.post_attention_layernorm(here["attn_out"])
        here["mlp_in"] = normed = layer.pre_feedforward_layernorm(x)
        gate = nn.functional.gelu(layer.mlp.gate_proj(normed), approximate="tanh")
        here["mlp_inner"] = gate * layer.mlp.up_proj(normed)
        here["mlp_out"] = layer.mlp.down_proj(here["mlp_inner"])
        here["resid_post"] = x = x + layer.post_feedforward_layernorm(here["mlp_out"])
        sites.append(here)
    return sites


def hand_mixtral(model: Any, tokens: Tensor) -> list[dict[str, Tensor]]:
    """Compute Mixtral's sites: Llama's attention, and two of four experts for each token."""
    x = model.embed_tokens(tokens)
    cos, sin = model.rotary_emb(x, torch.arange(tokens.shape[1])[None])
    sites = []
    for layer in model.layers:
        here = {"resid_pre": x}
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        here["attn_z"] = attention_of(attention, normed, cos, sin)
        here["attn_out"] = attention.o_proj(here["attn_z"])
        x = x + here["attn_out"]
        here["mlp_in"] = normed = layer.post_attention_layernorm(x)
        shares = (normed @ layer.mlp.gate.weight.T).softmax(-1)
        least = shares.topk(2, dim=-1).values[..., -1:]
        shares = shares * (shares >= least)
        shares = shares / shares.sum(-1, keepdim=True)
        out = torch.zeros_like(normed)
        for expert in range(4):
            gate, up = (normed @ layer.mlp.experts.gate_up_proj[expert].T).chunk(2, -1)
            hidden = nn.functional.silu(gate) * up
            out += shares[..., expert, None] * (hidden @ layer.mlp.experts.down_proj[expert].T)
        here["mlp_out"] = out
        here["resid_post"] = x = x + out
        sites.append(here)
    return sites


def hand_gpt2(model: Any, tokens: Tensor) -> list[dict[str, Tensor]]:
    x = model.wte(tokens) + model.wpe(torch.arange(tokens.shape[1]))
    sites = []
    for layer in model.h:
        here = {"resid_pre": x}
        normed = layer.ln_1(x)
        q, k, v = map(
            heads, (normed @ layer.attn.c_attn.weight + layer.attn.c_attn.bias).split(D, 2)
        )
        here["attn_z"] = attend(q, k, v, causal=True)
        here["attn_out"] = here["attn_z"] @ layer.attn.c_proj.weight + layer.attn.c_proj.bias
        x = x + here["attn_out"]
        here["mlp_in"] = normed = layer.ln_2(x)
        here["mlp_inner"] = hidden = nn.functional.gelu(
            normed @ layer.mlp.c_fc.weight + layer.mlp.c_fc.bias, approximate="tanh"
        )
        here["mlp_out"] = hidden @ layer.mlp.c_proj.weight + layer.mlp.c_proj.bias
        here["resid_post"] = x = x + here["mlp_out"]
        sites.append(here)
    return sites


def hand_gpt_neox(model: Any, tokens: Tensor) -> list[dict[str, Tensor]]:
    """Compute GPT-NeoX's sites: attention and MLP of a block read the same residual stream."""
    x = model.embed_in(tokens)
    cos, sin = model.rotary_emb(x, torch.arange(tokens.shape[1])[None])
    sites = []
    for layer in model.layers:
        here = {"resid_pre": x}
        qkv = heads(layer.attention.query_key_value(layer.input_layernorm(x)))
        q, k, v = qkv.chunk(3, -1)
        here["attn_z"] = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, causal=True)
        here["attn_out"] = layer.attention.dense(here["attn_z"])
        here["mlp_in"] = normed = layer.post_attention_layernorm(x)
        here["mlp_inner"] = hidden = nn.functional.gelu(layer.mlp.dense_h_to_4h(normed))
        here["mlp_out"] = layer.mlp.dense_4h_to_h(hidden)
        here["resid_post"] = x = x + here["attn_out"] + here["mlp_out"]
        sites.append(here)
    return sites


def hand_bert(model: Any, tokens: Tensor) -> list[dict[str, Tensor]]:
    """Compute BERT's sites: norms come after the sums, and every token sees all others."""
    x = model.embeddings(tokens)
    sites = []
    for layer in model.encoder.layer:
        here = {"resid_pre": x}
        attention = layer.attention.self
        q, k, v = (heads(f(x)) for f in (attention.query, attention.key, attention.value))
        here["attn_z"] = attend(q, k, v, causal=False)
        here["attn_out"] = layer.attention.output.dense(here["attn_z"])
        here["mlp_in"] = x = layer.attention.output.LayerNorm(x + here["attn_out"])
        here["mlp_inner"] = nn.functional.gelu(layer.intermediate.dense(x))
        here["mlp_out"] = layer.output.dense(here["mlp_inner"])
        here["resid_post"] = x = layer.output.LayerNorm(x + here["mlp_out"])
        sites.append(here)
    return sites


HANDS: dict[str, Callable[[Any, Tensor], list[dict[str, Tensor]]]] = {
    "llama": hand_llama,
    "gpt2": hand_gpt2,
    "gpt_neox": hand_gpt_neox,
    "bert": hand_bert,
    "mistral": hand_llama,
    "qwen3": hand_qwen3,
    "gemma2": hand_gemma2,
    "mixtral": hand_mixtral,
}


def sites_of(name: str) -> tuple[str, ...]:
    """Return every site of every layer, without mlp_inner for experts, which have no single one."""
    names = [site for site in SITE_NAMES if (site, name) != ("mlp_inner", "mixtral")]
    return tuple(f"{site}.{layer}" for site in names for layer in range(LAYERS))


def whole(config: HuggingFaceModel) -> Any:
    return hf.AutoModel.from_pretrained(config.path).eval()


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_site_equals_a_run_by_hand(models: dict[str, HuggingFaceModel], name: str) -> None:
    tokens, mask = random_tokens(9, 9)
    expected = HANDS[name](whole(models[name]), tokens.long())
    sites = sites_of(name)
    found = HuggingFaceSource(models[name], sites).run(tokens, mask)
    assert set(found) == set(sites)
    for site in sites:
        kind, _, layer = site.rpartition(".")
        wanted = expected[int(layer)][kind]
        assert wanted.std() > 0.05  # so that 1e-5 is a small error
        torch.testing.assert_close(found[site].clone(), wanted, rtol=1e-5, atol=1e-5, msg=site)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_residual_sites_are_transformers_hidden_states(
    models: dict[str, HuggingFaceModel], name: str
) -> None:
    """Residual sites equal transformers' hidden states.

    The last hidden state is not compared, because it includes a final norm, which is not a site.
    """
    tokens, mask = random_tokens(7, 7)
    states = whole(models[name])(tokens.long(), output_hidden_states=True).hidden_states
    sites = tuple(f"{site}.{layer}" for site in ("resid_pre", "resid_post") for layer in range(2))
    found = HuggingFaceSource(models[name], sites).run(tokens, mask)
    for layer in range(2):
        assert torch.allclose(found[f"resid_pre.{layer}"], states[layer], atol=1e-5)
        assert torch.allclose(found[f"resid_post.{layer}"], states[layer + 1], atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(models: dict[str, HuggingFaceModel], name: str) -> None:
    sites = ("resid_post.2", "attn_z.1", "mlp_out.0")
    source = HuggingFaceSource(models[name], sites)
    tokens, mask = random_tokens(11, 4, 1)
    padded = source.run(tokens, mask)
    for row, n in enumerate((11, 4, 1)):
        alone = source.run(tokens[row : row + 1, :n], mask[row : row + 1, :n])
        for site in sites:
            assert torch.allclose(padded[site][row, :n], alone[site][0], atol=2e-5), site


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_above_the_deepest_site_have_no_weights_and_do_not_run(
    models: dict[str, HuggingFaceModel], name: str
) -> None:
    """Layers above the deepest site have no weights and do not run.

    The configuration still has the full number of layers, because some models use it in
    computations.
    """
    source = HuggingFaceSource(models[name], ("resid_post.0", "mlp_in.1"))
    layers = blocks(source.model)
    assert [bool(list(layer.parameters())) for layer in layers] == [True, True, False]
    assert source.model.config.num_hidden_layers == LAYERS
    layers[1].register_forward_hook(lambda *_: pytest.fail("the MLP of layer 1 has run"))
    source.run(*random_tokens(5))


def test_half_precision_is_used_when_asked_for(
    models: dict[str, HuggingFaceModel],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Half precision is used when set, with a warning if the CPU has no instructions for it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    config = models["llama"].model_copy(update={"dtype": "bf16"})
    acts = HuggingFaceSource(config, ("resid_post.1",)).run(*random_tokens(5))["resid_post.1"]
    exact = HuggingFaceSource(models["llama"], ("resid_post.1",)).run(*random_tokens(5))
    assert acts.dtype == torch.bfloat16
    error = (acts.float() - exact["resid_post.1"]).norm() / exact["resid_post.1"].norm()
    assert 0 < error < 0.02
    assert [r.getMessage()[:17] for r in caplog.records] == ["model.dtype: bf16"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_site_beyond_the_depth_is_an_error(
    models: dict[str, HuggingFaceModel], name: str
) -> None:
    with pytest.raises(ModelError, match=r"resid_post\.3: .* has layers 0 to 2"):
        HuggingFaceSource(models[name], ("resid_pre.0", "resid_post.3"))


def test_a_site_that_an_architecture_keeps_under_no_known_name_is_an_error(tmp_path: Path) -> None:
    """A site without a known module is an error.

    OPT has no module for its MLP, but its residual stream can be recorded.
    """
    config = hf.OPTConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=16,
        word_embed_proj_dim=8,
        max_position_embeddings=32,
    )
    hf.AutoModel.from_config(config).save_pretrained(tmp_path)
    model = HuggingFaceModel(path=str(tmp_path), dtype="fp32")
    with pytest.raises(ModelError, match=r"mlp_out\.0: OPTDecoderLayer .* use resid_pre"):
        HuggingFaceSource(model, ("mlp_out.0",))
    assert HuggingFaceSource(model, ("attn_z.0", "resid_post.1")).run(*random_tokens(4))


def message(error: pytest.ExceptionInfo[ModelError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "load", [lambda m: HuggingFaceSource(m, ("resid_post.0",)), load_tokenizer]
)
def test_a_path_without_a_model_is_one_line(
    tmp_path: Path, load: Callable[[HuggingFaceModel], object]
) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ModelError) as caught:
            load(HuggingFaceModel(path=str(path)))
        assert message(caught).startswith(f"model.path {path}: cannot be loaded: ")
        assert ("no such folder here" in message(caught)) == (path != tmp_path)


@pytest.mark.parametrize("damage", ["cut", "missing", "shape"])
def test_damaged_weights_are_one_line_and_never_random_ones(tmp_path: Path, damage: str) -> None:
    path = save_model(tmp_path / "m", "llama")
    weights = path / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        tensors = {n: t for n, t in load_safetensors(weights).items() if "layers.0.mlp.up" not in n}
        save_safetensors(tensors, weights)
    else:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 41}))
    with pytest.raises(ModelError) as caught:
        HuggingFaceSource(HuggingFaceModel(path=str(path)), ("resid_post.0",))
    assert message(caught).startswith(f"model.path {path}: ")
    if damage == "missing":
        assert "1 weights are missing (layers.0.mlp.up_proj.weight)" in str(caught.value)


def load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    return load(path.read_bytes())


def save_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save

    path.write_bytes(save(tensors, {"format": "pt"}))


def test_tilde_is_the_home_folder(
    models: dict[str, HuggingFaceModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(Path(models["llama"].path).parent))
    config = HuggingFaceModel(path="~/llama", dtype="fp32")
    assert load_tokenizer(config)(["w3"]) == [[3]]
    tokens, mask = random_tokens(5)
    site = ("resid_post.0",)
    (here,), (there,) = (
        HuggingFaceSource(model, site).run(tokens, mask).values()
        for model in (config, models["llama"])
    )
    assert torch.equal(here, there)


def test_the_tokenizer_adds_nothing_and_knows_special_tokens(
    models: dict[str, HuggingFaceModel],
) -> None:
    tokenizer = load_tokenizer(models["llama"])
    assert tokenizer(["w3 w40 </s> w5", "", "w6"]) == [[3, 40, 1, 5], [], [6]]
    assert (tokenizer.bos, tokenizer.special) == (0, frozenset({0, 1}))
    assert tokenizer.text([3, 40]) == ["w3", "w40"]


def test_a_token_is_decoded_once(
    models: dict[str, HuggingFaceModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, decoded = transformers.PreTrainedTokenizerBase, list[Any]()
    decode: Any = base.decode

    def noted(self: Any, ids: Any) -> Any:
        decoded.append(ids)
        return decode(self, ids)

    monkeypatch.setattr(base, "decode", noted)
    tokenizer = load_tokenizer(models["llama"])
    for _ in range(2):
        assert tokenizer.text([3, 40, 3]) == ["w3", "w40", "w3"]
    assert decoded == [[3], [40]]


def test_an_encoders_cls_stands_at_the_front(models: dict[str, HuggingFaceModel]) -> None:
    tokenizer = load_tokenizer(models["bert"])
    assert (tokenizer.bos, tokenizer.special) == (0, frozenset({0, 1, 2}))
