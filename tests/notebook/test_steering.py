"""Steering and ablation in transformers models, checked against hooks written by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_sae import DistSaeError, RawDictionary
from dist_sae.config.sae import TopKConfig
from dist_sae.models.sites import attach, width
from tests.dictionaries.recipes import make
from tests.models.test_huggingface import hf, random_tokens, save_model
from tests.notebook.raw import SITES, wrap

N, K = 48, 6
MODELS = ("llama", "gpt2", "gpt_neox")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: hf.AutoModelForCausalLM.from_pretrained(save_model(folder / name, name)).eval()
        for name in MODELS
    }


@pytest.fixture
def llama(models: dict[str, Any]) -> Any:
    return models["llama"]


def at(model: Any, site: str) -> RawDictionary:
    """Return a random dictionary of the site's width."""
    sae = make(TopKConfig(n_latents=N, k=K, auxk=0), torch.float32, d_in=width(model, site))
    return wrap(sae, site)


@torch.no_grad()
def logits(model: Any, tokens: Tensor, **more: Any) -> Tensor:
    found: Tensor = model(tokens.long(), **more).logits
    return found


def recorded(model: Any, site: str, tokens: Tensor) -> Tensor:
    """Return the activations at a site."""
    seen: list[Tensor] = []

    def record(acts: Tensor) -> Tensor:
        seen.append(acts)
        return acts

    handle = attach(model, site, record)
    logits(model, tokens)
    handle.remove()
    return seen[0]


def replaced(model: Any, site: str, tokens: Tensor, acts: Tensor) -> Tensor:
    """Return the logits with other activations at a site."""
    handle = attach(model, site, lambda _: acts)
    found = logits(model, tokens)
    handle.remove()
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("site", SITES)
def test_latents_are_removed_and_the_error_stays(
    models: dict[str, Any], name: str, site: str
) -> None:
    """Ablation computes x - sum a_i W_dec[i] and changes nothing else of x.

    The test computes it in fp64 from the dense codes.
    """
    model, site = models[name], f"{site}.1"
    dictionary = at(model, site)
    tokens, _ = random_tokens(9, 9)
    x = recorded(model, site, tokens)
    codes = dictionary.encode(x, dense=True)
    chosen = codes.sum((0, 1)).topk(4).indices
    contribution = codes[..., chosen].double() @ dictionary.W_dec[chosen].double()
    assert int((codes[..., chosen] > 0).sum()) > 4
    expected = replaced(model, site, tokens, (x - contribution).float())
    clean = logits(model, tokens)
    with dictionary.ablate(model, chosen):
        torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(clean, expected, atol=1e-2)
    assert torch.equal(logits(model, tokens), clean)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("site", SITES)
def test_what_is_not_active_changes_nothing_when_it_is_removed(
    models: dict[str, Any], name: str, site: str
) -> None:
    model, site = models[name], f"{site}.0"
    dictionary = at(model, site)
    tokens, _ = random_tokens(9, 9)
    clean = logits(model, tokens)
    codes = dictionary.encode(recorded(model, site, tokens), dense=True)
    silent = (codes.sum((0, 1)) == 0).nonzero()[:, 0]
    for latents in (silent[:0], silent):
        with dictionary.ablate(model, latents):
            assert torch.equal(logits(model, tokens), clean)
    with dictionary.steer(model, 0, 0.0):
        assert torch.equal(logits(model, tokens), clean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_as_well(tmp_path: Path, dtype: torch.dtype) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "m", "llama")).to(dtype)
    dictionary = at(model, "resid_post.1")
    tokens, _ = random_tokens(9, 9)
    clean = logits(model, tokens)
    with dictionary.ablate(model, []):
        assert torch.equal(logits(model, tokens), clean)
    with dictionary.steer(model, 3, 50.0):
        assert logits(model, tokens).dtype == dtype
        assert not torch.equal(logits(model, tokens), clean)


@pytest.mark.parametrize("site", SITES)
def test_steering_adds_a_decoder_row(llama: Any, site: str) -> None:
    site = f"{site}.1"
    dictionary = at(llama, site)
    tokens, _ = random_tokens(9, 9)
    x = recorded(llama, site, tokens)
    expected = replaced(llama, site, tokens, x + 7.5 * dictionary.W_dec[5])
    with dictionary.steer(llama, 5, 7.5):
        torch.testing.assert_close(logits(llama, tokens), expected, rtol=1e-4, atol=1e-4)


