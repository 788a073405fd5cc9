"""Where a language model keeps its layers and their parts, and hooks at its sites."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from dist_sae.errors import ModelError

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

_OF_SEVERAL = 4  # dimensions of a residual stream of several

Edit = Callable[[Float[Tensor, "batch seq d_in"]], Float[Tensor, "batch seq d_in"]]


class Place(NamedTuple):
    """A site: what goes into a module, or what comes out."""

    module: nn.Module
    goes_in: bool


def layer_of(site: str) -> int:
    """The layer in a site's name."""
    return int(site.rpartition(".")[2])


def blocks(model: nn.Module) -> nn.ModuleList:
    """The stack of text layers.

    A vision tower may be as deep, and a list within a layer as long: the stack is within the
    module that has the text configuration, and holds the most parameters of all lists as long.

    Raises:
        ModelError: There is none.
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
            f"known"
        )
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))


def place(model: nn.Module, site: str) -> Place:
    """Where a site is.

    Raises:
        ModelError: The architecture has no such part under a known name, or too few layers.
    """
    name, _, _ = site.rpartition(".")
    if name not in _SITES:
        raise ModelError(f"activations.sites: {site}: a language model has no such site")
    layers = blocks(model)
    if layer_of(site) >= len(layers):
        raise ModelError(f"activations.sites: {site}: the model has layers 0 to {len(layers) - 1}")
    layer = layers[layer_of(site)]
    paths, goes_in = _SITES[name]
    return Place(_part(layer, paths, site) if paths else layer, goes_in)


def width(model: nn.Module, site: str) -> int:
    """Numbers in a row of a site."""
    text = model.config.get_text_config()  # type: ignore[operator, union-attr]
    name, _, _ = site.rpartition(".")
    if name in ("attn_z", "mlp_inner"):  # goes into a product; transformers' Conv1D is transposed
        weight = place(model, site).module.get_parameter("weight")
        return int(weight.shape[0 if hasattr(place(model, site).module, "nx") else 1])
    several = getattr(text, "altup_num_inputs", 1) if name.startswith("resid") else 1
    return int(text.hidden_size * several)


def attach(model: nn.Module, site: str, edit: Edit) -> None:
    """Hook `edit` in at `site`: it sees the activations and what it returns goes on.

    A residual stream of several (AltUp, hyper-connections) is seen as one that has them side by
    side.
    """
    module, goes_in = place(model, site)
    text = model.config.get_text_config()  # type: ignore[operator, union-attr]
    streams = 0 if hasattr(text, "altup_num_inputs") else 2  # the dimension that counts them

    def edited(acts: Any) -> Tensor:
        if not isinstance(acts, Tensor):
            raise ModelError(
                f"activations.sites: {site}: {type(module).__name__} has a {type(acts).__name__} "
                f"there and no activations; use another site"
            )
        if acts.dim() != _OF_SEVERAL:
            return edit(acts)
        beside = acts.movedim(streams, 2)
        flat = edit(beside.flatten(2))
        return flat.reshape(beside.shape).movedim(2, streams)

    def hook_in(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (edited(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": edited(kwargs.get("hidden_states"))}

    def hook_out(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return type(output)([edited(output[0]), *output[1:]])
        return edited(output)

    if goes_in:
        module.register_forward_pre_hook(hook_in, with_kwargs=True)
    else:
        module.register_forward_hook(hook_out)


def _part(layer: nn.Module, paths: tuple[str, ...], site: str) -> nn.Module:
    for path in paths:
        with contextlib.suppress(AttributeError):
            return layer.get_submodule(path)
    found = ", ".join(name for name, _ in layer.named_children())
    raise ModelError(
        f"activations.sites: {site}: {type(layer).__name__} keeps no such part under a known name "
        f"(it has {found}); use resid_pre or resid_post"
    )
