"""`transformers` models, cut open with hooks; the only module that talks to transformers."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import torch
import torch.distributed as dist
import transformers
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from dist_sae.config.data import HuggingFaceModel
from dist_sae.errors import HubUnavailableError, ModelError
from dist_sae.hub import is_out_of_reach
from dist_sae.models.sharding import Divider, choose_divider, divide, gather
from dist_sae.precision import warn_if_emulated

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Where blocks keep their parts, over the common architectures; the first path that exists counts.
_MLP_IN = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "intermediate")
_MLP_OUTPUT = (  # the last product
    *("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "mlp.fc_out"),
    *("feed_forward.w2", "ffn.lin2", "output.dense"),
)
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

# (paths of the module within its block, or none for the block; whether what goes in is the site)
_SITES: dict[str, tuple[tuple[str, ...], bool]] = {
    "resid_pre": ((), True),
    "resid_post": ((), False),
    "mlp_in": (_MLP_IN, True),
    "mlp_inner": (_MLP_OUTPUT, True),
    "mlp_out": (_MLP_OUT, False),
    "attn_out": (_ATTENTION_OUTPUT, False),
    "attn_z": (_ATTENTION_OUTPUT, True),
}

_OF_RANKS = re.compile(r"gloo|nccl|connection closed by peer|connection reset", re.IGNORECASE)

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
        choose_divider(config, description)
    return description


class HuggingFaceSource:
    """The layers up to the deepest site, with a hook at each site."""

    def __init__(self, config: HuggingFaceModel, sites: tuple[str, ...]) -> None:
        description = describe(config, sites)
        with _errors(config):
            _cut(description.get_text_config(), 1 + max(map(_layer, sites)))
            divider = choose_divider(config, description) if config.shards > 1 else None
            self._model = _load(transformers.AutoModel, config, description, divider)
            self._widths = {}
            """Of sites that ranks may have parts of."""
            if divider is not None:
                logger.info("%s: held by %d ranks (%s)", config.path, config.shards, divider)
                for site in sites:
                    if site.startswith(("attn_z.", "mlp_inner.")):
                        weight = _place(self._model, site).module.get_parameter("weight")
                        self._widths[site] = weight.shape[1]  # of all parts
        if divider == "deepspeed":
            buffers = _buffers(self._model, description, DTYPES[config.dtype])
            self._model = divide(self._model, DTYPES[config.dtype], buffers)
        self._seen: dict[str, Tensor] = {}
        for site in sites:
            _attach(self._model, site, self._record(site))

    @torch.inference_mode()
    def run(
        self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> dict[str, Float[Tensor, "batch seq d_in"]]:
        self._seen = {}  # of a batch that did not fit
        self._model(**_inputs(self._model, tokens, mask))
        for site, width in self._widths.items():
            self._seen[site] = gather(self._seen[site], width)
        seen, self._seen = self._seen, {}
        return seen

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


def _load(
    kind: Any, config: HuggingFaceModel, description: Any, divider: Divider | None = None
) -> Any:
    """On its device; for DeepSpeed to divide, as it is in its files, which are only mapped."""
    description.get_text_config().use_cache = False  # nothing is generated
    device = "cuda" if torch.cuda.is_available() else "cpu"
    warn_if_emulated("model.dtype", config.dtype, torch.device(device))
    how: dict[str, Any] = {"dtype": DTYPES[config.dtype]}
    if divider == "transformers":
        how |= {"tp_plan": "auto", "device_mesh": init_device_mesh(device, (config.shards,))}
    elif divider == "deepspeed":
        how = {"dtype": "auto"}
    model, loading = kind.from_pretrained(
        config.path, revision=config.revision, config=description, output_loading_info=True, **how
    )
    # transformers would go on with random ones; a pooler above the layers is no loss
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ModelError(
            f"model.path {config.path}: its files lack the weights {', '.join(missing)}"
        )
    return model.eval().to(device) if divider is None else model.eval()


def _buffers(model: nn.Module, description: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Those of a model as it would be made in `dtype`; what files hold is as they hold it."""
    with accelerate.init_empty_weights(include_buffers=False):
        made: Any = transformers.AutoModel.from_config(description, dtype=dtype)  # type: ignore[no-untyped-call]
    anew = dict(made.named_buffers())
    persistent = model.state_dict().keys()
    return {
        name: buffer if name in persistent else anew[name] for name, buffer in model.named_buffers()
    }


def _layer(site: str) -> int:
    return int(site.rpartition(".")[2])


def _cut(description: Any, layers: int) -> None:
    """Make the configuration describe the first `layers` layers only."""
    description.num_hidden_layers = layers
    if getattr(description, "layer_types", None) is not None:
        description.layer_types = description.layer_types[:layers]


class _Place(NamedTuple):
    """Where a site is: what goes into a module, or what comes out."""

    module: nn.Module
    goes_in: bool


def _place(model: nn.Module, site: str) -> _Place:
    name, _, _ = site.rpartition(".")
    if name not in _SITES:
        raise ModelError(f"activations.sites: {site}: a language model has no such site")
    layer = _layers(model)[_layer(site)]
    paths, goes_in = _SITES[name]
    return _Place(_part(layer, paths, site) if paths else layer, goes_in)


def _attach(model: nn.Module, site: str, edit: Edit) -> None:
    """Hook `edit` in at `site`: it sees the activations and what it returns goes on."""
    module, goes_in = _place(model, site)

    def hook_in(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": edit(kwargs["hidden_states"])}

    def hook_out(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    if goes_in:
        module.register_forward_pre_hook(hook_in, with_kwargs=True)
    else:
        module.register_forward_hook(hook_out)


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


@contextlib.contextmanager
def _errors(config: HuggingFaceModel) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as exc:
        if isinstance(exc, dist.DistError) or _OF_RANKS.search(str(exc)):
            raise  # another rank is gone, which is no fault of the model
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        kind = HubUnavailableError if is_out_of_reach(exc) else ModelError
        if not Path(config.path).is_dir():  # transformers speaks of the hub alone
            reason = f"there is no such folder here, and as a name on the model hub: {reason}"
        raise kind(f"model.path {config.path}: cannot be loaded: {reason}") from exc
