"""`circuitroute count`: its lines, its errors, its exit codes."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

import circuitroute as cr
from circuitroute.cli.main import main

ROOT = Path(__file__).parents[1]
PLAIN = "p cnf 3 2\n1 -2 0\n2 3 0\n"


@pytest.fixture
def count(tmp_path, capsys):
    """Counts a text as a file: the exit code, and the lines of output and errors."""

    def run(text, *options):
        path = tmp_path / "a.cnf"
        path.write_text(text)
        code = main(["count", str(path), *options])
        shown = capsys.readouterr()
        return code, shown.out.splitlines(), shown.err

    return run


@pytest.mark.parametrize("options", [(), ("--compiler", "sdd")])
def test_a_model_count(count, options):
    code, lines, errors = count(PLAIN, *options)
    assert (code, errors) == (0, "")
    assert lines[1:] == [
        "c o model count: 4",
        "s SATISFIABLE",
        "c s type mc",
        "c s log10-estimate 0.602059991327962",
        "c s exact arb int 4",
    ]


def test_nothing_satisfies_it(count):
    for text in ("p cnf 1 2\n1 0\n-1 0\n", "p cnf 0 1\n0\n"):
        code, lines, errors = count(text)
        assert (code, errors) == (0, "")
        assert "s UNSATISFIABLE" in lines
        assert "c s log10-estimate -inf" in lines
        assert lines[-1] == "c s exact arb int 0"


def test_no_variables(count):
    assert count("p cnf 0 0\n")[1][-1] == "c s exact arb int 1"


def test_a_weighted_count(count):
    text = "c t wmc\np cnf 3 2\nc p weight 1 1/3 0\nc p weight -1 2/3 0\n1 -2 0\n2 3 0\n"
    code, lines, _ = count(text)
    assert code == 0
    assert "c s type wmc" in lines
    assert "s SATISFIABLE" in lines
    # Models 1-3, 12-, 123 and -1-23.
    assert lines[-1] == "c s exact arb frac 5/3"
    assert "c o weighted model count: 5/3, about 1.6666666666666666667" in lines
    assert count(text, "--unweighted")[1][-1] == "c s exact arb int 4"


def test_weighted_counts_that_are_zero_or_negative(count):
    text = "p cnf 1 0\nc p weight 1 {} 0\nc p weight -1 1 0\n"
    assert count(text.format("-1"))[1][2:] == [
        "s SATISFIABLE",
        "c s type wmc",
        "c s log10-estimate -inf",
        "c s exact arb int 0",
    ]
    assert count(text.format("-11"))[1][-2:] == ["c s neglog10-estimate 1", "c s exact arb int -10"]


def test_a_projected_count(count):
    assert count(PLAIN + "c p show 2 0\n")[1][2:] == [
        "s SATISFIABLE",
        "c s type pmc",
        "c s log10-estimate 0.301029995663981",
        "c s exact arb int 2",
    ]
    assert count(PLAIN + "c p show 0\n")[1][-1] == "c s exact arb int 1"
    weighted = count(PLAIN + "c p show 2 0\nc p weight 2 0.25 0\nc p weight -2 0.5 0\n")[1]
    assert weighted[-1] == "c s exact arb frac 3/4"
    assert "c s type pwmc" in weighted


def test_counts_of_any_size(count):
    code, lines, _ = count("p cnf 20000 1\n1 2 0\n")
    assert code == 0
    assert len(lines[-1].split()[-1]) == 6021
    assert Fraction(int(lines[-1].split()[-1][:15]), 10**15) == pytest.approx(3 * 2**19_998 / 10**6021)


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("p cnf 1 1\n", (), "line 1: found '1 clauses'"),
        (PLAIN, ("--compiler", "other"), "compiler='other': there is no compiler of that name"),
        (PLAIN, ("--max-nodes", "3"), "max_nodes=3"),
        (PLAIN, ("--max-nodes", "0"), "max_nodes=0: must be at least 1"),
        (PLAIN, ("--max-seconds", "0"), "max_seconds=0.0: must be a positive number"),
        (PLAIN, ("--max-seconds", "1e-9"), "try --compiler sdd, or a model counter"),
    ],
)
def test_what_cannot_be_counted(count, text, options, says):
    code, lines, errors = count(text, *options)
    assert (code, lines) == (2, [])
    assert errors.startswith("circuitroute count: error: ")
    assert says in errors
    assert errors.count("\n") == 1


def test_no_file(tmp_path, capsys):
    assert main(["count", str(tmp_path / "none.cnf")]) == 2
    assert "none.cnf" in capsys.readouterr().err


def test_in_a_process_of_its_own(tmp_path):
    """No traceback, and no extra is imported before it is used."""
    (tmp_path / "a.cnf").write_text(PLAIN)
    program = (
        "import sys\nfrom circuitroute.cli.main import main\ncode = main(['count', 'a.cnf'])\n"
        "print(sorted({'pysdd', 'matplotlib', 'numba'} & sys.modules.keys()))\nsys.exit(code)"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "compilers")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-2:] == ["c s exact arb int 4", "[]"]


def test_output_that_nobody_reads(monkeypatch, tmp_path):
    (tmp_path / "a.cnf").write_text(PLAIN)

    def fail(*_):
        raise BrokenPipeError

    monkeypatch.setattr("circuitroute.cli.count.command.answered", fail)
    assert main(["count", str(tmp_path / "a.cnf")]) == 141


def test_the_constraint_is_public():
    assert cr.CNF.__name__ == "CNF"
    assert cr.read_cnf.__module__ == "circuitroute.inference.reading"
