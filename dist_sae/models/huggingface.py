"""`transformers` models, cut open with hooks; the only module that talks to transformers."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from dist_sae.config.data import HuggingFaceModel
from dist_sae.errors import ModelError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Where blocks keep their parts, over the common architectures; the first path that exists counts.
_MLP_IN = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "intermediate")
# in BLOOM and BERT the whole part adds the residual; its last product does not
_MLP_OUT = ("mlp.dense_4h_to_h", "output.dense", "mlp", "feed_forward", "ffn", "block_sparse_moe")
_ATTENTION_OUTPUT = tuple(
    f"{attention}.{projection}"
    for attention in (
        *("self_attn", "attn", "attention", "self_attention"),
        *("attn.attention", "attention.output"),  # GPT-Neo, BERT
    )
    for projection in ("o_proj", "c_proj", "out_proj", "dense", "wo", "out_lin")
)

Edit = Callable[[Float[Tensor, "batch seq d_in"]], Float[Tensor, "batch seq d_in"]]

# unused weights are expected: upper layers are left out
transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


class _HuggingFaceTokenizer:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.bos: int | None = tokenizer.bos_token_id
        if self.bos is None:
            self.bos = tokenizer.cls_token_id  # encoders
        self.special = frozenset(tokenizer.all_special_ids)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def text(self, tokens: Sequence[int]) -> list[str]:
        return [str(self._tokenizer.decode([token])) for token in tokens]


def load_tokenizer(config: HuggingFaceModel) -> _HuggingFaceTokenizer:
    """The model's own tokenizer."""
    with _errors(config):
        return _HuggingFaceTokenizer(
            transformers.AutoTokenizer.from_pretrained(config.path, revision=config.revision)
        )


def describe(config: HuggingFaceModel, sites: tuple[str, ...]) -> Any:
    """The model's own configuration, once it is known to have the layers of `sites`."""
    with _errors(config):
        description = transformers.AutoConfig.from_pretrained(config.path, revision=config.revision)
    depth = description.get_text_config().num_hidden_layers
    for site in sites:
        if _layer(site) >= depth:
            raise ModelError(
                f"activations.sites: {site}: {config.path} has layers 0 to {depth - 1}"
            )
    return description


class HuggingFaceSource:
    """The layers up to the deepest site, with a hook at each site."""

    def __init__(self, config: HuggingFaceModel, sites: tuple[str, ...]) -> None:
        description = describe(config, sites)
        with _errors(config):
            _cut(description.get_text_config(), 1 + max(map(_layer, sites)))
            self._model = _load(transformers.AutoModel, config, description)
        self._seen: dict[str, Tensor] = {}
        for site in sites:
            _attach(self._model, site, self._record(site))

    @torch.inference_mode()
    def run(
        self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> dict[str, Float[Tensor, "batch seq d_in"]]:
        self._seen.clear()
        self._model(**_inputs(self._model, tokens, mask))
        return {site: acts.cpu() for site, acts in self._seen.items()}

    def _record(self, site: str) -> Edit:
        def record(acts: Tensor) -> Tensor:
            self._seen[site] = acts.detach()
            return acts

        return record


class SplicedModel:
    """The whole causal model, with the activations at one site replaced on their way."""

    def __init__(self, config: HuggingFaceModel, site: str) -> None:
        description = describe(config, (site,))
        with _errors(config):
            self._model = _load(transformers.AutoModelForCausalLM, config, description)
        self._edit: Edit | None = None
        _attach(self._model, site, self._replace)

    @torch.inference_mode()
    def losses(
        self,
        tokens: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
        edit: Edit | None = None,
    ) -> Float[Tensor, "batch next"]:
        """Cross-entropy in nats of every next token, fp32; NaN where the next token is padding.

        Args:
            tokens: Token ids.
            mask: False at padding.
            edit: What becomes of the activations at the site; None leaves them alone.
        """
        self._edit = edit
        logits = self._model(**_inputs(self._model, tokens, mask)).logits[:, :-1].cpu()
        losses = [  # one context after the other: fp32 logits of a batch would be large
            nn.functional.cross_entropy(of_context.float(), targets, reduction="none")
            for of_context, targets in zip(logits, tokens[:, 1:].long(), strict=True)
        ]
        return torch.stack(losses).masked_fill(~mask[:, 1:], torch.nan)

    def _replace(self, acts: Tensor) -> Tensor:
        return acts if self._edit is None else self._edit(acts.cpu()).to(acts.device)


def _inputs(model: Any, tokens: Tensor, mask: Tensor) -> dict[str, Tensor | None]:
    """What a model is called with, where it is; without padding it needs no mask."""
    attention_mask = None if mask.all() else mask.long().to(model.device)
    return {"input_ids": tokens.long().to(model.device), "attention_mask": attention_mask}


def _load(kind: Any, config: HuggingFaceModel, description: Any) -> Any:
    description.get_text_config().use_cache = False  # nothing is generated
    model, loading = kind.from_pretrained(
        config.path,
        revision=config.revision,
        config=description,
        dtype=DTYPES[config.dtype],
        output_loading_info=True,
    )
    # transformers would go on with random ones; a pooler above the layers is no loss
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ModelError(
            f"model.path {config.path}: its files lack the weights {', '.join(missing)}"
        )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _layer(site: str) -> int:
    return int(site.rpartition(".")[2])


def _cut(description: Any, layers: int) -> None:
    """Make the configuration describe the first `layers` layers only."""
    description.num_hidden_layers = layers
    if getattr(description, "layer_types", None) is not None:
        description.layer_types = description.layer_types[:layers]


def _attach(model: nn.Module, site: str, edit: Edit) -> None:
    """Hook `edit` in at `site`: it sees the activations and what it returns goes on."""
    name, _, _ = site.rpartition(".")
    layer = _layers(model)[_layer(site)]
    match name:
        case "resid_pre":
            _edit_input(layer, edit)
        case "resid_post":
            _edit_output(layer, edit)
        case "mlp_in":
            _edit_input(_part(layer, _MLP_IN, site), edit)
        case "mlp_out":
            _edit_output(_part(layer, _MLP_OUT, site), edit)
        case "attn_out":
            _edit_output(_part(layer, _ATTENTION_OUTPUT, site), edit)
        case "attn_z":
            _edit_input(_part(layer, _ATTENTION_OUTPUT, site), edit)
        case _:
            raise ModelError(f"activations.sites: {site}: a language model has no such site")


def _layers(model: nn.Module) -> nn.ModuleList:
    """The stack of blocks: the outermost list with one entry per hidden layer."""
    depth = model.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]
    for _, module in sorted(model.named_modules(), key=lambda item: item[0].count(".")):
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ModelError(
        f"{type(model).__name__}: no list of {depth} layers found; this architecture is not known"
    )


def _part(layer: nn.Module, paths: tuple[str, ...], site: str) -> nn.Module:
    for path in paths:
        with contextlib.suppress(AttributeError):
            return layer.get_submodule(path)
    found = ", ".join(name for name, _ in layer.named_children())
    raise ModelError(
        f"activations.sites: {site}: {type(layer).__name__} keeps no such part under a known name "
        f"(it has {found}); use resid_pre or resid_post"
    )


def _edit_input(module: nn.Module, edit: Edit) -> None:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": edit(kwargs["hidden_states"])}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _edit_output(module: nn.Module, edit: Edit) -> None:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    module.register_forward_hook(hook)


@contextlib.contextmanager
def _errors(config: HuggingFaceModel) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as exc:
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise ModelError(f"model.path {config.path}: cannot be loaded: {reason}") from exc
