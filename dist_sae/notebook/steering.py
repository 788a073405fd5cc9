"""Changes to a model's activations at a site, by hooks that leave with their `with` block."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from dist_sae.errors import ArgumentError
from dist_sae.models.sites import attach, place, width

Change = Callable[[Mapping[str, Float[Tensor, "rows d"]]], Float[Tensor, "#rows d"]]
"""Computes the change to add to raw activations of a site from those of the sites that are read."""

Positions = Shaped[Tensor, "*batch seq"]
"""A mask of booleans; others are refused, as they may be numbers of tokens."""


class Where:
    """Tokens that are changed.

    Args:
        positions: Mask, `[seq]` or `[batch, seq]`, from the first token of a sequence on, padding
            included; all if None.
        generated: Whether tokens after the last of `positions` are changed.
    """

    def __init__(self, positions: Positions | None, *, generated: bool) -> None:
        if positions is not None and (
            positions.dtype != torch.bool or positions.dim() not in (1, 2)
        ):
            raise ArgumentError(
                f"positions: give a mask of booleans, [seq] or [batch, seq], not "
                f"{positions.dtype} of shape {list(positions.shape)}"
            )
        self.positions = None if positions is None else positions.view(-1, positions.shape[-1])
        self._generated = generated
        self._before = 0

    def look(self, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note, before a forward pass, how many tokens of the sequences came before it.

        Raises:
            ArgumentError: The model keeps another state than past keys and values.
        """
        past = kwargs.get("past_key_values")
        if kwargs.get("cache_params") is not None:
            raise ArgumentError(
                "positions: this model's state does not tell how many tokens came before; "
                "generate with use_cache=False"
            )
        self._before = 0 if past is None else int(past.get_seq_length())

    def mask(self, batch: int, seq: int) -> Bool[Tensor, "batch seq"]:
        """Mask of a forward pass.

        Raises:
            ArgumentError: `positions` are of another number of sequences.
        """
        if self.positions is None:
            return torch.ones(batch, seq, dtype=torch.bool)
        if len(self.positions) not in (1, batch):
            raise ArgumentError(
                f"positions: {len(self.positions)} sequences, but the model reads {batch}"
            )
        here = self.positions[:, self._before : self._before + seq]
        rest = here.new_full((len(here), seq - here.shape[1]), self._generated)
        return torch.cat([here, rest], 1).expand(batch, seq)


@contextmanager
def editing(
    model: nn.Module,
    site: str,
    widths: Mapping[str, int],
    change: Change,
    where: Where,
) -> Iterator[None]:
    """Add `change(rows)` to a model's activations at a site, within a `with` block.

    Args:
        model: A `transformers` model.
        site: The site.
        widths: Widths of its rows, and of those of the sites that `change` reads.
        change: Gets the rows that are changed, at these sites, in fp32 and without gradients.
        where: Which rows these are.

    Raises:
        ArgumentError: It is no `transformers` model, its activations have another width, or it
            reaches a site that is read only after the one that is changed.
        ModelError: The model has no such site.
    """
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise ArgumentError(
            f"model: {type(model).__name__} is not a transformers model; give one, as run.model()"
        )
    for each, wanted in widths.items():
        place(model, each)
        if width(model, each) != wanted:
            raise ArgumentError(
                f"model: its activations at {each} are {width(model, each)} wide, the dictionary "
                f"takes {wanted}; give the model that the run was trained on"
            )
    read: dict[str, Tensor] = {}

    def edit(here: str, acts: Tensor) -> Tensor:
        mask = where.mask(*acts.shape[:2]).to(acts.device)
        if not mask.any():
            return acts
        read[here] = acts.detach()[mask].float()
        if here != site:
            return acts
        if later := widths.keys() - read.keys():
            raise ArgumentError(f"model: it reaches {min(later)}, which is read, after {site}")
        delta = torch.zeros(acts.shape, dtype=torch.float32, device=acts.device)
        delta[mask] = change(read).expand(read[site].shape).to(delta)
        read.clear()
        # exact where delta is 0
        return (acts + delta).to(acts.dtype)

    with ExitStack() as hooks:
        if where.positions is not None:
            hooks.callback(model.register_forward_pre_hook(where.look, with_kwargs=True).remove)
        for each in widths:
            hooks.callback(attach(model, each, partial(edit, each)).remove)
        yield
