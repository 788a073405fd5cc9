"""Language-model losses with sites unchanged, replaced by their reconstructions, or ablated."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dist_sae import logs
from dist_sae.config import Run
from dist_sae.config.data import HuggingFaceModel
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.plan import check_model, pin_to_plan
from dist_sae.data.planned_text import PlannedText
from dist_sae.data.row_filters import kept_by_token_rules
from dist_sae.data.tokens import TokenBatch, cut, pack
from dist_sae.device import own_device
from dist_sae.dictionaries.interface import Inference
from dist_sae.dictionaries.metrics import ce_recovered
from dist_sae.dictionaries.normaliser import SiteNormalisers
from dist_sae.distributed.mesh import SINGLE_PROCESS, Mesh
from dist_sae.environment import versions
from dist_sae.errors import HeadlessError, NonFiniteError
from dist_sae.evaluation.cache import cached, fingerprint
from dist_sae.evaluation.splice import Edits, Splice, Values
from dist_sae.models import Tokenizer, build_tokenizer

logger = logging.getLogger(__name__)

_RESAMPLES = 1000
_LOSSES = ("clean", "spliced", "zero", "mean", "replacement")
_Passes = dict[str, Callable[[Splice], Edits]]
"""Passes over a batch, in order. By the name of a pass's losses, a function returns its edits."""
_SiteSets = Mapping[str, tuple[str, ...]]
"""Written sites that are replaced at once. The key is "" for all sites, or the name of one."""


