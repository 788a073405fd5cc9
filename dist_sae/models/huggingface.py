"""`transformers` models with hooks at their sites."""

import contextlib
import logging

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dist_sae.config.data import HuggingFaceModel, layer_of
from dist_sae.errors import ModelError
from dist_sae.models.loading import (
    DTYPES,
    buffers_of,
    check_tokens,
    describe,
    errors_of,
    inputs,
    load,
    without_layers,
)
from dist_sae.models.sharding import choose_divider, divide, gather
from dist_sae.models.sites import Edit, attach, blocks, place

logger = logging.getLogger(__name__)


class _AllSitesSeen(Exception):  # noqa: N818 - no error: all sites have been seen
    """Raised to end a forward pass early."""


class HuggingFaceSource:
    """A model with a hook at each site. Layers above the deepest site are neither loaded nor run.

    Args:
        config: The model.
        sites: Sites to record.
        whole: Load and run the whole model, as a user of transformers would.
    """

    def __init__(
        self, config: HuggingFaceModel, sites: tuple[str, ...], *, whole: bool = False
    ) -> None:
        description = describe(config, sites)
        self._vocabulary = description.vocabulary
        self._name = config.path
        self._sites = sites
        self._whole = whole
        with errors_of(config):
            divider = (
                choose_divider(config, description.config) if config.tensor_parallel > 1 else None
            )
            model_class = type(description.skeleton)
            if not whole:
                model_class = without_layers(model_class, above=max(map(layer_of, sites)))
            self.model = load(model_class, config, description, divider)
            """The language model, without weights above the deepest site."""
            self._widths = {}
            """Full widths of sites whose activations can be divided over ranks."""
            if divider is not None:
                logger.info(
                    "%s: divided over %d ranks (%s)", config.path, config.tensor_parallel, divider
                )
                for site in sites:
                    if site.startswith(("attn_z.", "mlp_inner.")):
                        weight = place(self.model, site).module.get_parameter("weight")
                        self._widths[site] = weight.shape[1]  # full width, over all ranks
        if divider == "deepspeed":
            for layer in range(1 + max(map(layer_of, sites)), len(blocks(self.model))):
                blocks(self.model)[layer] = nn.Module()  # else DeepSpeed divides missing weights
            buffers = buffers_of(self.model, description.config, DTYPES[config.dtype])
            self.model = divide(self.model, DTYPES[config.dtype], buffers)
        self._initial_states = _States(self.model)
        self._seen: dict[str, Tensor] = {}
        for site in sites:
            attach(self.model, site, self._record(site))
        with errors_of(config, "cannot be run on text alone"):
            self.run(torch.zeros(1, 3, dtype=torch.int32), torch.ones(1, 3, dtype=torch.bool))

    @torch.inference_mode()
    def run(
        self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> dict[str, Float[Tensor, "batch seq d_in"]]:
        check_tokens(tokens, self._vocabulary, self._name)
        self._initial_states.restore()
        self._seen = {}  # a batch that ran out of memory may have left entries
        with contextlib.suppress(_AllSitesSeen):
            self.model(**inputs(self.model, tokens, mask))
        for site in self._sites:
            self._check_shape(site, tokens.shape)
        for site, width in self._widths.items():
            self._seen[site] = gather(self._seen[site], width)
        seen, self._seen = self._seen, {}
        return seen

    def _record(self, site: str) -> Edit:
        def record(acts: Tensor) -> Tensor:
            if site in self._seen:
                raise ModelError(
                    f"activations.sites: {site}: {self._name} runs this module more than once per "
                    f"token; use another site"
                )
            self._seen[site] = acts.detach()
            if not self._whole and len(self._seen) == len(self._sites):
                raise _AllSitesSeen
            return acts

        return record

    def _check_shape(self, site: str, shape: torch.Size) -> None:
        if site not in self._seen:
            raise ModelError(
                f"activations.sites: {site}: {self._name} does not run this module; use another "
                f"site"
            )
        found = tuple(self._seen[site].shape)
        if len(found) != len(shape) + 1 or found[:2] != shape:
            raise ModelError(
                f"activations.sites: {site}: {self._name} returns activations of shape {found} "
                f"for tokens of shape {tuple(shape)}, not one row per token; use another site"
            )


class _States:
    """State that modules carry between batches: rotary frequencies for the longest one so far."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            (module, dict(module.named_buffers(recurse=False)), module.max_seq_len_cached)
            for module in model.modules()
            if hasattr(module, "max_seq_len_cached")
        ]

    def restore(self) -> None:
        """Restore the state from before the first batch."""
        for module, buffers, length in self._kept:
            for name, buffer in buffers.items():
                setattr(module, name, buffer)
            for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
                setattr(module, name, length)  # some models have one per type of layer
