"""The pages: every public name has its place in the reference, every page in the site."""

import re
from pathlib import Path

import pytest

import circuitroute as cr
from tests.test_architecture import PUBLIC

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("**/*.md"))
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


def test_the_version_is_said_once_and_cited():
    """The build reads it from the package; the citation repeats it."""
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [cr.__version__]


def test_nothing_is_fetched_while_reading():
    """Fonts are the reader's own."""
    assert "font: false" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
