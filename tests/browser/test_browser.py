"""`dist-sae browse` on a tiny language model: pages over HTTP, and as files."""

import html
import http.client
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dist_sae.browser.pages import PAGE_LATENTS, Pages
from dist_sae.browser.server import serve
from dist_sae.commands.cli import main
from dist_sae.config import Run
from dist_sae.index.query import Index
from dist_sae.notebook.run import OpenedRun
from dist_sae.storage import open_store
from tests.index.indexed import make_index
from tests.notebook.raw import initialised, language_run, save_dictionary, save_language_model


class Answer(NamedTuple):
    status: int
    text: str
    headers: http.client.HTTPMessage

    @property
    def latents(self) -> list[int]:
        """Latents that a list links to, in order."""
        return [int(n) for n in re.findall(r'<td><a href="/latent/(\d+)">', self.text)]


Ask = Callable[..., Answer]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("language")
    run = language_run(folder, save_language_model(folder / "model"))
    save_dictionary(run, initialised(run, 24, 1), 7)
    make_index(run)
    return run


@pytest.fixture(scope="module")
def index(run: Run) -> Index:
    return Index(open_store(run.store.runs), run.name)


def asking(run: Run, host: str) -> Iterator[tuple[Ask, str]]:
    with serve(Pages(OpenedRun(run), None), host, 0) as (server, url):
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def ask(place: str, **headers: str) -> Answer:
            connection = http.client.HTTPConnection(host, server.server_address[1])
            connection.request("GET", place, headers=headers)
            answer = connection.getresponse()
            found = Answer(answer.status, answer.read().decode(), answer.headers)
            connection.close()
            return found

        try:
            yield ask, url
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def ask(run: Run) -> Iterator[Ask]:
    for asked, _ in asking(run, "127.0.0.1"):
        yield asked


