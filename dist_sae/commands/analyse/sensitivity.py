"""`dist-sae analyse sensitivity`: does a latent fire wherever its concept is?"""

import argparse
from typing import TYPE_CHECKING

from dist_sae.commands import shared
from dist_sae.commands.analyse import common
from dist_sae.errors import ArgumentError

if TYPE_CHECKING:
    from dist_sae.analysis.judges import Judge
    from dist_sae.analysis.passages import Sampling
    from dist_sae.config import Run
    from dist_sae.report.outcome import Findings


def add(questions: shared.Commands) -> None:
    """Add the question."""
    text = (
        "does a latent fire wherever its concept is, and only there; without the bias of a filter"
    )
    parser = common.add_question(questions, "sensitivity", main, text)
    parser.add_argument(
        "--ask",
        metavar="LATENT=JUDGE",
        action="append",
        default=[],
        help="a latent, and who says where its concept is: re:PATTERN, words:LIST (a list that "
        "comes along, or a file), labels:FILE (a sample drawn with --draw, with labels)",
    )
    parser.add_argument(
        "--passage",
        metavar="TOKENS",
        type=int,
        default=32,
        help="tokens of a passage, the text that is judged at once (default: 32); 1: each token",
    )
    parser.add_argument(
        "--filter",
        metavar="JUDGE",
        help="judge every passage that this one passes, and of the others only a share",
    )
    parser.add_argument(
        "--share",
        metavar="SHARE",
        type=float,
        help="share of the passages that are judged although the filter does not pass them",
    )
    parser.add_argument(
        "--draw",
        metavar="FILE",
        help="write the sample to a file, to be judged by people or a language model; asks nothing",
    )


def main(options: argparse.Namespace) -> None:
    """Answer the question, or draw a sample for it."""
    run = shared.load(options)
    sampling = _sampling(options)
    if options.draw is not None:
        _draw(options, run, sampling)
        return
    asks = _asks(options)
    settings = {
        "ask": options.ask,
        "passage": options.passage,
        "filter": options.filter,
        "share": options.share,
    }
    title = "Sensitivity: do latents fire wherever their concept is"
    common.answer(options, run.name, [run], title, settings, lambda: _find(run, asks, sampling))


def _sampling(options: argparse.Namespace) -> "Sampling":
    if options.passage < 1:
        raise ArgumentError(f"--passage {options.passage}: must be 1 at least")
    if (options.filter is None) != (options.share is None):
        raise ArgumentError(
            "--filter and --share go together: without a share of what the filter does not pass, "
            "its faults would be the latent's"
        )
    if options.share is not None and not 0 < options.share <= 1:
        raise ArgumentError(f"--share {options.share:g}: must lie above 0 and be 1 at most")
    from dist_sae.analysis.judges import open_judge
    from dist_sae.analysis.passages import Sampling

    if options.filter is None:
        return Sampling(options.passage)
    judge = open_judge(options.filter)
    if judge.labels is not None:
        raise ArgumentError("--filter: labels are of a sample; name re:PATTERN or words:LIST")
    return Sampling(options.passage, judge, options.share)


def _asks(options: argparse.Namespace) -> "list[tuple[int, Judge]]":
    from dist_sae.analysis.judges import open_judge

    if not options.ask:
        raise ArgumentError('--ask: name a latent and a judge: --ask "683=re:\\bother\\b"')
    asks = []
    for text in options.ask:
        latent, separator, judge = text.partition("=")
        if not separator or not latent.strip().isdigit():
            raise ArgumentError(f"--ask {text}: is no LATENT=JUDGE")
        asks.append((int(latent), open_judge(judge)))
    return asks


def _find(run: "Run", asks: "list[tuple[int, Judge]]", sampling: "Sampling") -> "Findings":
    from dist_sae.analysis.passages import judge_passages
    from dist_sae.analysis.sensitivity import measure, sensitivity
    from dist_sae.analysis.subject import open_subject
    from dist_sae.analysis.words import TokenTexts

    subject = open_subject(run)
    index = subject.index
    index.check_all_postings("sensitivity")
    largest = [index.latent(latent).max for latent, _ in asks]  # an unknown one is refused here
    tokens = TokenTexts(subject.tokenizer(), [])
    judged = judge_passages(index, tokens, asks, sampling)
    return sensitivity(
        [
            measure(latent, judge.text, top, found)
            for (latent, judge), top, found in zip(asks, largest, judged, strict=True)
        ]
    )


def _draw(options: argparse.Namespace, run: "Run", sampling: "Sampling") -> None:
    from dist_sae.analysis.judges import write_sample
    from dist_sae.analysis.passages import draw_passages
    from dist_sae.analysis.subject import open_subject
    from dist_sae.analysis.words import TokenTexts

    subject = open_subject(run)
    tokens = TokenTexts(subject.tokenizer(), [])
    drawn = draw_passages(subject.index, tokens, sampling)
    write_sample(options.draw, drawn)
    inside = sum(label.in_filter for _, label, _ in drawn)
    shared.print_lines(
        options,
        {"passages": len(drawn), "in_filter": inside, "file": options.draw},
        [
            f"{options.draw}: {len(drawn):,} passages, {inside:,} of them in the filter, in random "
            f"order; set their labels to levels from 0 to 3, from the first line on as far as you "
            f"get, then ask with labels:{options.draw} and the same --passage"
        ],
    )
