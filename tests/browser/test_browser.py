"""`dist-sae browse` on a tiny language model: pages over HTTP, and as files."""

import html
import http.client
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import pytest

from dist_sae.browser.lists import PAGE_LATENTS
from dist_sae.browser.pages import Pages
from dist_sae.commands.cli import main
from dist_sae.config import Run
from dist_sae.explaining.explain import ExplainPlan
from dist_sae.explaining.scoring import Verdict
from dist_sae.explaining.stored import ExplanationSet, LatentExplanation
from dist_sae.index.query import Index
from dist_sae.notebook.run import OpenedRun
from tests.browser.served_runs import (
    CLUSTERS,
    index_of,
    indexed_run,
    keep_map,
    place,
    served,
    sibling_run,
)
from tests.notebook.raw import initialised, save_dictionary

pytestmark = pytest.mark.system


class Answer(NamedTuple):
    status: int
    text: str
    headers: http.client.HTTPMessage

    @property
    def latents(self) -> list[int]:
        """The latents that a list links to, in order."""
        return [int(n) for n in re.findall(r'<td><a href="/latent/(\d+)[?"]', self.text)]

    @property
    def said(self) -> str:
        """The text of the page's main part without tags, on one line."""
        body = self.text.partition("<main>")[2].partition("</main>")[0]
        return " ".join(html.unescape(re.sub("<[^>]+>", " ", body)).split())


Ask = Callable[..., Answer]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = indexed_run(tmp_path_factory.mktemp("language"))
    keep_map(run)
    return run


@pytest.fixture(scope="module")
def other(run: Run) -> Run:
    return sibling_run(run, "other")


@pytest.fixture(scope="module")
def index(run: Run) -> Index:
    return index_of(run)


@contextmanager
def asking(pages: Pages, host: str = "127.0.0.1") -> Iterator[tuple[Ask, str]]:
    with served(pages, host) as (url, port):

        def ask(where: str, **headers: str) -> Answer:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", where, headers=headers)
            answer = connection.getresponse()
            found = Answer(answer.status, answer.read().decode(), answer.headers)
            connection.close()
            return found

        yield ask, url


@pytest.fixture(scope="module")
def ask(run: Run, other: Run) -> Iterator[Ask]:
    with asking(Pages(OpenedRun(run), None, other=OpenedRun(other))) as (asked, _):
        yield asked


def densest(index: Index) -> list[int]:
    return sorted(np.flatnonzero(index.firings).tolist(), key=lambda n: (-index.firings[n], n))


