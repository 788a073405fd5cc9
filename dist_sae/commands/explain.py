"""`dist-sae explain`: a language model explains latents and judges the explanations."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_sae.commands import shared
from dist_sae.errors import ArgumentError, ConfigError

if TYPE_CHECKING:
    from dist_sae.config import Run
    from dist_sae.index.query import Index

_COUNTS = (
    ("--tokens", "tokens per passage", 32),
    ("--shown", "active passages that the explainer sees", 20),
    ("--per-decile", "active passages to judge per decile", 2),
    ("--silent", "silent passages to judge, and the same number of near misses", 20),
    ("--at-once", "passages per judging request", 10),
    ("--most-tokens", "maximum length of an answer, in tokens", 500),
)
"""Options that take a positive number, with meaning and default."""
_SCORE = "mean_balanced_accuracy"


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = (
        "explain latents with a language model, and judge each explanation on passages that it was "
        "not written from; sends nothing without --endpoint and --yes"
    )
    parser = shared.add_command(commands, "explain", main, text)
    parser.add_argument("--index", metavar="NAME", help="name of the index (default: the newest)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--latents",
        type=int,
        nargs="+",
        metavar="N",
        help="latents to explain (default: those of the report)",
    )
    which.add_argument("--all", action="store_true", help="explain all latents that fire")
    which.add_argument(
        "--from-delphi",
        type=Path,
        metavar="FOLDER",
        help="read delphi's results on an export of the index from this folder; sends no requests",
    )
    shared.add_endpoint(parser)
    parser.add_argument(
        "--judge", metavar="FILE", help="endpoint that judges (default: the one that explains)"
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="name of this set of explanations (default: that of the model, or delphi)",
    )
    for option, what, default in _COUNTS:
        parser.add_argument(
            option, type=int, metavar="N", default=default, help=f"{what} (default: {default})"
        )


def main(options: argparse.Namespace) -> None:
    """Explain latents, or print an estimate of the requests if the user has not agreed to them."""
    run = shared.load(options)
    for option, _, _ in _COUNTS:
        if getattr(options, option.strip("-").replace("-", "_")) < 1:
            raise ArgumentError(f"{option}: must be at least 1")
    from dist_sae.index.query import Index
    from dist_sae.storage import open_store

    index = Index(open_store(run.store.runs, run.store.s3), run.name, options.index)
    found = _from_delphi(options, index) if options.from_delphi else _explained(options, run, index)
    if found is not None:
        if found[_SCORE] is None and not options.json:
            found[_SCORE] = "none: no explanation was judged"
        shared.print_result(options, found)


def _explained(options: argparse.Namespace, run: "Run", index: "Index") -> dict[str, Any] | None:
    """Explain latents. Return None if the user has not agreed to the requests."""
    from dist_sae.data.plan import load_plan
    from dist_sae.explaining.explain import ExplainPlan, explain, list_questions
    from dist_sae.explaining.passages import PassageSampler, PassageSettings
    from dist_sae.explaining.stored import ExplanationSet
    from dist_sae.index.texts import Texts
    from dist_sae.storage import open_store

    explainer = shared.open_endpoint(options, run)
    judge = shared.open_endpoint(options, run, options.judge) if options.judge else explainer
    index.check_all_postings("explain")
    passages = PassageSettings(options.tokens, options.shown, options.per_decile, options.silent)
    plan = ExplainPlan(passages, options.at_once, options.most_tokens, run.train.seed)
    found = ExplanationSet(index, options.name or _as_name(explainer.model))
    settings = plan.settings_for(index, explainer.model, judge.model)
    found.check(settings)
    latents = _latents(options, run, index)
    texts = Texts(run, load_plan(open_store(run.store.activations, run.store.s3), run))
    sampler = PassageSampler(index, texts, passages, plan.seed)
    asked, judging = list_questions(sampler, plan, latents, explainer)
    if judge is explainer:
        may = shared.confirm_requests(options, explainer, asked + judging)
    else:
        mays = [
            shared.confirm_requests(options, explainer, asked),
            shared.confirm_requests(options, judge, judging),
        ]
        may = all(mays)
    if not may:
        return None
    summary = explain(sampler, plan, latents, explainer, judge, found, settings)
    return {"explanations": found.place, **summary._asdict()}


def _latents(options: argparse.Namespace, run: "Run", index: "Index") -> list[int]:
    from dist_sae.report.latents import choose_latents

    if options.all:
        return [latent for latent, n in enumerate(index.firings.tolist()) if n]
    if options.latents:
        latents = sorted(set(options.latents))
        for latent in latents:
            index.examples(latent)  # raises for an unknown latent
        return latents
    return choose_latents(index.firings, run.evaluate.latents, run.train.seed)


def _from_delphi(options: argparse.Namespace, index: "Index") -> dict[str, Any]:
    from dist_sae.explaining.explain import summarize
    from dist_sae.explaining.from_delphi import LIBRARY, delphi_settings, read_delphi
    from dist_sae.explaining.stored import ExplanationSet

    if options.endpoint or options.yes or options.judge:
        raise ConfigError(
            "--from-delphi: sends no requests; leave --endpoint, --judge and --yes out"
        )
    found = ExplanationSet(index, options.name or LIBRARY)
    read = read_delphi(options.from_delphi, index)
    found.add(delphi_settings(index), read)
    return {"explanations": found.place, **summarize(read)._asdict()}


def _as_name(model: str) -> str:
    """Return a model's name in the form that is allowed for a set of explanations."""
    return re.sub(r"[^a-z0-9.]+", "-", model.lower()).strip("-.") or "model"
