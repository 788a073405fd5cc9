"""Tensor parallelism of `transformers` models over several ranks.

If heads and widths divide evenly, transformers' own plan is used, and each rank reads only its
slices. Otherwise, or if the model has no plan, DeepSpeed's AutoTP divides the model, if necessary
unevenly. AutoTP finds layers by name, so it is allowed only for architectures that were verified.
It slices weights that are memory-mapped from their files, so no rank has all of them in memory.
"""

import contextlib
import io
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_sae.config.data import HuggingFaceModel
from dist_sae.deepspeed import import_deepspeed
from dist_sae.errors import ModelError

Divider = Literal["transformers", "deepspeed"]

_AUTOTP = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi"),
        *("starcoder2", "gpt_neox", "gpt_neo", "gptj", "opt", "bert"),
    }
)


def choose_divider(config: HuggingFaceModel, description: Any) -> Divider:
    """Choose the library that divides a model over `config.tensor_parallel` ranks.

    Args:
        config: The model.
        description: The model's own configuration.

    Raises:
        ModelError: The model cannot be divided over this many ranks. The message lists the numbers
            of ranks that work.
    """
    text = description.get_text_config()
    name = description.model_type
    heads = getattr(text, "num_attention_heads", None) or 1
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    widths = [getattr(text, key, None) for key in ("intermediate_size", "moe_intermediate_size")]
    evenly = [
        n
        for n in range(2, heads + 1)
        if not any(size % n for size in (heads, kv_heads, *filter(None, widths)))
    ]
    able: dict[Divider, list[int]] = {
        "transformers": evenly if getattr(text, "base_model_tp_plan", None) else [],
        "deepspeed": list(range(2, kv_heads + 1)) if name in _AUTOTP else [],
    }
    for divider, numbers in able.items():
        if config.tensor_parallel in numbers:
            return divider
    if not any(able.values()):
        raise ModelError(
            f"model.tensor_parallel: {config.tensor_parallel}: neither transformers nor "
            f"DeepSpeed can divide {name}; use 1"
        )
    fitting = sorted({1, *able["transformers"], *able["deepspeed"]})
    raise ModelError(
        f"model.tensor_parallel: {config.path} cannot be divided over {config.tensor_parallel} "
        f"ranks ({name} with {heads} heads and {kv_heads} key-value heads); "
        f"use one of {', '.join(map(str, fitting))}"
    )


def divide(model: nn.Module, dtype: torch.dtype, buffers: Mapping[str, Tensor]) -> nn.Module:
    """Divide a model with AutoTP, and convert this rank's slices to `dtype`. Collective.

    Args:
        model: The model. Its weights are memory-mapped from its files, so they take no memory.
        dtype: Precision of the slices.
        buffers: Buffers of the result. The model's own cannot be used: they were built in the
            precision of the files, and DeepSpeed rounds them like weights, even rotary angles.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # AutoTP prints to stdout
        engine = import_deepspeed().init_inference(
            model,
            tensor_parallel={"tp_size": dist.get_world_size()},
            dtype=next(model.parameters()).dtype,
            replace_with_kernel_inject=False,
        )
    divided: nn.Module = engine.module
    for parameter in divided.parameters():
        parameter.data = parameter.data.to(dtype)
    for name, buffer in buffers.items():
        owner, _, own = name.rpartition(".")
        divided.get_submodule(owner).register_buffer(own, buffer.to(parameter.device))
    return divided


def gather(acts: Tensor, width: int) -> Tensor:
    """Concatenate the ranks' parts of activations. Collective if the activations are divided.

    Args:
        acts: `[batch, seq, part or width]`. Parts may differ in size.
        width: Full width.
    """
    return whole_of_ranks(acts, width)[0]


def whole_of_ranks(acts: Tensor, width: int) -> tuple[Tensor, slice]:
    """Return the concatenated activations (see `gather`) and the slice of this rank's columns."""
    if acts.shape[-1] == width:
        return acts, slice(None)
    here = torch.tensor([acts.shape[-1]], device=acts.device)
    sizes = [torch.empty_like(here) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, here)
    widths = [int(size) for size in sizes]
    first = sum(widths[: dist.get_rank()])
    padded = nn.functional.pad(acts, (0, max(widths) - acts.shape[-1]))
    parts = [torch.empty_like(padded) for _ in widths]
    dist.all_gather(parts, padded)
    whole = torch.cat([part[..., :n] for part, n in zip(parts, widths, strict=True)], dim=-1)
    return whole, slice(first, first + acts.shape[-1])