def cross_entropies(
    activations: ActivationSet,
    run: Run,
    sae: Inference,
    normalisers: SiteNormalisers,
    mesh: Mesh = SINGLE_PROCESS,
    *,
    causal: bool = False,
) -> dict[str, Any]:
    """Measure the model's losses with admitted rows of the written sites replaced. Collective.

    Losses are for next tokens, or for masked tokens if the model is bidirectional. If there are no
    losses, `ce_left_out` gives the reason: the model predicts no tokens, ablation changes no
    prediction, or the sites belong to two models. Losses without the dictionary are cached with the
    activation set.

    Args:
        activations: The activation set.
        run: The run.
        sae: The dictionary.
        normalisers: Normalisers of the dictionary's sites.
        mesh: The ranks.
        causal: Whether what the dictionary writes at a site depends on no site that the model
            reaches later. If so, the replacement model is measured as well, unless a layer is
            written before it is read.

    Returns:
        The losses; see `evaluate`. `intervals` come from a bootstrap over documents.

    Raises:
        NonFiniteError: A loss is NaN or infinite.
    """
    from dist_sae.models.spliced import SplicedModel

    run = pin_to_plan(run, activations.plan)
    check_model(run, activations.plan)
    assert isinstance(run.model, HuggingFaceModel)
    sites, writes = tuple(normalisers.by_site), normalisers.writes
    (model, names), *others = run.model.by_model(sites)  # pinned to the plan's commit
    if others:
        return {"ce_left_out": "the dictionary's sites belong to two models"}
    tokenizer = build_tokenizer(run)
    try:
        spliced = SplicedModel(model, tuple(names), divided=mesh.world > 1)
    except HeadlessError as exc:
        logger.warning("cross-entropies are left out: %s", exc)
        return {"ce_left_out": str(exc)}
    batches = list(_heldout_batches(run, model, activations, tokenizer))
    predicted = [spliced.predicted(batch.tokens, batch.mask) for batch in batches]
    tokens = torch.tensor([n for each in predicted for n in each.sum(1).tolist()])
    if not int(tokens.sum()):
        return {"ce_left_out": "no held-out context has a second token to predict"}
    exclude = run.activations.exclude
    means = {site: of.mean.float() / of.scale for site, of in normalisers.by_site.items()}

    site_sets = {"": writes, **{site: (site,) for site in writes if len(writes) > 1}}
    baseline_passes: _Passes = {"clean": Splice.read, **_ablations(site_sets, means)}
    live = causal and _are_read_first(names, normalisers)
    dictionary_passes = _reconstructions(site_sets, several=len(sites) > 1, live=live)
    progress = logs.RateLimitedProgress("losses", enabled=mesh.is_first)
    turns = len(baseline_passes) + len(dictionary_passes)
    total = turns * sum(len(batch.tokens) for batch in batches)

    def losses(passes: _Passes, before: int) -> dict[str, list[float]]:
        """Compute each context's loss in some passes, summed over its tokens, in nats.

        Args:
            passes: The passes to run.
            before: Number of passes that ran earlier, for progress.
        """
        sums: dict[str, list[float]] = {name: [] for name in passes}
        for batch, counts in zip(batches, predicted, strict=True):
            keep = kept_by_token_rules(batch, tokenizer.special, exclude, Counter())
            if spliced.masked and exclude.special_tokens:  # these positions are [MASK]
                keep[:, 1:] &= ~counts
            splice = Splice(keep, exclude.over_norm, sae, normalisers)
            for name, made in passes.items():
                edits = made(splice)
                here = {there: edits[site] for there, site in names.items() if site in edits}
                each = spliced.losses(batch.tokens, batch.mask, here)
                sums[name] += each.double().where(counts, 0.0).sum(1).tolist()
            progress(before * total // turns + sum(map(len, sums.values())), total)
        if not all(math.isfinite(loss) for each in sums.values() for loss in each):
            raise NonFiniteError(f"model.path {model.path}: a loss is NaN or infinite")
        return sums

    cache_key = {
        "plan": activations.plan.hash,
        "sites": sites,
        "writes": writes,
        "means": fingerprint([means[site].tolist() for site in writes]),
        "batches": fingerprint([batch.tokens.tolist() for batch in batches]),
        "predicted": fingerprint([each.tolist() for each in predicted]),
        "device": own_device().type,
        "versions": {name: versions()[name] for name in ("torch", "transformers")},
    }
    baseline_sums = cached(
        activations.store,
        "cross-entropy",
        cache_key,
        lambda: losses(baseline_passes, 0),
        mesh,
    )
    sums = losses(dictionary_passes, len(baseline_passes)) | baseline_sums
    progress.end(total)
    n_tokens = int(tokens.sum())
    numbers, *by_site = (
        _numbers({name: sum(each) for name, each in _sums_of(site_set, sums).items()}, n_tokens)
        for site_set in site_sets
    )
    if math.isnan(numbers["ce_recovered"]) or math.isnan(numbers["ce_recovered_mean"]):
        reason = f"ablation of {', '.join(writes)} changes no prediction in {n_tokens} tokens"
        logger.warning("cross-entropies are left out: %s", reason)
        return {"ce_left_out": reason}
    documents = torch.cat([batch.documents[:, 0] for batch in batches])
    return {
        "ce_of": "masked tokens" if spliced.masked else "next tokens",
        **numbers,
        **_by_site(writes, by_site),
        "tokens": n_tokens,
        "ce_documents": len(set(documents.tolist())),
        "intervals": bootstrap_intervals(_sums_of("", sums), tokens, documents),
    }


def _are_read_first(names: Mapping[str, str], normalisers: SiteNormalisers) -> bool:
    """Return True if each layer's site is read no later in the model than its site is written.

    Args:
        names: Sites by their names in the model.
        normalisers: Normalisers of these sites.
    """
    from dist_sae.models.sites import depth

    depths = {site: depth(name) for name, site in names.items()}
    layers = zip(normalisers.reads, normalisers.writes, strict=True)
    return all(depths[read] <= depths[written] for read, written in layers)


def _ablations(site_sets: _SiteSets, means: Mapping[str, Tensor]) -> _Passes:
    """Return passes that replace each set of sites by zero, and by the means."""
    constants: dict[str, Values] = {
        "zero": lambda _, rows: torch.zeros_like(rows),
        "mean": lambda site, rows: means[site].to(rows.device).expand(rows.shape),
    }
    return {
        _named(name, site_set): partial(Splice.replace, sites=sites, values=values)
        for site_set, sites in site_sets.items()
        for name, values in constants.items()
    }


def _reconstructions(site_sets: _SiteSets, *, several: bool, live: bool) -> _Passes:
    """Return passes that replace each set of sites by reconstructions.

    Args:
        several: Whether the dictionary reads or writes several sites.
        live: Whether to add a pass of the replacement model.
    """
    if not several:
        return {"spliced": Splice.reconstruct_live}
    passes: _Passes = {"clean": Splice.read}
    for site_set, sites in site_sets.items():
        passes[_named("spliced", site_set)] = partial(Splice.reconstruct, sites=sites)
    return passes | ({"replacement": Splice.reconstruct_live} if live else {})


def _named(name: str, site_set: str) -> str:
    return f"{name} {site_set}" if site_set else name


def _sums_of(site_set: str, sums: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Return the losses of the passes that replace one set of sites."""
    names = {name: name if name == "clean" else _named(name, site_set) for name in _LOSSES}
    return {name: sums[pass_name] for name, pass_name in names.items() if pass_name in sums}


def _by_site(sites: tuple[str, ...], numbers: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the numbers of each site alone, without shares that are undefined."""
    of_site = {
        site: {name: x for name, x in each.items() if name != "ce_clean" and not math.isnan(x)}
        for site, each in zip(sites, numbers, strict=False)
    }
    return {"ce_by_site": of_site} if numbers else {}


def _numbers(sums: Mapping[str, float], tokens: float) -> dict[str, float]:
    """Compute the reported numbers from losses summed over tokens."""
    numbers = {f"ce_{name}": loss / tokens for name, loss in sums.items()}
    for name, end in (("spliced", ""), ("replacement", "_replacement")):
        if name in sums:
            for ablated, against in (("zero", ""), ("mean", "_mean")):
                key = f"ce_recovered{against}{end}"
                numbers[key] = ce_recovered(sums["clean"], sums[name], sums[ablated])
    return numbers


def bootstrap_intervals(
    sums: Mapping[str, Sequence[float]],
    tokens: Int[Tensor, " contexts"],
    documents: Int[Tensor, " contexts"],
) -> dict[str, list[float]]:
    """Compute 95 % percentile intervals of a bootstrap (Efron 1979) over documents.

    Contexts of one document resemble each other, so whole documents are drawn. A single document
    gives no intervals. If ablation changes no document of a draw, its recovered share is undefined
    and left out of the interval. That is at most (1 - 1/n)^n < 37 % of draws, if ablation changes
    one of n documents.

    Args:
        sums: Losses of each context, summed over its tokens, by pass. `clean` comes first.
        tokens: Number of predicted tokens of each context.
        documents: Document of each context.
    """
    names, losses = list(sums), torch.tensor(list(sums.values()), dtype=torch.float64)
    losses, documents, tokens = (part[..., tokens > 0] for part in (losses, documents, tokens))
    numbers = {document: i for i, document in enumerate(dict.fromkeys(documents.tolist()))}
    which = torch.tensor([numbers[document] for document in documents.tolist()])
    n = len(numbers)
    if n == 1:
        return {}
    # sum differences from clean: if no document of a draw differs, rounding adds no difference
    columns = torch.cat([losses[:1], losses[1:] - losses[0], tokens.double()[None]])
    by_document = torch.zeros(len(columns), n, dtype=torch.float64).index_add_(1, which, columns)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(n, (_RESAMPLES, n), generator=generator)
    times = torch.zeros(_RESAMPLES, n, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(times))
    totals = times @ by_document.T
    totals[:, 1:-1] += totals[:, :1]
    resampled = [
        _numbers(dict(zip(names, each, strict=False)), each[-1]) for each in totals.tolist()
    ]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    intervals: dict[str, list[float]] = {}
    for name in resampled[0]:
        values = torch.tensor([numbers[name] for numbers in resampled], dtype=torch.float64)
        values = values[~values.isnan()]
        if len(values):
            intervals[name] = values.quantile(ends).tolist()
    return intervals


def _heldout_batches(
    run: Run, model: HuggingFaceModel, activations: ActivationSet, tokenizer: Tokenizer
) -> Iterator[TokenBatch]:
    bos = tokenizer.bos if run.activations.prepend_bos else None
    text = PlannedText(run, activations.plan, activations.store)
    documents = (
        document for unit in activations.plan.heldout_units for document in text.read(unit)
    )
    contexts = cut(
        islice(documents, run.evaluate.contexts),
        tokenizer,
        context_tokens=run.activations.context_tokens,
        bos=bos,
        failed=lambda document, exc: logger.warning(
            "document %d is left out because the tokenizer refuses it: %s", document.number, exc
        ),
    )
    chosen = list(islice(contexts, run.evaluate.contexts))
    return pack(chosen, batch_tokens=model.batch_tokens, bos=bos)
