"""The language model's losses with a site left alone, replaced by its reconstruction, ablated."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from jaxtyping import Bool
from torch import Tensor

from dist_sae.config import Run
from dist_sae.config.data import HuggingFaceModel
from dist_sae.data.admission import admitted, of_usual_norm
from dist_sae.data.corpus import Corpus
from dist_sae.data.plan import Plan, as_planned, check_model, read_unit
from dist_sae.data.tokens import TokenBatch, cut, pack
from dist_sae.errors import HeadlessError
from dist_sae.models import build_tokenizer
from dist_sae.sae.base import Dictionary
from dist_sae.sae.metrics import ce_recovered

logger = logging.getLogger(__name__)


def cross_entropies(
    run: Run, model: HuggingFaceModel, plan: Plan, sae: Dictionary, scale: float, mean: Tensor
) -> dict[str, float | str]:
    """Losses of the whole model with the site's admitted rows replaced.

    Of next tokens, or of masked ones where each token sees those after it. A model that predicts
    none gives `ce_left_out`, which says why.
    """
    from dist_sae.models.spliced import SplicedModel

    run = as_planned(run, plan)
    check_model(run, plan)
    assert isinstance(run.model, HuggingFaceModel)
    model = run.model  # at the plan's commit
    tokenizer = build_tokenizer(model, 0)
    try:
        spliced = SplicedModel(model, run.site)
    except HeadlessError as exc:
        logger.warning("cross-entropies are left out: %s", exc)
        return {"ce_left_out": str(exc)}
    totals: Counter[str] = Counter()
    replacements: dict[str, Callable[[Tensor], Tensor] | None] = {
        "clean": None,
        "spliced": lambda rows: sae.decode(sae.encode(rows * scale)) / scale,
        "zero": torch.zeros_like,
        "mean": lambda rows: (mean / scale).expand(rows.shape),
    }
    for batch in _heldout_batches(run, model, plan, tokenizer.bos):
        keep = admitted(batch, tokenizer.special, run.activations.exclude, Counter())
        predicted = spliced.predicted(batch.tokens, batch.mask)
        totals["tokens"] += int(predicted.sum())
        for name, replace in replacements.items():
            edit = _edit(keep, replace, run.activations.exclude.over_norm) if replace else None
            losses = spliced.losses(batch.tokens, batch.mask, edit)[predicted]
            totals[name] += float(losses.double().sum())  # type: ignore[assignment]
    if not totals["tokens"]:
        return {"ce_left_out": "no held-out context has a second token, which could be predicted"}
    ce = {name: totals[name] / totals["tokens"] for name in replacements}
    return {
        "ce_of": "masked tokens" if spliced.masked else "next tokens",
        **{f"ce_{name}": value for name, value in ce.items()},
        "ce_recovered": ce_recovered(ce["clean"], ce["spliced"], ce["zero"]),
        "ce_recovered_mean": ce_recovered(ce["clean"], ce["spliced"], ce["mean"]),
        "tokens": totals["tokens"],
    }


def _heldout_batches(
    run: Run, model: HuggingFaceModel, plan: Plan, bos: int | None
) -> Iterator[TokenBatch]:
    tokenizer = build_tokenizer(model, 0)
    bos = bos if run.activations.prepend_bos else None
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
    """Replaces the rows that training would have seen; sinks and special tokens stay."""

    def edit(acts: Tensor) -> Tensor:
        usual = keep.clone()
        usual[keep] = of_usual_norm(acts[keep], over_norm)
        edited = acts.clone()
        edited[usual] = replace(acts[usual].float()).to(acts.dtype)
        return edited

    return edit
