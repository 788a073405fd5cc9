"""`dist-sae browse` in a real browser: Debian's chromium, driven by playwright."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright

from dist_sae.browser.lists import PAGE_LATENTS
from dist_sae.browser.pages import Pages
from dist_sae.commands.cli import main
from dist_sae.config import Run
from dist_sae.index.query import Index
from dist_sae.notebook.run import OpenedRun
from tests.browser.served_runs import index_of, indexed_run, keep_map, place, served, sibling_run

pytestmark = pytest.mark.system
TEXT = "so it was\nsaid"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = indexed_run(tmp_path_factory.mktemp("language"))
    keep_map(run)
    return run


@pytest.fixture(scope="module")
def index(run: Run) -> Index:
    return index_of(run)


@pytest.fixture(scope="module")
def other(run: Run) -> Run:
    return sibling_run(run, "other")


@pytest.fixture(scope="module")
def url(run: Run, other: Run) -> Iterator[str]:
    with served(Pages(OpenedRun(run), None, other=OpenedRun(other))) as (url, _):
        yield url.rstrip("/")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    assert program, "apt-get install chromium, as launch/test.sh does"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A user's browser.

    The test fails if a page logs an error or sends a request to another machine.
    """
    faults: list[str] = []

    def watch(route: Route) -> None:
        name = urlsplit(route.request.url).hostname or ""
        if name not in ("127.0.0.1", ""):
            faults.append(f"asks {route.request.url}")
        route.continue_()

    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(10_000)
    context.route("**/*", watch)
    context.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    context.on("weberror", lambda fault: faults.append(str(fault.error)))
    yield context
    context.close()
    assert faults == []


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()


def latents(page: Page) -> list[int]:
    """The latents of a list."""
    return [int(text) for text in page.locator(".latents td:first-child a").all_inner_texts()]


def densest(index: Index) -> list[int]:
    firings = index.firings.tolist()
    return sorted((n for n in range(64) if firings[n]), key=lambda n: (-firings[n], n))


def search(page: Page, kind: str, asked: str) -> None:
    page.select_option("[name=kind]", kind)
    page.fill("[name=asked]", asked)
    page.press("[name=asked]", "Enter")
    page.wait_for_url(re.compile(f"kind={kind}&"))


def test_every_page_is_reached_from_the_list(page: Page, url: str, index: Index) -> None:
    """Links reach every page. `context` fails on an error or a request to another machine."""
    page.goto(url)
    assert latents(page) == densest(index)[:PAGE_LATENTS]
    page.click(".latents td:first-child a >> nth=2")
    expect(page.locator("h2")).to_have_text(f"Latent {densest(index)[2]}")
    expect(page.locator(".peak").first).to_be_visible()
    page.click(".neighbours a >> nth=0")
    expect(page.locator("h2")).to_have_text(
        f"Latent {index.latent(densest(index)[2]).nearest[0][0]}"
    )
    page.click("text=compare with other")
    expect(page.locator("h2")).to_have_count(2)
    page.click(".neighbours a >> nth=1")
    expect(page).to_have_url(re.compile(r"/compare\?latent=\d+&other=\d+$"))
    page.goto(f"{url}/latent/8")
    page.click(".small-map")
    expect(page.locator("#card")).to_contain_text("latent 8")
    page.click("#card a")
    expect(page).to_have_url(f"{url}/latent/8")
    page.goto(url)
    page.click("nav >> text=clusters")
    page.click("text=3 clusters")
    page.click("text=d, e")
    assert latents(page) == [n for n in densest(index) if n < 60 and n % 3 == 1]


def test_a_list_is_sorted_and_filtered_and_its_address_says_so(
    page: Page, context: BrowserContext, url: str, index: Index
) -> None:
    page.goto(url)
    page.fill("[name=least]", "2")
    page.fill("[name=most]", "5")
    with page.expect_navigation():
        page.select_option("[name=sort]", "latent")  # the list reloads at once
    between = [n for n in range(64) if 0.02 <= index.latent(n).density <= 0.05]
    assert latents(page) == between
    page.reload()
    assert latents(page) == between
    shared = context.new_page()
    shared.goto(page.url)
    assert latents(shared) == between
    assert shared.input_value("[name=least]") == "2"


def test_searches_are_found_and_their_addresses_say_so(
    page: Page, context: BrowserContext, url: str, run: Run, index: Index
) -> None:
    opened = OpenedRun(run)
    token = opened.tokenizer().decode([index.latent(3).largest[0].token])
    page.goto(url)
    for kind, asked in (("token", token), ("regex", f"^{token}$")):
        search(page, kind, asked)
        found = [match.latent for match in opened.index().search(**{kind: asked}, top=64)]
        assert latents(page) == found[:PAGE_LATENTS]
        assert page.input_value("[name=asked]") == asked
        shared = context.new_page()
        shared.goto(page.url)
        assert latents(shared) == latents(page)
    search(page, "latent", "12")
    expect(page.locator("h2")).to_have_text("Latent 12")


