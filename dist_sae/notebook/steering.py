"""Changes to a model's activations at a site, with hooks that last as long as a `with` block."""

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
"""Function that maps raw activations by site to the change to add at the steered site."""

Positions = Shaped[Tensor, "*batch seq"]
"""A mask of booleans. Integers are refused, since they could be token positions."""


class TokenMask:
    """The tokens to change.

    Args:
        positions: Mask of the tokens to change, `[seq]` or `[batch, seq]`. It starts at the first
            token of a sequence and includes padding. None changes all tokens.
        generated: Whether to change tokens after the end of `positions`.
    """

    def __init__(self, positions: Positions | None, *, generated: bool) -> None:
        if positions is not None and (
            positions.dtype != torch.bool or positions.dim() not in (1, 2)
        ):
            raise ArgumentError(
                f"positions: give a boolean mask, [seq] or [batch, seq], not "
                f"{positions.dtype} of shape {list(positions.shape)}"
            )
        self.positions = None if positions is None else positions.view(-1, positions.shape[-1])
        self._generated = generated
        self._before = 0

    def count_cached(self, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass, count the tokens that earlier passes have put into the cache.

        Raises:
            ArgumentError: The model's cache is not one of keys and values, so it has no length.
        """
        past = kwargs.get("past_key_values")
        if kwargs.get("cache_params") is not None:
            raise ArgumentError(
                "positions: this model's state does not show how many tokens came before; "
                "generate with use_cache=False"
            )
        self._before = 0 if past is None else int(past.get_seq_length())

    def mask(self, batch: int, seq: int) -> Bool[Tensor, "batch seq"]:
        """Return the mask for the tokens of a forward pass.

        Raises:
            ArgumentError: `positions` has neither one sequence nor `batch` sequences.
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
def edit_activations(
    model: nn.Module,
    site: str,
    widths: Mapping[str, int],
    change: Change,
    where: TokenMask,
) -> Iterator[None]:
    """Add `change(rows)` to a model's activations at a site, within a `with` block.

    Args:
        model: A `transformers` model.
        site: The site to change.
        widths: Widths of that site and of all sites that `change` reads.
        change: Function that gets the rows to change at each of these sites, in fp32 and without
            gradients.
        where: The tokens to change.

    Raises:
        ArgumentError: The model is not a `transformers` model, its activations have another width,
            or it computes a site that `change` reads only after the site to change.
        ModelError: The model does not have one of the sites.
    """
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise ArgumentError(
            f"model: {type(model).__name__} is not a transformers model; use one, such as "
            f"run.model()"
        )
    for each, wanted in widths.items():
        place(model, each)
        if width(model, each) != wanted:
            raise ArgumentError(
                f"model: its activations at {each} have width {width(model, each)}, but the "
                f"dictionary takes {wanted}; use the model that the run was trained on"
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
            raise ArgumentError(
                f"model: it computes {min(later)}, which is read, only after {site}"
            )
        delta = torch.zeros(acts.shape, dtype=torch.float32, device=acts.device)
        delta[mask] = change(read).expand(read[site].shape).to(delta)
        read.clear()
        # adding 0 leaves other rows bitwise the same
        return (acts + delta).to(acts.dtype)

    with ExitStack() as hooks:
        if where.positions is not None:
            hooks.callback(
                model.register_forward_pre_hook(where.count_cached, with_kwargs=True).remove
            )
        for each in widths:
            hooks.callback(attach(model, each, partial(edit, each)).remove)
        yield
