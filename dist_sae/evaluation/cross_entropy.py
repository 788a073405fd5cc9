"""Language-model losses with a site unchanged, replaced by its reconstruction, or ablated."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_sae import logs
from dist_sae.config import Run
from dist_sae.config.data import HuggingFaceModel
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.corpus import Corpus
from dist_sae.data.plan import Plan, as_planned, check_model, read_unit
from dist_sae.data.row_filters import admitted, of_usual_norm
from dist_sae.data.tokens import TokenBatch, cut, pack
from dist_sae.dictionaries.interface import Inference
from dist_sae.dictionaries.metrics import ce_recovered
from dist_sae.distributed.mesh import ALONE, Mesh
from dist_sae.environment import versions
from dist_sae.errors import HeadlessError, NonFiniteError
from dist_sae.evaluation.cache import cached, fingerprint
from dist_sae.models import Tokenizer, build_tokenizer

logger = logging.getLogger(__name__)

_RESAMPLES = 1000


def cross_entropies(
    activations: ActivationSet,
    run: Run,
    sae: Inference,
    scale: float,
    mean: Tensor,
    mesh: Mesh = ALONE,
) -> dict[str, Any]:
    """Measure the model's losses with the site's admitted rows replaced. Collective.

    Losses are of next tokens, or of masked tokens for a bidirectional model. `ce_left_out` gives
    the reason if there are none: the model predicts no tokens, or ablation changes none. Losses
    without the dictionary are cached beside the activation set.

    Returns:
        See `evaluate`. `intervals` come from a bootstrap over documents.

    Raises:
        NonFiniteError: A loss is NaN or infinite.
    """
    from dist_sae.models.spliced import SplicedModel

    run = as_planned(run, activations.plan)
    check_model(run, activations.plan)
    assert isinstance(run.model, HuggingFaceModel)
    model = run.model  # pinned to the plan's commit
    tokenizer = build_tokenizer(run)
    try:
        spliced = SplicedModel(model, run.site, divided=mesh.world > 1)
    except HeadlessError as exc:
        logger.warning("cross-entropies are left out: %s", exc)
        return {"ce_left_out": str(exc)}
    batches = list(_heldout_batches(run, model, activations.plan, tokenizer))
    predicted = [spliced.predicted(batch.tokens, batch.mask) for batch in batches]
    tokens = torch.tensor([n for each in predicted for n in each.sum(1).tolist()])
    if not int(tokens.sum()):
        return {"ce_left_out": "no held-out context has a second token to predict"}
    exclude = run.activations.exclude
    centre = mean / scale

    progress = logs.PacedProgress("losses")
    contexts = sum(len(batch.tokens) for batch in batches)

    def losses(turn: int, replace: Callable[[Tensor], Tensor] | None) -> list[float]:
        """Loss of each context, summed over its tokens, in nats.

        Args:
            turn: Turns over the contexts before this one, of four in all.
            replace: Gives the rows in place of the admitted ones; None keeps these.
        """
        sums: list[float] = []
        for batch, counts in zip(batches, predicted, strict=True):
            keep = admitted(batch, tokenizer.special, exclude, Counter())
            if spliced.masked and exclude.special_tokens:  # these positions hold [MASK]
                keep[:, 1:] &= ~counts
            edit = _edit(keep, replace, exclude.over_norm) if replace else None
            each = spliced.losses(batch.tokens, batch.mask, edit)
            sums += each.double().where(counts, 0.0).sum(1).tolist()
            progress(turn * contexts + len(sums), 4 * contexts)
        if not all(map(math.isfinite, sums)):
            raise NonFiniteError(f"model.path {model.path}: a loss is NaN or infinite")
        return sums

    of = {
        "plan": activations.plan.hash,
        "site": run.site,
        "mean": fingerprint(centre.tolist()),
        "batches": fingerprint([batch.tokens.tolist() for batch in batches]),
        "predicted": fingerprint([each.tolist() for each in predicted]),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": {name: versions()[name] for name in ("torch", "transformers")},
    }
    without = cached(
        activations.store,
        "cross-entropy",
        of,
        lambda: {
            "clean": losses(0, None),
            "zero": losses(1, torch.zeros_like),
            "mean": losses(2, lambda rows: centre.expand(rows.shape)),
        },
        mesh,
    )
    sums = {
        "clean": without["clean"],
        "spliced": losses(3, lambda rows: sae.infer(rows * scale).x_hat / scale),
        "zero": without["zero"],
        "mean": without["mean"],
    }
    logs.progress("losses", 4 * contexts, 4 * contexts)
    numbers = _numbers(*(sum(values) for values in sums.values()), tokens=int(tokens.sum()))
    if math.isnan(numbers["ce_recovered"]) or math.isnan(numbers["ce_recovered_mean"]):
        reason = f"ablation of {run.site} changes no prediction in {int(tokens.sum())} tokens"
        logger.warning("cross-entropies are left out: %s", reason)
        return {"ce_left_out": reason}
    documents = torch.cat([batch.documents[:, 0] for batch in batches])
    return {
        "ce_of": "masked tokens" if spliced.masked else "next tokens",
        **numbers,
        "tokens": int(tokens.sum()),
        "ce_documents": len(set(documents.tolist())),
        "intervals": bootstrap_intervals(torch.tensor(list(sums.values())), tokens, documents),
    }


def _numbers(
    clean: float, spliced: float, zero: float, mean: float, *, tokens: float
) -> dict[str, float]:
    """Compute the reported numbers from losses summed over tokens."""
    return {
        "ce_clean": clean / tokens,
        "ce_spliced": spliced / tokens,
        "ce_zero": zero / tokens,
        "ce_mean": mean / tokens,
        "ce_recovered": ce_recovered(clean, spliced, zero),
        "ce_recovered_mean": ce_recovered(clean, spliced, mean),
    }


def bootstrap_intervals(
    sums: Float[Tensor, "losses contexts"],
    tokens: Int[Tensor, " contexts"],
    documents: Int[Tensor, " contexts"],
) -> dict[str, list[float]]:
    """Compute 95 % percentile intervals of a bootstrap (Efron 1979) over documents.

    Contexts of one document are alike, so documents are drawn; a single one gives no intervals.
    Draws in which ablation changes no document have no recovered share, and are left out of its
    interval: at most (1 - 1/n)^n < 37 % of them, if ablation changes one of n documents.
    """
    sums, documents, tokens = (part[..., tokens > 0] for part in (sums, documents, tokens))
    numbers = {document: i for i, document in enumerate(dict.fromkeys(documents.tolist()))}
    which = torch.tensor([numbers[document] for document in documents.tolist()])
    n = len(numbers)
    if n == 1:
        return {}
    sums = sums.double()
    # differences from clean: documents without one give none in a draw either, even by rounding
    columns = torch.cat([sums[:1], sums[1:] - sums[0], tokens.double()[None]])
    by_document = torch.zeros(len(columns), n, dtype=torch.float64).index_add_(1, which, columns)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(n, (_RESAMPLES, n), generator=generator)
    times = torch.zeros(_RESAMPLES, n, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(times))
    totals = times @ by_document.T
    totals[:, 1:-1] += totals[:, :1]
    resampled = [_numbers(*each[:-1], tokens=each[-1]) for each in totals.tolist()]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    intervals: dict[str, list[float]] = {}
    for name in resampled[0]:
        values = torch.tensor([numbers[name] for numbers in resampled], dtype=torch.float64)
        values = values[~values.isnan()]
        if len(values):
            intervals[name] = values.quantile(ends).tolist()
    return intervals


def _heldout_batches(
    run: Run, model: HuggingFaceModel, plan: Plan, tokenizer: Tokenizer
) -> Iterator[TokenBatch]:
    bos = tokenizer.bos if run.activations.prepend_bos else None
    corpus = Corpus(run.corpus, run.store.s3)
    documents = (
        document for unit in plan.heldout_units for document in read_unit(corpus, plan, unit)
    )
    contexts = cut(
        islice(documents, run.evaluate.contexts),
        tokenizer,
        context_tokens=run.activations.context_tokens,
        bos=bos,
        failed=lambda document, exc: logger.warning(
            "document %d is left out, the tokenizer refuses it: %s", document.number, exc
        ),
    )
    chosen = list(islice(contexts, run.evaluate.contexts))
    return pack(chosen, batch_tokens=model.batch_tokens, bos=bos)


def _edit(
    keep: Bool[Tensor, "batch seq"], replace: Callable[[Tensor], Tensor], over_norm: float | None
) -> Callable[[Tensor], Tensor]:
    """Build an edit that replaces the rows that training uses; sinks and special tokens stay."""

    def edit(acts: Tensor) -> Tensor:
        usual = keep.clone()
        usual[keep] = of_usual_norm(acts[keep], over_norm)
        edited = acts.clone()
        edited[usual] = replace(acts[usual].float()).to(acts.dtype)
        return edited

    return edit
