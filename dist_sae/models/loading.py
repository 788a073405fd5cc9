"""Loading of models and tokenizers with `transformers`."""

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import torch
import torch.distributed as dist
import transformers
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from dist_sae.config.data import HuggingFaceModel
from dist_sae.device import moved, own_device
from dist_sae.errors import HubUnavailableError, LacksWeightsError, ModelError
from dist_sae.hub import is_unavailable
from dist_sae.models.sharding import Divider, choose_divider
from dist_sae.models.sites import blocks
from dist_sae.models.sites import place as place_at
from dist_sae.precision import warn_if_emulated
from dist_sae.storage.model_files import name_or_path

logger = logging.getLogger(__name__)

_INCOMPLETE = "\ufffd"  # an incomplete character decodes to this
_MAX_TOKENS_OF_CHARACTER = 6  # maximum number of tokens that together form one character
_CACHED_TEXTS = 2**17  # size of the cache of decoded texts; decoding again takes 20 times as long

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_ERRORS = (OSError, ValueError, LookupError, ImportError, RuntimeError, TypeError, AttributeError)
"""Exceptions that transformers raises for a model that it cannot load or run."""
HEADS = (
    (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, False),
    (transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, False),
    (transformers.MODEL_FOR_MASKED_LM_MAPPING, True),
)
"""Mappings from configurations to models with a token head. True if these predict masked tokens."""
_NO_SAFETENSORS = "file named model.safetensors"  # in transformers' errors, for folders and the hub
_POST_NORM = re.compile(r"post_(feedforward|mlp)_.*norm")  # Gemma 2 and 3, OLMo 2, GLM 4
_LOST_RANK = re.compile(r"gloo|nccl|connection closed by peer|connection reset", re.IGNORECASE)

# transformers would warn of unused weights, which are expected: upper layers are left out
transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


class _HuggingFaceTokenizer:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.bos: int | None = tokenizer.bos_token_id
        if self.bos is None:
            self.bos = tokenizer.cls_token_id  # in encoders
        self.mask: int | None = tokenizer.mask_token_id
        """Id of the mask token of an encoder, or None."""
        self.special = frozenset(tokenizer.all_special_ids)
        self._decode = lru_cache(_CACHED_TEXTS)(lambda *ids: str(tokenizer.decode(list(ids))))

    @property
    def ordinary(self) -> list[int]:
        """Ids of ordinary text, ascending. Excludes added tokens, which text may never contain."""
        added = self._tokenizer.added_tokens_encoder
        return sorted(i for token, i in self._tokenizer.get_vocab().items() if token not in added)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def text(self, tokens: Sequence[int]) -> list[str]:
        texts: list[str] = []
        while (at := len(texts)) < len(tokens):
            piece, n = self._decode(tokens[at]), 1
            if _INCOMPLETE in piece:
                most = min(_MAX_TOKENS_OF_CHARACTER, len(tokens) - at)
                starts = (tokens[at : at + n] for n in range(2, most + 1))
                whole = (start for start in starts if _INCOMPLETE not in self._decode(*start))
                together = next(whole, tokens[at : at + 1])
                piece, n = self._decode(*together), len(together)
            texts += [piece, *(n - 1) * [""]]
        return texts


def load_tokenizer(config: HuggingFaceModel) -> _HuggingFaceTokenizer:
    """Load the model's own tokenizer."""
    with errors_of(config):
        return _HuggingFaceTokenizer(load_plain_tokenizer(config))


def load_plain_tokenizer(config: HuggingFaceModel) -> Any:
    """Load the model's own tokenizer as a `transformers` object."""
    with errors_of(config):
        place = name_or_path(config, weights=False)
        return transformers.AutoTokenizer.from_pretrained(place, revision=config.revision)


class Description(NamedTuple):
    """A model without its weights."""

    config: Any
    """The model's own configuration."""
    skeleton: Any
    """The whole model without a head, on the meta device."""

    vocabulary: int
    """Number of token ids with an embedding."""


def describe(config: HuggingFaceModel, sites: tuple[str, ...]) -> Description:
    """Describe a model, and check that it has the sites and can be divided over the ranks.

    Raises:
        ModelError: The model lacks a site, cannot be divided, or cannot be described.
    """
    with errors_of(config):
        place = name_or_path(config, weights=False)
        own = transformers.AutoConfig.from_pretrained(place, revision=config.revision)
        if own.is_encoder_decoder:
            raise ModelError(
                f"model.path {config.path}: {own.model_type} is an encoder-decoder, which needs "
                f"two texts; use a decoder or an encoder"
            )
        own.get_text_config().use_cache = False  # no text is generated
        own.output_attentions = False  # True selects another attention, which is wrong in Falcon
        # None lets transformers choose. Eager attention adds Falcon's ALiBi twice.
        own._attn_implementation = None  # noqa: SLF001
        with torch.device("meta"):
            skeleton = transformers.AutoModel.from_config(own)  # type: ignore[no-untyped-call]
        for site in sites:
            place_at(skeleton, site)
        vocabulary = len(skeleton.get_input_embeddings().weight)
    if config.tensor_parallel > 1:
        choose_divider(config, own)
    return Description(own, skeleton, vocabulary)


