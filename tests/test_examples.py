"""Examples and the code blocks of README and docs run as they stand."""

import json
import re
import runpy
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def blocks(page):
    """The fenced Python blocks of a page, also those indented in lists."""
    text = page.read_text(encoding="utf-8")
    return [textwrap.dedent(b) for b in re.findall(r"^ *```python\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "docs"}
    for block in blocks(page):
        exec(compile(block, str(page), "exec", dont_inherit=True), scope)


def test_quickstart_runs_and_is_what_the_readme_shows(capsys):
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "4426165368 subsets" in printed
    code = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8").split('"""', 2)[2].strip()
    shown = "\n".join(blocks(ROOT / "README.md"))
    for line in code.splitlines():
        assert line in shown


@pytest.mark.slow
def test_the_sets_of_batches_beside_the_best_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr("sys.argv", ["batch_budget.py", "quality", "--trials", "1", "--out", str(tmp_path / "rows")])
    runpy.run_path(str(ROOT / "examples" / "batch_budget.py"), run_name="__main__")
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2 * 5 * 4 * 4
    assert all(-1e-9 <= row["mean_gap"] <= row["worst_gap"] + 1e-9 for row in rows)