def test_the_list_has_all_latents_that_fire_the_densest_first(ask: Ask, index: Index) -> None:
    alive = [n for n in range(64) if index.firings[n]]
    expected = sorted(alive, key=lambda n: -index.firings[n])
    pages = [ask(f"/?page={n}") for n in range(-(-len(alive) // PAGE_LATENTS))]
    assert [n for page in pages for n in page.latents] == expected
    assert f"{len(alive)} of 64 latents" in pages[0].text


def test_a_list_is_sorted_and_cut_by_density_as_asked(ask: Ask, index: Index) -> None:
    pages = {n: index.latent(n) for n in range(64)}
    by_max = sorted((n for n in pages if pages[n].firings), key=lambda n: -pages[n].max)
    assert ask("/?sort=max").latents == by_max[:PAGE_LATENTS]
    effects = {n: page.top_tokens[0].logit * page.max for n, page in pages.items() if page.firings}
    assert ask("/?sort=effect").latents[0] == max(effects, key=effects.__getitem__)
    between = [n for n in pages if 0.02 <= pages[n].density <= 0.05]
    assert 0 < len(between) < PAGE_LATENTS
    assert ask("/?sort=latent&least=2&most=5").latents == between


def test_the_tokens_of_a_list_are_asked_for_later(ask: Ask, index: Index) -> None:
    """Their answer is JSON, in the order of the question."""
    (first, second), answer = ask("/").latents[:2], ask("/briefs?latents=3,1")
    assert f'data-latent="{first}"' in ask("/").text
    briefs = json.loads(answer.text)
    assert [brief["latent"] for brief in briefs] == [3, 1]
    assert briefs[0]["firings"] == index.latent(3).firings
    assert briefs[0]["fires_on"]
    assert first != second


def test_a_latent_has_a_page_with_its_texts_and_neighbours(ask: Ask, index: Index) -> None:
    latent = int(index.firings.argmax())
    page, found = index.latent(latent), ask(f"/latent/{latent}")
    assert f"{page.firings:,} firings" in found.text
    assert 'class="peak"' in found.text
    assert f'<a href="/latent/{page.nearest[0].latent}">' in found.text
    assert ('rel="prev"' in found.text) == (latent > 0)


@pytest.mark.parametrize("kind", ["token", "regex", "latent", "text"])
def test_what_is_searched_for_is_found(ask: Ask, index: Index, run: Run, kind: str) -> None:
    opened = OpenedRun(run)
    token = opened.tokenizer().decode([index.latent(3).largest[0].token])
    asked = {"token": token, "regex": re.escape(token), "latent": "3", "text": "abcab"}[kind]
    connection = ask(f"/search?kind={kind}&asked={asked}")
    assert connection.status == 200
    if kind == "latent":
        assert "Latent 3" in connection.text
    elif kind == "text":
        strongest = [each.latents[0] for each in opened.active_on(asked) if each.latents]
        firsts = re.findall(r'</span></td><td><a href="/latent/(\d+)">', connection.text)
        assert list(map(int, firsts)) == strongest
    else:
        wanted = {kind: token if kind == "token" else re.escape(token)}
        matches = opened.index().search(**wanted)
        assert connection.latents == [match.latent for match in matches][:20]


@pytest.mark.parametrize(
    ("place", "status", "message"),
    [
        ("/latent/64", 404, "latent 64: "),
        ("/nothing", 404, "no page /nothing"),
        ("/?page=9", 400, "page: 9: there are pages 0 to "),
        ("/?least=much", 400, "densities and pages are numbers"),
        ("/?sort=colour", 400, "sort: colour: is none of density"),
        ("/search?kind=regex&asked=(", 400, "is not a regular expression"),
        ("/search?kind=token&asked=abcabc", 400, "is not one token of the model"),
        ("/search?kind=smell&asked=a", 400, "kind: smell: is none of latent, token"),
        ("/briefs?latents=one", 400, "one"),
        ("/search?kind=latent&asked=<b>", 400, "latent: <b>: is not a number"),
    ],
)
def test_a_wrong_question_is_answered_in_one_line(
    ask: Ask, place: str, status: int, message: str
) -> None:
    answer = ask(place)
    assert answer.status == status
    assert message in html.unescape(answer.text)
    assert "<b>:" not in answer.text


def test_only_names_of_this_machine_are_answered(ask: Ask) -> None:
    """A page elsewhere may have a name that leads here: its browser would read what it likes."""
    assert ask("/", Host="elsewhere.example").status == 403
    assert ask("/", Host="localhost:1").status == 200
    assert "default-src 'none'" in ask("/").headers["Content-Security-Policy"]


def test_elsewhere_a_token_is_needed(run: Run) -> None:
    """The token gives a cookie, and leaves the address."""
    for ask, url in asking(run, "0.0.0.0"):
        token = re.fullmatch(r"http://0\.0\.0\.0:\d+/\?token=(\S{32})", url)
        assert token
        assert ask("/").status == ask("/?token=x").status == 403
        answer = ask(f"/?token={token[1]}", Host="elsewhere.example")
        assert (answer.status, answer.headers["Location"]) == (303, "/")
        cookie = answer.headers["Set-Cookie"]
        assert {"HttpOnly", "SameSite=Strict"} <= set(cookie.split("; "))
        assert ask("/", Cookie=cookie.partition(";")[0]).status == 200


def test_a_port_in_use_is_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    place = f"{run.store.runs}/{run.name}"
    for _, url in asking(run, "127.0.0.1"):
        port = url.rstrip("/").rpartition(":")[2]
        assert main(["browse", place, "--port", port]) == 2
        assert f"browse: 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err
    assert main(["browse", place, "--port", "99999"]) == 2
    assert "browse: 127.0.0.1:99999: bind(): port must be 0-65535" in capsys.readouterr().err


def test_pages_of_some_latents_are_files(run: Run, tmp_path: Path, index: Index) -> None:
    """They link to one another alone."""
    chosen = [5, *(near.latent for near in index.latent(5).nearest[:2])]
    place = f"{run.store.runs}/{run.name}"
    numbers = list(map(str, chosen))
    assert main(["browse", place, "--static", str(tmp_path), "--latents", *numbers]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {
        "index.html",
        *(f"latent-{n}.html" for n in chosen),
    }
    for file in tmp_path.iterdir():
        text = file.read_text()
        links = re.findall(r'href="([^"]+)"', text)
        assert links
        assert all((tmp_path / link).exists() for link in links)
        assert "<script" not in text
    assert main(["browse", place, "--latents", "5"]) == 2
