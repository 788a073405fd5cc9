"""Checks, before planning, that a language model's activations can be recorded."""

import logging
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor, nn

from dist_sae.config.data import ActivationsConfig, HuggingFaceModel
from dist_sae.errors import ModelError
from dist_sae.models.huggingface import HuggingFaceSource
from dist_sae.models.loading import Description, describe, load_plain_tokenizer, load_tokenizer
from dist_sae.models.sites import blocks, width

logger = logging.getLogger(__name__)

_MAX_COMPARED = 10**9
"""Most parameters of a model that is run whole: 4 GB in fp32, which fits a planner's pod."""
_LENGTHS = (16, 9, 5)
_MAX_WORK = 2 * 10**10  # limit on parameters times tokens of the longest context; takes seconds
_ROUNDING = 1e-3  # relative error; correct models stayed below 1e-5, wrong ones above 1e-2
_MIN_NORM = 0.01  # relative to the median row's norm


def check(config: HuggingFaceModel, activations: ActivationsConfig) -> dict[str, int]:
    """Raise `ModelError` unless recorded rows would equal the model's own activations.

    Sites, positions and vocabulary are checked for every model. A small model is also run in fp32,
    cut off above the sites, on a padded batch, and again after another batch. Its rows must equal
    those of the whole model on each context alone.

    Returns:
        The width of each site.
    """
    description = describe(config, activations.sites)
    widths = {site: width(description.skeleton, site) for site in activations.sites}
    _check_positions(config, description, activations.context_tokens)
    ordinary = _check_vocabulary(config, description)
    parameters = sum(p.numel() for p in description.skeleton.parameters())
    if parameters > _MAX_COMPARED:
        logger.info(
            "%s has %.1f billion parameters: its sites are checked, but it is not run here",
            config.path,
            parameters / 1e9,
        )
        return widths
    longest = min(activations.context_tokens, max(_LENGTHS[0], _MAX_WORK // parameters))
    _compare_with_whole(config, activations.sites, ordinary, longest)
    return widths


def check_same_tokens(config: HuggingFaceModel) -> None:
    """Raise `ModelError` unless a run's two models have the same vocabulary."""
    if config.other is None:
        return
    other, _ = config.of_site("@")
    here, there = (load_plain_tokenizer(model).get_vocab() for model in (config, other))
    if here != there:
        differing = {*here.items()} ^ {*there.items()}
        raise ModelError(
            f"model.other.path {other.path}: {len(differing)} tokens differ from those of "
            f"{config.path}, but both models read the same tokens; use models with the same "
            f"tokenizer"
        )


def _check_positions(config: HuggingFaceModel, description: Description, tokens: int) -> None:
    for most, why in _limits(description):
        if tokens > most:
            raise ModelError(
                f"activations.context_tokens: {tokens}: {config.path} {why}; lower it to {most}"
            )


def _limits(description: Description) -> Iterator[tuple[int, str]]:
    """Yield limits on the tokens of a context, each with its reason."""
    text = description.config.get_text_config()
    positions = next(
        (
            found
            for key in ("max_position_embeddings", "max_seq_len")
            if isinstance(found := getattr(text, key, None), int) and found > 0
        ),
        None,
    )
    layers = set(blocks(description.skeleton).modules())
    for name, module in description.skeleton.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module not in layers:
            # RoBERTa and its relatives number positions from the padding id + 1
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            most = min(module.num_embeddings, positions or module.num_embeddings) - skipped
            yield most, f"has {most} learned positions"
    if positions is not None:
        yield positions, f"supports {positions} positions"
    if getattr(text, "attention_type", None) == "block_sparse":  # BigBird
        most = (5 + 2 * text.num_random_blocks) * text.block_size
        yield (
            most,
            f"uses block-sparse attention above {most} tokens, but not after a shorter batch",
        )
    rope = getattr(text, "rope_parameters", None) or {}
    for kind in (rope, *(of_layers for of_layers in rope.values() if isinstance(of_layers, dict))):
        original = kind.get("original_max_position_embeddings")
        if kind.get("rope_type") == "longrope" and original is not None:
            yield (
                int(original),
                f"changes the rotary frequencies of a whole batch if one context has more than "
                f"{original} tokens, so rows would depend on their batch",
            )


def _check_vocabulary(config: HuggingFaceModel, description: Description) -> Tensor:
    """Check that every token has an embedding, and return the token ids of ordinary text."""
    tokenizer = load_tokenizer(config)
    ids = tokenizer.ordinary or list(range(description.vocabulary))
    largest = max(ids[-1], -1 if tokenizer.bos is None else tokenizer.bos)
    if largest >= description.vocabulary:
        raise ModelError(
            f"model.path {config.path}: the tokenizer produces tokens up to {largest}, but the "
            f"model has embeddings for 0 to {description.vocabulary - 1}; use the model's own "
            f"tokenizer"
        )
    return torch.tensor(ids, dtype=torch.int32)


def _compare_with_whole(
    config: HuggingFaceModel, sites: tuple[str, ...], ordinary: Tensor, longest: int
) -> None:
    config = config.model_copy(update={"dtype": "fp32", "tensor_parallel": 1})
    lengths = [min(n, longest) for n in _LENGTHS]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = _random_tokens(mask.shape, ordinary) * mask
    whole = HuggingFaceSource(config, sites, whole=True)
    alone = [whole.run(tokens[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate(lengths)]
    del whole
    source = HuggingFaceSource(config, sites)
    once = source.run(tokens, mask)
    source.run(_random_tokens((1, longest), ordinary), torch.ones(1, longest, dtype=torch.bool))
    again = source.run(tokens, mask)
    for rows, when in ((once, "in a batch with padding"), (again, "after another batch")):
        for site, (i, n) in product(sites, enumerate(lengths)):
            error = relative_error(rows[site][i, :n], alone[i][site][0].float())
            if not error <= _ROUNDING:
                raise ModelError(
                    f"activations.sites: {site}: rows {when} differ by {error:.1%} from those of "
                    f"each context alone in the whole {config.path}; this architecture cannot be "
                    f"recorded"
                )


def _random_tokens(shape: tuple[int, ...], ordinary: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return ordinary[torch.randint(len(ordinary), shape, generator=generator)]


def relative_error(acts: Tensor, wanted: Tensor) -> float:
    """Return the largest relative error of a row.

    Each row's error is relative to its own norm, so that attention sinks, with their huge norms, do
    not hide errors of other rows. Rows much shorter than the median row have large relative errors,
    because their terms cancel. Their errors are relative to a share of the median norm.
    """
    norms = wanted.norm(dim=1)
    norms = norms.maximum(_MIN_NORM * norms.median()).clamp_min(1e-30)
    return float(((acts.float() - wanted).norm(dim=1) / norms).max())
