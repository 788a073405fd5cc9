"""`dist-sae analyse sensitivity`: whether a latent fires wherever its concept occurs."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dist_sae.commands import shared
from dist_sae.commands.analyse import common
from dist_sae.errors import ArgumentError

if TYPE_CHECKING:
    from dist_sae.analysis.judges import Judge
    from dist_sae.analysis.passages import Sampling
    from dist_sae.config import Run
    from dist_sae.report.outcome import Findings


def add(analyses: shared.Commands) -> None:
    """Add the analysis."""
    text = "whether a latent fires wherever its concept occurs, and only there, without filter bias"
    parser = common.add_analysis(analyses, "sensitivity", main, text)
    parser.add_argument(
        "--ask",
        metavar="LATENT=JUDGE",
        action="append",
        default=[],
        help="a latent, and the judge of where its concept occurs: re:PATTERN, words:LIST (a "
        "built-in list or a file), labels:FILE (a sample drawn with --draw, with labels), "
        "model:FOLDER or model:FOLDER#LABEL (a classifier of texts), llm:DESCRIPTION (a language "
        "model at --endpoint)",
    )
    parser.add_argument(
        "--passage",
        metavar="TOKENS",
        type=int,
        default=32,
        help="tokens of a passage, the unit that is judged (default: 32); 1: each token",
    )
    parser.add_argument(
        "--filter",
        metavar="JUDGE",
        help="judge every passage that this judge accepts, but only a share of the others",
    )
    parser.add_argument(
        "--share",
        metavar="SHARE",
        type=float,
        help="share that is judged of the passages that the filter rejects",
    )
    parser.add_argument(
        "--draw",
        metavar="FILE",
        help="only write the sample to a file, to be labeled by people or a language model",
    )
    shared.add_endpoint(parser)


def main(options: argparse.Namespace) -> None:
    """Measure the latents' sensitivity, or draw a sample for judging."""
    run = shared.load(options)
    sampling = _sampling(options)
    if options.draw is not None:
        _draw(options, run, sampling)
        return
    pairs = _latent_judge_pairs(options, run, sampling)
    if pairs is None:  # only the estimate of the requests was printed
        return
    settings = {
        "ask": options.ask,
        "passage": options.passage,
        "filter": options.filter,
        "share": options.share,
        "endpoint": _endpoint_settings(options),
    }
    title = "Sensitivity: whether latents fire wherever their concept occurs"
    common.run_analysis(
        options, run.name, [run], title, settings, lambda: _find(run, pairs, sampling)
    )


def _endpoint_settings(options: argparse.Namespace) -> dict[str, str] | None:
    from dist_sae.endpoint.settings import read_endpoint

    if options.endpoint is None:
        return None
    endpoint = read_endpoint(options.endpoint)
    return {"url": endpoint.url, "model": endpoint.model}


def _sampling(options: argparse.Namespace) -> "Sampling":
    if options.passage < 1:
        raise ArgumentError(f"--passage {options.passage}: must be at least 1")
    if (options.filter is None) != (options.share is None):
        raise ArgumentError(
            "--filter and --share must be used together: without a share of the passages that the "
            "filter rejects, its misses would bias the estimates"
        )
    if options.share is not None and not 0 < options.share <= 1:
        raise ArgumentError(f"--share {options.share:g}: must be above 0 and at most 1")
    from dist_sae.analysis.judges import open_judge
    from dist_sae.analysis.llm_judge import is_llm_judge
    from dist_sae.analysis.passages import Sampling

    if options.filter is None:
        return Sampling(options.passage)
    if is_llm_judge(options.filter):
        raise ArgumentError(
            "--filter: judges every passage, so it must be re:PATTERN, words:LIST or model:"
        )
    judge = open_judge(options.filter)
    if judge.labels is not None:
        raise ArgumentError(
            "--filter: labels cover only a sample; use re:PATTERN, words:LIST or model:"
        )
    return Sampling(options.passage, judge, options.share)