def test_a_pasted_text_shows_which_latents_fire_where(page: Page, url: str, run: Run) -> None:
    page.goto(url)
    search(page, "text", TEXT)
    assert page.input_value("[name=asked]") == TEXT
    found = OpenedRun(run).active_on(TEXT, top=64)
    words = page.locator(".tokens td:first-child").all_inner_texts()
    assert [word.replace("\u21b5", "\n") for word in words] == list(TEXT)
    page.click("text=color the text >> nth=2")
    latent = int(page.locator(".latents .now td:first-child").inner_text())
    marked = page.locator(".passage mark").all_inner_texts()
    assert marked == [
        each.token.replace("\n", "\u21b5") for each in found if latent in each.latents
    ]


def test_a_text_that_is_too_long_for_an_address_is_refused(page: Page, url: str) -> None:
    page.goto(url)
    page.select_option("[name=kind]", "text")
    page.fill("[name=asked]", "x" * 60_001)
    page.press("[name=asked]", "Enter")
    said = page.locator("[name=asked]").evaluate("asked => asked.validationMessage")
    assert said == "This text is too long for a URL. Search for a part of it."
    assert page.url == f"{url}/"
    page.fill("[name=asked]", "x")
    page.press("[name=asked]", "Enter")
    page.wait_for_url(re.compile("kind=text"))


def test_all_is_reached_by_keys(page: Page, url: str, index: Index) -> None:
    order = densest(index)
    page.goto(url)
    for key in "jjjk":
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    page.wait_for_url(f"{url}/latent/{order[1]}?sort=density")
    page.keyboard.press("j")
    page.wait_for_url(f"{url}/latent/{order[2]}?sort=density")
    page.keyboard.press("k")
    page.wait_for_url(f"{url}/latent/{order[1]}?sort=density")
    page.keyboard.press("c")
    page.wait_for_url(f"{url}/compare?latent={order[1]}")
    page.go_back()
    page.keyboard.press("u")
    page.wait_for_url(f"{url}/?sort=density")
    page.keyboard.press("ArrowRight")
    page.wait_for_url(f"{url}/?sort=density&page=1")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url(f"{url}/?sort=density")
    page.keyboard.press("/")
    page.keyboard.type("3")  # keys now go to the search field
    page.keyboard.press("Enter")
    expect(page.locator("h2")).to_have_text("Latent 3")


CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = (text) => rgb(text).map((v) => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const paper = light(getComputedStyle(document.body).backgroundColor);
  return [paper, ...["h2", ".about dt", "main a", ".examples .text"].map((each) => {
    const ink = light(getComputedStyle(document.querySelector(each)).color);
    return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
  })];
}"""


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_text_is_legible_in_the_dark_and_in_the_light(
    browser: Browser, url: str, scheme: str
) -> None:
    """Text has at least WCAG's contrast of 4.5 on the background of each color scheme."""
    page = browser.new_page(color_scheme="dark" if scheme == "dark" else "light")
    page.goto(f"{url}/latent/8")
    paper, *contrasts = page.evaluate(CONTRAST)
    assert paper < 0.05 if scheme == "dark" else paper > 0.9
    assert min(contrasts) > 4.5
    page.close()


def test_elsewhere_the_printed_address_opens_the_pages(browser: Browser, run: Run) -> None:
    with served(Pages(OpenedRun(run), None), "0.0.0.0") as (url, port):
        token = urlsplit(url).query
        context = browser.new_context()
        page = context.new_page()
        here = f"http://127.0.0.1:{port}"
        refused = page.goto(f"{here}/latent/3")
        assert refused is not None
        assert refused.status == 403
        page.goto(f"{here}/latent/3?{token}")
        assert page.url == f"{here}/latent/3"
        page.click("a[rel=next]")
        expect(page.locator("h2")).to_have_text("Latent 4")
        context.close()


def test_files_are_opened_without_a_server(
    page: Page, run: Run, index: Index, tmp_path: Path
) -> None:
    near = index.latent(5).nearest[0].latent
    chosen = ["--latents", "5", str(near)]
    assert main(["browse", place(run), "--static", str(tmp_path), *chosen]) == 0
    page.goto((tmp_path / "index.html").as_uri())
    assert latents(page) == [5, near]
    page.click(".latents td:first-child a >> nth=0")
    page.click(f".neighbours a:has-text('{near}') >> nth=0")
    expect(page.locator("h2")).to_have_text(f"Latent {near}")
    page.click(".small-map")
    expect(page.locator("#card")).to_contain_text(f"latent {near}")