def test_clamping_sets_activations(llama: Any) -> None:
    """A latent is clamped whether it was active or not. Two nested blocks add up."""
    site = "resid_post.1"
    dictionary = at(llama, site)
    tokens, _ = random_tokens(9, 9)
    x = recorded(llama, site, tokens)
    acts = dictionary.encode(x, dense=True)
    change = (4.0 - acts[..., 5:6]) * dictionary.W_dec[5] + (1.0 - acts[..., 7:8]) * (
        dictionary.W_dec[7]
    )
    expected = replaced(llama, site, tokens, x + change)
    with dictionary.clamp(llama, {5: 4.0, 7: 1.0}):
        torch.testing.assert_close(logits(llama, tokens), expected, rtol=1e-4, atol=1e-4)
    both = replaced(llama, site, tokens, x + dictionary.W_dec[5] + 2 * dictionary.W_dec[7])
    with dictionary.steer(llama, 5, 1.0), dictionary.steer(llama, 7, 2.0):
        torch.testing.assert_close(logits(llama, tokens), both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("several", [True, False])
def test_only_marked_positions_change(llama: Any, *, several: bool) -> None:
    site = "resid_post.1"
    dictionary = at(llama, site)
    tokens, _ = random_tokens(9, 9)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[:, 4] = mask[0, 6] = True
    if not several:
        mask = mask[0]
    x = recorded(llama, site, tokens)
    expected = replaced(llama, site, tokens, x + 9.0 * mask[..., None] * dictionary.W_dec[5])
    with dictionary.steer(llama, 5, 9.0, mask):
        found = logits(llama, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[:, :4], logits(llama, tokens)[:, :4])
    with dictionary.ablate(llama, list(range(N)), torch.zeros_like(mask)):
        assert torch.equal(logits(llama, tokens), logits(llama, tokens))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("generated", [True, False])
@pytest.mark.parametrize("marked", [True, False])
def test_generation_step_by_step_is_that_of_whole_sequences(
    models: dict[str, Any], name: str, *, generated: bool, marked: bool
) -> None:
    """With a key-value cache, the hooks only see the new token, but positions still count from the
    start. The batch is also left-padded.
    """
    model = models[name]
    dictionary = at(model, "resid_post.1")
    tokens, _ = random_tokens(6, 6)
    attention = torch.ones(2, 6, dtype=torch.long)
    attention[1, :2] = 0
    positions = torch.tensor([0, 0, 1, 0, 1, 0]).bool() if marked else None
    found = []
    for use_cache in (True, False):
        with (
            dictionary.steer(model, 5, 20.0, positions, generated=generated),
            dictionary.ablate(model, [1, 2, 3, 4], positions, generated=generated),
        ):
            found.append(
                model.generate(
                    tokens.long(),
                    attention_mask=attention,
                    max_new_tokens=6,
                    do_sample=False,
                    use_cache=use_cache,
                    output_logits=True,
                    return_dict_in_generate=True,
                    eos_token_id=None,
                    pad_token_id=1,
                )
            )
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert found[0].sequences.shape == (2, 12)
    steps = [torch.stack(each.logits) for each in found]
    torch.testing.assert_close(*steps, rtol=1e-3, atol=1e-3)
    if marked:  # compare with one forward pass over the whole generated sequence
        whole = found[0].sequences[:1, :-1]
        mask = torch.cat([positions, torch.full((5,), generated)])[None]  # type: ignore[list-item]
        with (
            dictionary.steer(model, 5, 20.0, mask),
            dictionary.ablate(model, [1, 2, 3, 4], mask),
        ):
            at_once = logits(model, whole)[:, 5:]
        torch.testing.assert_close(steps[0][:, :1].transpose(0, 1), at_once, rtol=1e-3, atol=1e-3)


def test_gradients_pass_through(llama: Any) -> None:
    """The backward pass treats the added term as a constant."""
    site = "resid_post.1"
    dictionary = at(llama, site)
    tokens, _ = random_tokens(9, 9)
    inputs = llama.get_input_embeddings()(tokens.long()).detach()
    acts = dictionary.encode(recorded(llama, site, tokens), dense=True)
    delta = -acts[..., :4] @ dictionary.W_dec[:4]

    def gradient() -> Tensor:
        x = inputs.clone().requires_grad_()
        found: Tensor = torch.autograd.grad(llama(inputs_embeds=x).logits[..., 5].sum(), x)[0]
        return found

    handle = attach(llama, site, lambda x: x + delta)
    expected = gradient()
    handle.remove()
    with dictionary.ablate(llama, range(4)):
        torch.testing.assert_close(gradient(), expected, rtol=1e-3, atol=1e-3)


def hooks_of(model: Any) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks")  # torch has no public name for them
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_hooks_leave_with_their_block(llama: Any) -> None:
    """Hooks are also removed after an error, and a block that could not start leaves none."""
    dictionary = at(llama, "mlp_in.1")
    tokens, _ = random_tokens(6, 6)
    clean, before = logits(llama, tokens), hooks_of(llama)
    positions = torch.ones(3, 6, dtype=torch.bool)
    with dictionary.ablate(llama, 1, positions[:2]):
        assert hooks_of(llama) == before + 2
    assert hooks_of(llama) == before
    wrong = r"^positions: 3 sequences, but the model reads 2$"
    with pytest.raises(DistSaeError, match=wrong), dictionary.ablate(llama, 1, positions):
        logits(llama, tokens)
    with pytest.raises(KeyError), dictionary.steer(llama, 1, 2.0):
        raise KeyError
    assert hooks_of(llama) == before
    assert torch.equal(logits(llama, tokens), clean)


def test_mistakes_get_one_line(llama: Any) -> None:
    dictionary = at(llama, "mlp_inner.1")
    with pytest.raises(DistSaeError, match=r"^latent 48: the dictionary has latents 0 to 47$"):
        dictionary.steer(llama, N, 1.0)
    with pytest.raises(DistSaeError, match=r"^positions: give a boolean mask, \[seq\] or"):
        dictionary.ablate(llama, 1, torch.ones(6))
    other = wrap(dictionary.sae, "resid_post.1")
    with (
        pytest.raises(
            DistSaeError, match=r"^model: its activations at resid_post\.1 have width 24, "
        ),
        other.ablate(llama, 1),
    ):
        pass
    high = wrap(dictionary.sae, "mlp_inner.3")
    with pytest.raises(DistSaeError, match="the model has layers 0 to 2"), high.ablate(llama, 1):
        pass
    with (
        pytest.raises(DistSaeError, match=r"^model: Linear is not a transformers model; "),
        dictionary.ablate(torch.nn.Linear(2, 2), 1),
    ):
        pass