def has_post_norms(config: HuggingFaceModel) -> bool | None:
    """Return whether layers normalize the outputs of attention and MLP before adding them.

    Returns:
        None if the model's configuration is not on this machine.
    """
    how = {"revision": config.revision, "local_files_only": True}
    try:
        own = transformers.AutoConfig.from_pretrained(name_or_path(config, weights=False), **how)
    except OSError:
        return None
    with torch.device("meta"):
        skeleton = transformers.AutoModel.from_config(own)  # type: ignore[no-untyped-call]
    return any(map(_POST_NORM.match, dict(blocks(skeleton)[0].named_children())))


def check_tokens(tokens: Int[Tensor, "batch seq"], vocabulary: int, name: str) -> None:
    """Raise `ModelError` for a token without an embedding, which would crash a GPU."""
    if int(tokens.max()) >= vocabulary:
        raise ModelError(
            f"model.path {name}: the tokenizer produces token {int(tokens.max())}, but the model "
            f"has embeddings for 0 to {vocabulary - 1}; use the model's own tokenizer"
        )


def inputs(model: Any, tokens: Tensor, mask: Tensor) -> dict[str, Tensor | None]:
    """Build a model's arguments on its device. Without padding, the mask is None."""
    attention_mask = None if mask.all() else moved(mask, model.device).long()
    return {"input_ids": moved(tokens, model.device).long(), "attention_mask": attention_mask}


def load(
    model_class: Any,
    config: HuggingFaceModel,
    description: Description,
    divider: Divider | None = None,
) -> Any:
    """Load a model onto its device. For DeepSpeed, map it from its files in their precision.

    Raises:
        ModelError: The files are not safetensors. Pickles are refused, because reading one can run
            any code.
        LacksWeightsError: The files lack some of the weights.
    """
    device = own_device()
    warn_if_emulated("model.dtype", config.dtype, device)
    how: dict[str, Any] = {"dtype": DTYPES[config.dtype]}
    if divider == "transformers":
        how |= {
            "tp_plan": "auto",
            "device_mesh": init_device_mesh(device.type, (config.tensor_parallel,)),
        }
    elif divider == "deepspeed":
        how = {"dtype": "auto"}
    model, loading = model_class.from_pretrained(
        name_or_path(config, weights=True),
        revision=config.revision,
        config=description.config,
        output_loading_info=True,
        use_safetensors=True,
        **how,
    )
    # transformers gives missing weights random values. A pooler above the layers is not needed.
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise LacksWeightsError(config.path, missing)
    return model.eval().to(device) if divider is None else model.eval()


def without_layers(model_class: type[Any], *, above: int) -> type[Any]:
    """Derive a model class whose layers above `above` have no weights, so that none are read.

    Everything else follows the unchanged configuration, so the remaining layers compute the same.
    """

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        left_out: Any = blocks(self)[above + 1 :]
        for module in (m for layer in left_out for m in layer.modules()):
            module._is_hf_initialized = True  # noqa: SLF001 - else it is initialised at random
            for name, _ in list(module.named_parameters(recurse=False)):
                setattr(module, name, None)
        here = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        self.all_tied_weights_keys = {
            name: to for name, to in self.all_tied_weights_keys.items() if {name, to} <= here
        }

    # transformers uses the names of classes and modules
    return type(
        model_class.__name__,
        (model_class,),
        {"__init__": init, "__module__": model_class.__module__},
    )


def buffers_of(
    model: nn.Module, own: Any, dtype: torch.dtype, model_class: Any = None
) -> dict[str, Tensor]:
    """Return a model's buffers as if it was built in `dtype`. Buffers from files are unchanged.

    Args:
        model: The model.
        own: The model's configuration.
        dtype: The precision.
        model_class: The model's class, if it has a head.
    """
    with accelerate.init_empty_weights(include_buffers=False):
        if model_class is None:
            made: Any = transformers.AutoModel.from_config(own, dtype=dtype)  # type: ignore[no-untyped-call]
        else:
            made = model_class._from_config(own, dtype=dtype)  # noqa: SLF001 - as AutoModel does
    rebuilt = dict(made.named_buffers())
    persistent = model.state_dict().keys()
    return {
        name: buffer if name in persistent else rebuilt[name]
        for name, buffer in model.named_buffers()
    }


@contextlib.contextmanager
def errors_of(config: HuggingFaceModel, what: str = "cannot be loaded") -> Iterator[None]:
    """Raise third-party exceptions about a model as ours, with a message of one line."""
    try:
        yield
    except (*_ERRORS, SafetensorError) as exc:
        if isinstance(exc, dist.DistError) or _LOST_RANK.search(str(exc)):
            raise  # a rank was lost; the model is fine
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        error = HubUnavailableError if is_unavailable(exc) else ModelError
        if error is ModelError and _NO_SAFETENSORS in reason:
            raise ModelError(
                f"model.path {config.path}: has no safetensors weights, and loading pickled ones "
                f"can run any code; if you trust them, convert them (from_pretrained, then "
                f"save_pretrained)"
            ) from exc
        if not (
            config.is_stored or Path(config.place).is_dir()
        ):  # transformers mentions only the hub
            reason = f"no such folder here, and on the model hub: {reason}"
        raise error(f"model.path {config.path}: {what}: {reason}") from exc
