"""Documents: their links, generated pages, and the README's run file."""

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_sae.config import Run
from dist_sae.config.load import parse_run, resolve_run
from dist_sae.config.messages import dotted_keys
from dist_sae.config.renamed import RENAMED

ROOT = Path(__file__).parent.parent
MOST_BYTES = 300_000
DOCUMENTS = sorted(
    path for folder in ("", "docs", "monitoring") for path in (ROOT / folder).glob("*.md")
)
CODE = re.compile(r"^```.*?^```$|^    .*?$|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def links(document: Path) -> Iterator[str]:
    """Yield the targets of links and pictures, except web addresses."""
    text = CODE.sub("", document.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            yield target


def anchors(document: Path) -> set[str]:
    """Return the anchors of the headings as GitHub generates them: repeated ones are numbered."""
    found: dict[str, int] = {}
    names = set()
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = found[name] = found.get(name, -1) + 1
        names.add(f"{name}-{count}" if count else name)
    return names


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_documents_lead_somewhere(document: Path) -> None:
    broken = []
    for target in links(document):
        name, _, anchor = target.partition("#")
        there = (document.parent / name).resolve() if name else document
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert not broken


def test_every_page_of_docs_is_linked_from_the_readme_or_from_another_page() -> None:
    linked = {
        (document.parent / target.partition("#")[0]).resolve()
        for document in DOCUMENTS
        for target in links(document)
    }
    assert set((ROOT / "docs").iterdir()) <= linked


def test_generated_pages_are_what_schema_and_parser_say() -> None:
    script = runpy.run_path(str(ROOT / "launch" / "reference.py"))
    for name, text in script["render_reference"]().items():
        assert (ROOT / "docs" / name).read_text() == text, f"docs/{name}: run launch/render.sh"


def test_the_run_file_of_the_readme_is_valid_and_ten_lines_at_most() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text(), re.S | re.M)
    assert len(text.splitlines()) <= 10
    run = resolve_run(parse_run(text, "README.md"), (), "README.md")
    assert run.model.kind == "huggingface"


def test_every_promise_of_the_readme_has_tests_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("## Promises")[2].partition("\n## ")[0]
    promises = [promise.rstrip(".") for promise in re.findall(r"^- \*\*(.+?)\*\*", section, re.M)]
    table = re.findall(
        r"^\| (.+?) \| (`tests/.+) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M
    )
    assert [promise for promise, _ in table] == promises
    for _, tests in table:
        for path, name in re.findall(r"`(tests/\S+)::(\w+)`", tests):
            assert f"def {name}(" in (ROOT / path).read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_keys_that_documents_name_exist(document: Path) -> None:
    text = document.read_text()
    files = set(re.findall(r"`((?:\w+/)+\w+\.(?:py|cpp|sh|md|yaml))(?:::\w+)?`", text))
    folders = (ROOT, ROOT / "dist_sae", document.parent)
    assert [name for name in files if not any((each / name).exists() for each in folders)] == []
    sections = "|".join(Run.model_fields)
    keys = re.findall(rf"`((?:{sections})(?:\.[a-z]\w*)+)(?:: [^`]*|=[^`]*)?`", text)
    known = "".join(f"{key}." for key in [*dotted_keys(Run), *RENAMED])
    assert [key for key in keys if f"{key}." not in known] == []


def test_pictures_are_small() -> None:
    pictures = [*(ROOT / "docs").glob("*.png"), *(ROOT / "docs").glob("*.svg")]
    assert pictures
    assert [path.name for path in pictures if path.stat().st_size > MOST_BYTES] == []
