"""`transformers` models, cut open with hooks; the only module that talks to transformers."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import transformers
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

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
    """The model's own configuration, once it is known to have the layers and to fit the ranks."""
    with _errors(config):
        description = transformers.AutoConfig.from_pretrained(config.path, revision=config.revision)
    depth = description.get_text_config().num_hidden_layers
    for site in sites:
        if _layer(site) >= depth:
            raise ModelError(
                f"activations.sites: {site}: {config.path} has layers 0 to {depth - 1}"
            )
    if config.shards > 1:
        _check_shards(config, description)
    return description


def _check_shards(config: HuggingFaceModel, description: Any) -> None:
    """Make sure that so many ranks can hold this architecture together, by transformers' own plan.

    Raises:
        ModelError: They cannot; the numbers that can are named.
    """
    text = description.get_text_config()
    name = description.model_type
    if not getattr(text, "base_model_tp_plan", None):
        raise ModelError(
            f"model.shards: {config.shards}: transformers has no plan to divide {name}; use 1"
        )
    heads = text.num_attention_heads
    parts = {"heads": heads, "key-value heads": getattr(text, "num_key_value_heads", None) or heads}
    for key in ("intermediate_size", "moe_intermediate_size"):
        if size := getattr(text, key, None):
            parts[key] = size
    fitting = [n for n in range(1, heads + 1) if not any(size % n for size in parts.values())]
    if config.shards not in fitting:
        sizes = ", ".join(f"{size} {part}" for part, size in parts.items())
        raise ModelError(
            f"model.shards: {config.shards} ranks cannot hold {config.path} together ({name} with "
            f"{sizes}); use one of {', '.join(map(str, fitting))}"
        )


class HuggingFaceSource:
    """The layers up to the deepest site, with a hook at each site."""

    def __init__(self, config: HuggingFaceModel, sites: tuple[str, ...]) -> None:
        description = describe(config, sites)
        with _errors(config):
            _cut(description.get_text_config(), 1 + max(map(_layer, sites)))
            self._model = _load(transformers.AutoModel, config, description, shards=config.shards)
        self._seen: dict[str, Tensor] = {}
        self._widths: dict[str, int] = {}
        """Of sites that ranks have parts of."""
        for site in sites:
            module = _attach(self._model, site, self._record(site))
            if site.startswith("attn_z.") and config.shards > 1:
                self._widths[site] = module.get_parameter("weight").shape[1]  # of all parts

    @torch.inference_mode()
    def run(
        self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> dict[str, Float[Tensor, "batch seq d_in"]]:
        self._seen.clear()
        self._model(**_inputs(self._model, tokens, mask))
        for site, width in self._widths.items():
            self._seen[site] = _whole(self._seen[site], width)
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


def _load(kind: Any, config: HuggingFaceModel, description: Any, *, shards: int = 1) -> Any:
    description.get_text_config().use_cache = False  # nothing is generated
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parallel: dict[str, Any] = {}
    if shards > 1:  # each rank reads its slices of the weights alone
        parallel = {"tp_plan": "auto", "device_mesh": init_device_mesh(device, (shards,))}
    model, loading = kind.from_pretrained(
        config.path,
        revision=config.revision,
        config=description,
        dtype=DTYPES[config.dtype],
        output_loading_info=True,
        **parallel,
    )
    # transformers would go on with random ones; a pooler above the layers is no loss
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ModelError(
            f"model.path {config.path}: its files lack the weights {', '.join(missing)}"
        )
    return model.eval() if shards > 1 else model.eval().to(device)


def _layer(site: str) -> int:
    return int(site.rpartition(".")[2])


def _cut(description: Any, layers: int) -> None:
    """Make the configuration describe the first `layers` layers only."""
    description.num_hidden_layers = layers
    if getattr(description, "layer_types", None) is not None:
        description.layer_types = description.layer_types[:layers]


def _attach(model: nn.Module, site: str, edit: Edit) -> nn.Module:
    """Hook `edit` in at `site`: it sees the activations and what it returns goes on.

    Returns:
        The module that it is hooked to.
    """
    name, _, _ = site.rpartition(".")
    layer = _layers(model)[_layer(site)]
    match name:
        case "resid_pre":
            return _edit_input(layer, edit)
        case "resid_post":
            return _edit_output(layer, edit)
        case "mlp_in":
            return _edit_input(_part(layer, _MLP_IN, site), edit)
        case "mlp_out":
            return _edit_output(_part(layer, _MLP_OUT, site), edit)
        case "attn_out":
            return _edit_output(_part(layer, _ATTENTION_OUTPUT, site), edit)
        case "attn_z":
            return _edit_input(_part(layer, _ATTENTION_OUTPUT, site), edit)
        case _:
            raise ModelError(f"activations.sites: {site}: a language model has no such site")


def _whole(acts: Tensor, width: int) -> Tensor:
    """Heads of all ranks, side by side, where a rank has seen only its own. Collective then."""
    if acts.shape[-1] == width:
        return acts
    parts = [torch.empty_like(acts) for _ in range(width // acts.shape[-1])]
    dist.all_gather(parts, acts.contiguous())
    return torch.cat(parts, dim=-1)


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


def _edit_input(module: nn.Module, edit: Edit) -> nn.Module:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": edit(kwargs["hidden_states"])}

    module.register_forward_pre_hook(hook, with_kwargs=True)
    return module


def _edit_output(module: nn.Module, edit: Edit) -> nn.Module:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    module.register_forward_hook(hook)
    return module


@contextlib.contextmanager
def _errors(config: HuggingFaceModel) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as exc:
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise ModelError(f"model.path {config.path}: cannot be loaded: {reason}") from exc