def test_the_list_has_all_latents_that_fire_the_densest_first(ask: Ask, index: Index) -> None:
    expected = densest(index)
    pages = [ask(f"/?page={n}") for n in range(-(-len(expected) // PAGE_LATENTS))]
    assert [n for page in pages for n in page.latents] == expected
    assert f"{len(expected)} of 64 latents" in pages[0].text


def test_a_list_is_sorted_and_cut_as_asked(ask: Ask, index: Index) -> None:
    pages = {n: index.latent(n) for n in densest(index)}
    by_max = sorted(sorted(pages), key=lambda n: -pages[n].max)
    assert ask("/?sort=max").latents == by_max[:PAGE_LATENTS]
    effects = {n: page.top_tokens[0].logit * page.max for n, page in pages.items()}
    by_effect = sorted(sorted(pages), key=lambda n: -effects[n])
    assert ask("/?sort=effect").latents == by_effect[:PAGE_LATENTS]
    middle = effects[by_effect[20]] * 0.99999
    assert ask(f"/?sort=effect&effect={middle}").latents == by_effect[:21]
    between = [n for n in sorted(pages) if 0.02 <= pages[n].density <= 0.05]
    assert 0 < len(between) < PAGE_LATENTS
    assert ask("/?sort=latent&least=2&most=5").latents == between


def test_a_list_is_sorted_and_cut_by_cluster(ask: Ask, index: Index) -> None:
    alive = densest(index)
    inside = [n for n in alive if n < 60 and n % 3 == 1]
    answer = ask("/?cluster=1.1")
    assert answer.latents == inside
    assert "in cluster d, e" in answer.said
    ranks = {n: (n % 2, n % 3) if n < 60 else (9, 9) for n in alive}
    both = [n for page in (0, 1) for n in ask(f"/?sort=cluster&page={page}").latents]
    assert both == sorted(alive, key=lambda n: (ranks[n], alive.index(n)))
    clusters = ask("/clusters?level=1")
    assert re.findall(r"cluster=(1\.\d)", clusters.text) == ["1.0", "1.1", "1.2"]
    assert "d 20 0.5 0.75" in clusters.said


def test_a_row_says_what_a_latent_fires_on(ask: Ask, index: Index, run: Run) -> None:
    """The row lists the most frequent tokens among the largest activations.

    Tokens that are equally frequent are ordered by their largest activation.
    """
    tokens = [firing.token for firing in index.latent(3).largest]
    order = sorted(set(tokens), key=lambda token: (-tokens.count(token), tokens.index(token)))
    named = OpenedRun(run).tokenizer().batch_decode([[token] for token in order[:5]])
    row = re.search(r'<tr><td><a href="/latent/3\?.*?</tr>', ask("/?most=100").text, re.S)
    assert row
    cells = re.findall(r"<td>(.*?)</td>", row[0], re.S)
    assert re.findall(r'class="word">(.*?)</span>', cells[4]) == list(map(html.escape, named))
    assert cells[-1].endswith(">d</a>")  # its finest cluster is 3 % 3


def test_a_latent_has_a_page_with_its_texts_and_neighbours(ask: Ask, index: Index) -> None:
    latent = densest(index)[0]
    page, found = index.latent(latent), ask(f"/latent/{latent}")
    assert f"{page.firings:,} times" in found.said
    assert found.text.count('class="peak"') == found.text.count('<li title="document')
    assert f'<a href="/latent/{page.nearest[0].latent}">' in found.text
    assert f'<a href="/latent/{page.coactive[0].latent}">' in found.text
    for heading in ("Largest activations", "highest tenth", "lowest tenth", "raises", "lowers"):
        assert heading in found.said
    assert f"highest tenth {page.deciles[8]:.3g} to {page.max:.3g}" in found.said
    assert '<rect class="bar"' in found.text
    kept = {d for d in range(10) if any(e.decile == d for e in page.examples)}
    assert found.text.count('<h3 class="decile">') == len(kept)


def test_explanations_are_on_a_page_and_in_a_comparison(ask: Ask, index: Index, other: Run) -> None:
    verdicts = [Verdict("active", 3, yes=True), Verdict("random", None, yes=False)]
    latent = densest(index)[0]
    for of, words, n in ((index, "our words", latent), (index_of(other), "their words", 3)):
        told = LatentExplanation(n, words, "", verdicts)
        ExplanationSet(of, "mine").add(ExplainPlan().settings_for(of, "m", "m"), [told])
    assert "our words mine; detection 1.00 (" in ask(f"/latent/{latent}").said
    compared = ask(f"/compare?latent={latent}&other=3").said
    assert "our words mine; " in compared
    assert "their words mine; " in compared


def test_a_latent_has_its_place_on_the_map(ask: Ask, run: Run, other: Run) -> None:
    found = ask("/latent/8")
    assert '<a href="/map#8"' in found.text
    assert re.findall(r"cluster=(\S+)\">", found.text) == ["0.0", "1.2"]
    assert "a, b 30 latents, stability 0.75" in found.said
    assert "child of 4" in found.said
    (circle,) = re.findall(r'<circle cx="(\d+)" cy="(\d+)" r="5"/>', found.text)
    # coordinates are about -1 to 1 on both axes, and the map is 200 wide
    assert [int(v) / 100 - 1 for v in circle] == pytest.approx([np.cos(8), np.sin(8)], abs=0.02)
    assert ask("/map").text.count("<canvas") == 2
    with asking(Pages(OpenedRun(other), None)) as (without, _):
        assert "small-map" not in without("/latent/8").text.partition("</head>")[2]
        assert 'href="/map"' not in without("/").text


def test_a_map_of_another_checkpoint_is_not_shown(
    run: Run, other: Run, caplog: pytest.LogCaptureFixture
) -> None:
    keep_map(other, checkpoint="0" * 64)
    with asking(Pages(OpenedRun(other), None)) as (asked, _):
        assert 'href="/map"' not in asked("/").text
    assert "they were computed from another checkpoint; run `dist-sae analyse map`" in caplog.text


def test_a_latent_of_a_list_leads_to_the_next_of_the_list(ask: Ask, index: Index) -> None:
    order = densest(index)[::-1]
    latent, page = order[52], ask(f"/latent/{order[52]}?sort=rarity")
    expected = sorted(range(64), key=lambda n: (index.firings[n], n))
    order = [n for n in expected if index.firings[n]]
    at = order.index(latent)
    links = dict(re.findall(r'<a rel="(\w+)" href="([^"]+)">', html.unescape(page.text)))
    assert links["prev"] == f"/latent/{order[at - 1]}?sort=rarity"
    assert links["next"] == f"/latent/{order[at + 1]}?sort=rarity"
    assert links["up"] == f"/?sort=rarity&page={at // PAGE_LATENTS}"
    alone = dict(re.findall(r'<a rel="(\w+)" href="([^"]+)">', ask("/latent/8").text))
    assert alone == {"prev": "/latent/7", "next": "/latent/9", "compare": "/compare?latent=8"}


@pytest.mark.parametrize("kind", ["token", "regex", "latent", "text"])
def test_what_is_searched_for_is_found(ask: Ask, index: Index, run: Run, kind: str) -> None:
    opened = OpenedRun(run)
    token = opened.tokenizer().decode([index.latent(3).largest[0].token])
    asked = {"token": token, "regex": re.escape(token), "latent": "3", "text": "abcab"}[kind]
    answer = ask(f"/search?kind={kind}&asked={quote(asked)}")
    assert answer.status == 200
    if kind == "latent":
        assert "Latent 3" in answer.text
    elif kind == "text":
        strongest = [each.latents[0] for each in opened.active_on(asked) if each.latents]
        by_token = answer.text.partition('<table class="tokens">')[2]
        firsts = re.findall(r'</span></td><td><a href="/latent/(\d+)">', by_token)
        assert list(map(int, firsts)) == strongest
    else:
        matches = opened.index().search(**{kind: asked}, top=64)
        assert answer.latents == [match.latent for match in matches][:PAGE_LATENTS]
        assert f"{matches[0].hits} of {matches[0].examples}" in answer.said
        more = ask(f"/search?kind={kind}&asked={quote(asked)}&page=1")
        assert more.latents == [match.latent for match in matches][PAGE_LATENTS:]


def test_a_text_is_coloured_by_the_latent_that_is_chosen(ask: Ask, run: Run) -> None:
    text = "so it\r\nwas"  # as forms send it; the model's tokens are bytes
    found = OpenedRun(run).active_on("so it\nwas", top=64)
    peaks = {n: a for each in found for n, a in zip(each.latents, each.acts, strict=True)}
    latent = min(peaks, key=lambda n: (sum(n in each.latents for each in found), n))
    page = ask(f"/search?kind=text&asked={quote(text)}&latent={latent}")
    passage = re.search(r'<p class="text passage">(.*?)</p>', page.text, re.S)
    assert passage
    marked = re.findall(r"<mark[^>]*>(.*?)</mark>", passage[1])
    assert len(marked) == sum(latent in each.latents for each in found)
    assert f"{len(peaks)} latents fire on these 9 tokens" in page.said
    # the latents that are strongest on the text come first, in separate rows
    best = max((a, n) for each in found for n, a in zip(each.latents, each.acts, strict=True))[1]
    assert page.latents[0] == best


def test_a_latent_is_compared_with_the_nearest_of_another_run(
    ask: Ask, run: Run, other: Run, index: Index
) -> None:
    """Rows on which both latents fire are counted, because both dictionaries read the same rows."""
    one, two = (OpenedRun(each).dictionary().sae.W_dec.detach().double() for each in (run, other))
    cosines = one[8] @ two.T / one[8].norm() / two.norm(dim=1)
    nearest = cosines.argsort(descending=True)[:5].tolist()
    page = ask("/compare?latent=8")
    assert f"Latent {nearest[0]}" in page.text
    for n in nearest[1:]:
        assert f'<a href="/compare?latent=8&amp;other={n}">{n}</a>' in page.text
        assert f"{n} {cosines[n]:.3f}" in page.said
    chosen = ask(f"/compare?latent=8&other={nearest[3]}")
    assert [int(n) for n in re.findall(r"<h2>Latent (\d+)</h2>", chosen.text)] == [8, nearest[3]]
    rows = []
    for each, latent in ((index, 8), (index_of(other), nearest[3])):
        tables = [table.to_pylist() for table in each.postings(latent)]
        rows.append({(line["unit"], line["row"]) for table in tables for line in table})
    assert f"both fire on {len(rows[0] & rows[1])} rows" in chosen.said


@pytest.mark.parametrize(
    ("where", "status", "message"),
    [
        ("/latent/64", 404, "latent 64: "),
        ("/nothing", 404, "no page /nothing"),
        ("/?page=9", 400, "page: 9: there are pages 0 to "),
        ("/?page=-1", 400, "page: -1: must be a whole number"),
        ("/?least=much", 400, "least: much: is not a number"),
        ("/?most=nan", 400, "most: nan: is not a number"),
        ("/?sort=colour", 400, "sort: colour: must be one of density"),
        ("/?cluster=7.0", 400, "cluster: 7.0: the map has no such cluster"),
        ("/?cluster=a", 400, "cluster: a: the map has no such cluster"),
        ("/clusters?level=2", 400, "level: 2: there are levels 0 to 1"),
        ("/search?kind=regex&asked=(", 400, "is not a regular expression"),
        ("/search?kind=token&asked=abcabc", 400, "is not one token of the model"),
        ("/search?kind=smell&asked=a", 400, "kind: smell: must be one of latent, token"),
        ("/search?kind=latent&asked=<b>", 400, "latent: <b>: must be a whole number"),
        ("/search?kind=text&asked=", 400, "text: has no tokens"),
        ("/compare?latent=1&other=64", 404, "latent 64: "),
    ],
)
def test_a_wrong_question_is_answered_in_one_line(
    ask: Ask, where: str, status: int, message: str
) -> None:
    answer = ask(where)
    assert answer.status == status
    assert message in html.unescape(answer.text)
    assert "<b>:" not in answer.text


def test_what_is_not_there_is_said(run: Run, other: Run, tmp_path: Path) -> None:
    """The run has no map and no other run to compare with, and its model was deleted."""
    moved = other.model_copy(
        update={"model": other.model.model_copy(update={"path": str(tmp_path / "gone")})}
    )
    with asking(Pages(OpenedRun(moved), None)) as (ask, _):
        for where, message in (
            ("/?sort=cluster", "cluster: there is no map"),
            ("/?cluster=0.0", "cluster: 0.0: the map has no such cluster"),
            ("/clusters", "there is no map yet; run `dist-sae analyse map`"),
            ("/map", "there is no map yet; run `dist-sae analyse map`"),
            ("/compare?latent=1", "start `dist-sae browse` with --compare RUN"),
            ("/search?kind=token&asked=a", "tokens cannot be read: "),
            ("/search?kind=text&asked=a", "gone"),
        ):
            answer = ask(where)
            assert answer.status in (400, 503)
            assert message in answer.said
        assert "#" in ask("/").said  # numbers of tokens


def test_only_names_of_this_machine_are_answered(ask: Ask) -> None:
    """An unknown Host header is refused.

    Otherwise a foreign page could point its own name to this machine (DNS rebinding), and its
    browser could read every page.
    """
    assert ask("/", Host="elsewhere.example").status == 403
    assert ask("/", Host="localhost:1").status == 200
    assert "default-src 'none'" in ask("/").headers["Content-Security-Policy"]


def test_elsewhere_a_token_is_needed(run: Run) -> None:
    """The token sets a cookie.

    The redirect drops the token from the URL and keeps the rest of the URL.
    """
    with asking(Pages(OpenedRun(run), None), "0.0.0.0") as (ask, url):
        found = re.fullmatch(r"http://(\S+):(\d+)/\?token=(\S{32})", url)
        assert found
        name, port, token = found.groups()
        assert name == socket.gethostname()
        assert ask("/").status == ask("/?token=x").status == 403
        answer = ask(f"/latent/5?sort=max&token={token}", Host="elsewhere.example")
        assert (answer.status, answer.headers["Location"]) == (303, "/latent/5?sort=max")
        away = ask(f"//elsewhere.example/?token={token}")
        assert away.headers["Location"].startswith("/elsewhere.example/")
        cookie = answer.headers["Set-Cookie"]
        assert {"HttpOnly", "SameSite=Lax"} <= set(cookie.split("; "))
        assert cookie.startswith(f"dist-sae-token-{port}=")
        assert ask("/", Cookie=cookie.partition(";")[0]).status == 200


def test_a_port_in_use_is_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with served(Pages(OpenedRun(run), None)) as (_, port):
        assert main(["browse", place(run), "--port", str(port)]) == 2
        assert f"browse: 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err
    assert main(["browse", place(run), "--port", "99999"]) == 2
    assert "browse: 127.0.0.1:99999: bind(): port must be 0-65535" in capsys.readouterr().err


def test_runs_that_cannot_be_browsed_or_compared_get_one_line(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = run.model_copy(update={"name": "bare"})
    save_dictionary(bare, initialised(bare, 24, 3), 7)
    wider = indexed_run(tmp_path, d_in=32)
    site = {"train": run.train.model_copy(update={"site": "attn_out.0"})}
    elsewhere = sibling_run(run.model_copy(update=site), "elsewhere")
    for arguments, message in (
        ([place(bare)], "bare: has no latent index yet; run `dist-sae index`"),
        ([place(run), "--compare", place(bare)], "bare: has no latent index yet"),
        (
            [place(run), "--compare", place(wider)],
            "language and language: have decoder rows of 24 and 32 numbers; latents can be "
            "compared only if both runs use the same model",
        ),
        (
            [place(run), "--compare", place(elsewhere)],
            "language writes resid_post.1 and elsewhere writes attn_out.0: latents can be matched "
            "only if both write the same sites",
        ),
        ([place(run), "--latents", "5"], "--latents: needs --static; give both"),
        ([place(run), "--static", "/dev/null/a"], "--static: /dev/null/a: Not a directory"),
        ([place(run), "--static", str(tmp_path / "a"), "--latents", "64"], "latent 64: "),
    ):
        assert main(["browse", *arguments, "--port", "0"]) == 2
        said = capsys.readouterr().err.splitlines()
        errors = [line for line in said if line.startswith("error: ")]
        assert len(errors) == 1
        assert message in errors[0]


def test_an_index_without_postings_is_browsed(tmp_path: Path) -> None:
    """Only the peak of an example is certain to be colored, and shared rows are not counted."""
    run = indexed_run(tmp_path, index={"postings": "none", "neighbours": 0, "output_tokens": 0})
    with asking(Pages(OpenedRun(run), None, other=OpenedRun(run))) as (ask, _):
        latent = ask("/").latents[0]
        page = ask(f"/latent/{latent}")
        assert page.status == 200
        assert page.text.count('class="peak"') == page.text.count('<li title="document') > 0
        assert "Nearest, by" not in page.text
        assert ask("/?sort=effect").status == 400
        assert "effect at least" not in ask("/").text
        assert "both fire on" not in ask(f"/compare?latent={latent}").text


def test_pages_of_some_latents_are_files(
    run: Run, other: Run, tmp_path: Path, index: Index
) -> None:
    """The pages link only to one another."""
    chosen = [5, *(near.latent for near in index.latent(5).nearest[:2])]
    arguments = ["--static", str(tmp_path), "--latents", *map(str, chosen)]
    assert main(["browse", place(run), *arguments, "--compare", place(other)]) == 0
    pages = [f"{what}-{n}.html" for n in chosen for what in ("latent", "compare")]
    assert {file.name for file in tmp_path.iterdir()} == {"index.html", "map.html", *pages}
    for file in tmp_path.iterdir():
        if file.name == "map.html":
            continue
        text = file.read_text()
        links = re.findall(r'href="([^"#]+)', text)
        assert links
        assert all((tmp_path / link).exists() for link in links)
        assert "<script" not in text
    assert ", ".join(CLUSTERS["0"][1]) in (tmp_path / "latent-5.html").read_text()
