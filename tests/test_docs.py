"""The pages: every public name has its place in the reference, every page in the site."""

import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import circuitroute as cr
from tests.test_architecture import PUBLIC

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("**/*.md"))
DESIGN = [page for page in PAGES if page.parent.name == "design"]
DESCRIBED = {
    name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_in_the_reference(name):
    # The errors are described together, as the module they are in.
    module = getattr(getattr(cr, name), "__module__", "")
    assert f"circuitroute.{name}" in DESCRIBED or (module == "circuitroute.errors" and module in DESCRIBED)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT / "docs").as_posix())
def test_pages_are_in_the_navigation(page):
    navigation = (
        (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("nav:", 1)[1].split("markdown_extensions:", 1)[0]
    )
    assert re.search(rf": {page.relative_to(ROOT / 'docs').as_posix()}$", navigation, re.MULTILINE)


def _named_in(page):
    """(folder or "", file, name) of every `file.py:name` of a page; the columns of a table may name their folder."""
    folders = []
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = line.split("|") if line.startswith("|") else [line]
        headings = [re.findall(r": `(\S+/)`", cell) for cell in cells]
        folders = headings if any(headings) else folders if line.startswith("|") else []
        for place, cell in enumerate(cells):
            folder = folders[place][0] if place < len(folders) and folders[place] else ""
            yield from ((folder, *found) for found in re.findall(r"`([\w./]+\.py):(\w+)`", cell))


@pytest.mark.parametrize("page", DESIGN, ids=lambda p: p.name)
def test_the_code_that_design_pages_name_is_there(page):
    sources = [path for top in ("circuitroute", "compilers") for path in (ROOT / top).rglob("*.py")]
    for folder, file, name in _named_in(page):
        place = ROOT / "circuitroute" / folder / file
        found = [place] if folder and place.exists() else [p for p in sources if p.as_posix().endswith(f"/{file}")]
        definition = rf"^(?:def |class |){name}\b"
        defined = [path for path in found if re.search(definition, path.read_text(encoding="utf-8"), re.MULTILINE)]
        assert len(defined) == 1, f"{page.name} names {folder}{file}:{name}, which is in {len(defined)} files"


def test_public_modules_answer_to_their_public_names():
    page = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    promised = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `")]
    assert len(promised) == 10
    for modules, contents in promised:
        for name in re.findall(r"`(?:cr|circuitroute)\.(\w+)`", modules):
            module = importlib.import_module(f"circuitroute.{name}")
            assert module is getattr(cr, name)
            for part in re.findall(r"`(\w+)`", contents):
                # Adapters are imported by whoever has their stack.
                assert hasattr(module, part) or find_spec(f"{module.__name__}.{part}"), f"{name}.{part}"


def test_the_version_is_said_once_and_cited():
    """The build reads it from the package; the citation repeats it."""
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [cr.__version__]


def test_nothing_is_fetched_while_reading():
    """Fonts are the reader's own."""
    assert "font: false" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
