"""Modules of a language model at each site, and hooks on them."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dist_sae.config.data import layer_of
from dist_sae.errors import ModelError

# paths of modules within a block, in common architectures; the first existing path is used
_MLP_IN = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "intermediate")
_MLP_OUTPUT = (  # the output projection
    *("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "mlp.fc_out"),
    *("feed_forward.w2", "ffn.lin2", "output.dense"),
)
# in BLOOM and BERT, the MLP module adds the residual stream; its output projection does not
_MLP_OUT = ("mlp.dense_4h_to_h", "output.dense", "mlp", "feed_forward", "ffn", "block_sparse_moe")
_ATTENTION_OUTPUT = tuple(
    f"{attention}.{projection}"
    for attention in (
        *("self_attn", "attn", "attention", "self_attention"),
        *("attn.attention", "attention.output"),  # GPT-Neo, BERT
    )
    for projection in ("o_proj", "c_proj", "out_proj", "dense", "wo", "out_lin")
)

# (paths within the block, empty for the block itself; True if the site is the module's input)
_SITES: dict[str, tuple[tuple[str, ...], bool]] = {  # in the order of computation
    "resid_pre": ((), True),
    "attn_z": (_ATTENTION_OUTPUT, True),
    "attn_out": (_ATTENTION_OUTPUT, False),
    "mlp_in": (_MLP_IN, True),
    "mlp_inner": (_MLP_OUTPUT, True),
    "mlp_out": (_MLP_OUT, False),
    "resid_post": ((), False),
}

_MULTI_STREAM_DIMS = 4  # number of dimensions of activations with several residual streams

Edit = Callable[[Float[Tensor, "batch seq d_in"]], Float[Tensor, "batch seq d_in"]]


class Place(NamedTuple):
    """Where a site is: the input or the output of a module."""

    module: nn.Module
    is_input: bool


def depth(site: str) -> tuple[int, int]:
    """Return a sort key for sites: the order in which a model computes them."""
    return layer_of(site), list(_SITES).index(site.rpartition(".")[0])


def blocks(model: nn.Module) -> nn.ModuleList:
    """Find the stack of text layers.

    A vision tower can have the same number of layers, and a list within a layer the same length.
    So this takes, inside the module with the text configuration, the list of the right length that
    has the most parameters.

    Raises:
        ModelError: The model has no list of the right length.
    """
    text = model.config.get_text_config()  # type: ignore[operator, union-attr]
    depth = getattr(text, "num_hidden_layers", None)
    within = next(
        (m for m in model.modules() if type(getattr(m, "config", None)) is type(text)), model
    )
    stacks = [m for m in within.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not stacks:
        raise ModelError(
            f"{type(model).__name__}: no list of {depth} layers found; this architecture is not "
            f"supported"
        )
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))


def place(model: nn.Module, site: str) -> Place:
    """Find the module of a site.

    Raises:
        ModelError: The architecture has no such module under a known name, or too few layers.
    """
    name, _, _ = site.rpartition(".")
    if name not in _SITES:
        raise ModelError(f"activations.sites: {site}: language models have no such site")
    layers = blocks(model)
    if layer_of(site) >= len(layers):
        raise ModelError(f"activations.sites: {site}: the model has layers 0 to {len(layers) - 1}")
    layer = layers[layer_of(site)]
    paths, is_input = _SITES[name]
    return Place(_part(layer, paths, site) if paths else layer, is_input)


def width(model: nn.Module, site: str) -> int:
    """Return the width of a row at a site."""
    text = model.config.get_text_config()  # type: ignore[operator, union-attr]
    name, _, _ = site.rpartition(".")
    if name in ("attn_z", "mlp_inner"):  # a projection's input; Conv1D's weight is transposed
        weight = place(model, site).module.get_parameter("weight")
        return int(weight.shape[0 if hasattr(place(model, site).module, "nx") else 1])
    several = getattr(text, "altup_num_inputs", 1) if name.startswith("resid") else 1
    return int(text.hidden_size * several)


def attach(model: nn.Module, site: str, edit: Edit) -> RemovableHandle:
    """Hook `edit` into a site. It is called with the activations, and its result replaces them.

    Several residual streams (AltUp, hyper-connections) are concatenated.

    Returns:
        Handle that removes the hook.
    """
    module, is_input = place(model, site)
    text = model.config.get_text_config()  # type: ignore[operator, union-attr]
    streams = 0 if hasattr(text, "altup_num_inputs") else 2  # dimension of the streams

    def edited(acts: Any) -> Tensor:
        if not isinstance(acts, Tensor):
            raise ModelError(
                f"activations.sites: {site}: {type(module).__name__} has a {type(acts).__name__} "
                f"at this site instead of activations; use another site"
            )
        if acts.dim() != _MULTI_STREAM_DIMS:
            return edit(acts)
        rows = acts.movedim(streams, 2)
        flat = edit(rows.flatten(2))
        return flat.reshape(rows.shape).movedim(2, streams)

    def hook_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (edited(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": edited(kwargs.get("hidden_states"))}

    def hook_output(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return type(output)([edited(output[0]), *output[1:]])
        return edited(output)

    if is_input:
        return module.register_forward_pre_hook(hook_input, with_kwargs=True)
    return module.register_forward_hook(hook_output)


def _part(layer: nn.Module, paths: tuple[str, ...], site: str) -> nn.Module:
    for path in paths:
        with contextlib.suppress(AttributeError):
            return layer.get_submodule(path)
    found = ", ".join(name for name, _ in layer.named_children())
    raise ModelError(
        f"activations.sites: {site}: {type(layer).__name__} has no such module under a known name "
        f"(it has {found}); use resid_pre or resid_post"
    )