def _latent_judge_pairs(
    options: argparse.Namespace, run: "Run", sampling: "Sampling"
) -> "list[tuple[int, Judge]] | None":
    """Return latents with their judges, or None if the user has not agreed to send requests."""
    from dist_sae.analysis.judges import open_judge
    from dist_sae.analysis.llm_judge import is_llm_judge

    if not options.ask:
        raise ArgumentError('--ask: name a latent and a judge: --ask "683=re:\\bother\\b"')
    named = []
    for text in options.ask:
        latent, separator, judge = text.partition("=")
        if not separator or not latent.strip().isdigit():
            raise ArgumentError(f"--ask {text}: is not LATENT=JUDGE")
        named.append((int(latent), judge))
    judges = {judge: open_judge(judge) for _, judge in named if not is_llm_judge(judge)}
    if asked := list(dict.fromkeys(judge for _, judge in named if is_llm_judge(judge))):
        found = _llm_judges(options, run, sampling, asked)
        if found is None:
            return None
        judges |= found
    return [(latent, judges[judge]) for latent, judge in named]


def _llm_judges(
    options: argparse.Namespace, run: "Run", sampling: "Sampling", texts: "Sequence[str]"
) -> "dict[str, Judge] | None":
    """Return judges that ask a language model, or None if the user has not agreed to that."""
    from dist_sae.analysis.indexed_run import open_indexed_run
    from dist_sae.analysis.llm_judge import judge_from_answers, questions
    from dist_sae.analysis.passages import draw_passages
    from dist_sae.analysis.words import TokenTexts

    endpoint = shared.open_endpoint(options, run)
    indexed = open_indexed_run(run)
    drawn = draw_passages(indexed.index, TokenTexts(indexed.tokenizer(), []), sampling)
    asked = [question for text in texts for question in questions(text, drawn)]
    if not shared.confirm_requests(options, endpoint, asked):
        return None
    answers = endpoint.ask(asked, "judge")
    n = len(drawn)
    return {
        text: judge_from_answers(text, drawn, answers[place * n : place * n + n])
        for place, text in enumerate(texts)
    }


def _find(run: "Run", pairs: "list[tuple[int, Judge]]", sampling: "Sampling") -> "Findings":
    import numpy as np

    from dist_sae.analysis.indexed_run import open_indexed_run
    from dist_sae.analysis.passages import PEERS, judge_passages
    from dist_sae.analysis.sensitivity import measure, sensitivity
    from dist_sae.analysis.words import TokenTexts

    indexed = open_indexed_run(run)
    index = indexed.index
    index.check_all_postings("sensitivity")
    largest = [index.latent(latent).max for latent, _ in pairs]  # raises for an unknown latent
    tokens = TokenTexts(indexed.tokenizer(), [])
    others = np.setdiff1d(np.flatnonzero(index.firings), [latent for latent, _ in pairs])
    peers = np.random.default_rng(0).permutation(others)[:PEERS].tolist()
    judged = judge_passages(index, tokens, pairs, sampling, peers)
    return sensitivity(
        [
            measure(latent, judge.text, top, found)
            for (latent, judge), top, found in zip(pairs, largest, judged, strict=True)
        ],
        list(dict.fromkeys(judge.caveat for _, judge in pairs if judge.caveat)),
    )


def _draw(options: argparse.Namespace, run: "Run", sampling: "Sampling") -> None:
    from dist_sae.analysis.indexed_run import open_indexed_run
    from dist_sae.analysis.judges import write_sample
    from dist_sae.analysis.passages import draw_passages
    from dist_sae.analysis.words import TokenTexts

    indexed = open_indexed_run(run)
    tokens = TokenTexts(indexed.tokenizer(), [])
    drawn = draw_passages(indexed.index, tokens, sampling)
    write_sample(options.draw, drawn)
    inside = sum(label.in_filter for _, label, _ in drawn)
    shared.print_lines(
        options,
        {"passages": len(drawn), "in_filter": inside, "file": options.draw},
        [
            f"{options.draw}: {len(drawn):,} passages, {inside:,} of them accepted by the filter, "
            f"in random order; set their labels to levels from 0 to 3, starting at the top (you "
            f"may stop anywhere), then use --ask LATENT=labels:{options.draw} with the same "
            f"--passage"
        ],
    )
