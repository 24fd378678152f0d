"""Files of clauses: what is understood, and what is refused with its line."""

from fractions import Fraction

import pytest

import circuitroute as cr


@pytest.fixture
def cnf(tmp_path):
    """Reads a text (or bytes) as a CNF file."""

    def read(text, **options):
        path = tmp_path / "a.cnf"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return cr.read_cnf(path, **options)

    return read


PLAIN = cr.CNF([[1, -2], [2, 3]], 3)


@pytest.mark.parametrize(
    "text",
    [
        "p cnf 3 2\n1 -2 0\n2 3 0\n",
        "c a comment\nc\nc p is a letter\np cnf 3 2\nc another\n1 -2 0\nc p shown\n2 3 0\nc the end",
        "p cnf 3 2\n1\n-2\n0 2 3\n0\n",
        "p cnf 3 2\n1 -2 0 2 3 0\n",
        "p cnf 3 2\n1 -2 0 2 3",
        "  p   cnf\t3  2 \n\n  1 -2 0\n\t2 3 0  \n\n",
        "p cnf 3 2\r\n1 -2 0\r\n2 3 0\r\n",
        b"\xef\xbb\xbfp cnf 3 2\n1 -2 0\n2 3 0\n",
        "p cnf 3 2\n1 -2 0\n2 3 0\n%\n0\n\n",
        "p cnf 3 4\n1 -2 0\n2 3 0\n2 3 2 0\n1 -1 0\n",
        "c ind by hand\np cnf 3 2\n1 -2 0\nc p cnf 9 9\n2 3 0\n",
        "c t mc\np cnf 3 2\n1 -2 0\n2 3 0\n",
    ],
)
def test_clauses(cnf, text):
    assert cnf(text) == PLAIN


def test_clauses_without_literals(cnf):
    assert cnf("p cnf 2 2\n0\n1 0\n") == cr.CNF([[], [1]], 2)
    assert cnf("p cnf 0 0\n") == cr.CNF([], 0)
    assert cnf("p cnf 5 0") == cr.CNF([], 5)


def test_a_huge_header_allocates_nothing(cnf):
    found = cnf("p cnf 999999999999999999 1\n-7 999999999999999999 0\n")
    assert found.n == 999_999_999_999_999_999
    assert found.clauses == ((-7, 999_999_999_999_999_999),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a CNF .*an empty file"),
        ("c only a comment\n", "is not a CNF"),
        ("1 2 0\n", "is not a CNF"),
        ("nnf 1 0 1\nL 1\n", "is not a CNF .*an NNF circuit"),
        ("p sat 3\n", "line 1: found 'p sat 3', expected the header: p cnf"),
        ("p cnf 3\n", "line 1: found 'p cnf 3', expected the header"),
        ("p cnf -3 2\n", "line 1: found 'p cnf -3 2'"),
        ("p cnf three 2\n", "line 1: found 'three'"),
        ("p cnf 3 2 7\n", "line 1"),
        ("p cnf 3 1000000000000000000000\n", "line 1: found '1000000000000000000000'"),
        ("p cnf 3 1\np cnf 3 1\n1 0\n", "line 2: found 'p cnf 3 1', expected one header"),
        ("c x\np cnf 3 3\n1 -2 0\n2 3 0\n", "line 2: found '3 clauses', expected as many as there are, 2"),
        ("p cnf 3 1\n1 -2 0\n2 3 0\n", "line 1: found '1 clauses', expected as many as there are, 2"),
        ("p cnf 3 2\n1 -2 0\n\n2 4 0\n", "line 4: found 'literal 4', expected 1 to 3 or its negative"),
        ("p cnf 3 1\n1 x2 0\n", "line 2: found 'x2', expected literals"),
        ("p cnf 3 1\nx1 2 0\n", "line 2: found 'x1'"),
        ("p cnf 3 1\n1 2.5 0\n", r"line 2: found '2\.5'"),
        ("p cnf 3 1\n1 -- 0\n", "line 2: found '1 -- 0'"),
        ("p wcnf 3 1 10\n5 1 2 0\n", "line 1.*MaxSAT"),
        ("p wcnf 3 1\n1 2 0\n", "line 1.*without any this is a MaxSAT instance"),
        ("p pcnf 3 1\nw 1 0.5\n1 0\n", "line 2: found 'w', expected literals"),
        ("p cnf 3 1\nvp 1 0\n1 0\n", "line 2: found 'vp'"),
        ("p cnf 3 1\nc p weight 1 0.3 0\n1 0\n", "line 2: found 'a weight of literal 1', expected one of -1, too"),
        ("p cnf 3 1\nc p weight 4 0.3 0\n1 0\n", "line 2: found 'literal 4'"),
        ("c p weight 4 0.3 0\np cnf 3 1\n1 0\n", "line 1: found 'literal 4'"),
        ("p cnf 3 1\nc p weight 0 0.3 0\n1 0\n", "line 2: found 'literal 0'"),
        ("p cnf 3 1\nc p weight 1 0.3\n1 0\n", r"line 2: found 'c p weight 1 0\.3', expected c p weight, a literal"),
        ("p cnf 3 1\nc p weight 1 0.3 1\n1 0\n", "line 2"),
        ("p cnf 3 1\nc p weight 1 often 0\n1 0\n", "line 2: found 'c p weight 1 often 0', expected a literal and its"),
        ("p cnf 3 1\nc p weight 1 1e999999999 0\n1 0\n", "line 2"),
        ("p cnf 3 1\nc p weight 1 1/0 0\n1 0\n", "line 2"),
        ("p cnf 3 1\nc p weight 1 nan 0\n1 0\n", "line 2"),
        ("p cnf 3 1\nc p weight 1 1 0\nc p weight -1 1 0\nc p weight 1 2 0\n1 0\n", "line 4.*line 2 says 1"),
        ("p cnf 3 1\nw 1 0.5\nw 1 0.5\n1 0\n", "line 3"),
        ("p cnf 3 1\nw -1 0.5\n1 0\n", "line 2: found 'a weight of literal -1', expected one of 1, too"),
        ("p cnf 3 1\nw 1 0.5 7\n1 0\n", "line 2"),
        ("p cnf 3 1\nc p show 1 4 0\n1 0\n", "line 2: found 'literal 4'"),
        ("p cnf 3 1\nc p show 1 2\n1 0\n", "line 2: found 'c p show 1 2', expected variables, each once, and 0"),
        ("p cnf 3 1\nc p show 1 -2 0\n1 0\n", "line 2"),
        ("p cnf 3 1\nc p show\n1 0\n", "line 2"),
        ("p cnf 3 1\nc p show 1 0\nc p show 2 1 0\n1 0\n", "line 3: found 'variable 1', expected each once"),
        (b"p cnf 3 1\n1 \xff 0\n", "line 2"),
        (b"\x1f\x8b\x08\x00", "gzip"),
    ],
)
def test_what_is_refused(cnf, text, says):
    with pytest.raises(cr.CircuitFileError, match=rf"a\.cnf.*{says}"):
        cnf(text)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        cr.read_cnf(tmp_path / "none.cnf")
    with pytest.raises(TypeError, match="path=3"):
        cr.read_cnf(3)


def test_weights_of_the_competition(cnf):
    """Anywhere in the file, in any notation, kept as they are."""
    found = cnf(
        "c t wmc\nc p weight 1 0.1 0\np cnf 4 1\nc p weight -1 1e-2 0\n1 0\nc p weight 2 1/3 0\nc p weight -2 -2 0\n"
        "c p weight 3 0 0\nc p weight -3 .5 0\n"
    )
    assert found.weights == {
        1: Fraction(1, 10),
        -1: Fraction(1, 100),
        2: Fraction(1, 3),
        -2: Fraction(-2),
        3: Fraction(0),
        -3: Fraction(1, 2),
    }
    assert found.show is None


def test_weights_of_cachet_and_of_2020(cnf):
    cachet = cnf("p cnf 3 1\nw 1 0.3\nw 2 -1\n1 0\n")
    assert cachet.weights == {1: Fraction(3, 10), -1: Fraction(7, 10), 2: Fraction(1), -2: Fraction(1)}
    both = cnf("p wcnf 3 1\nw 1 0.3 0\nw -1 0.9 0\n1 0\n")
    assert both.weights == {1: Fraction(3, 10), -1: Fraction(9, 10)}


def test_shown_variables(cnf):
    for text in (
        "p cnf 3 1\nc p show 1 3 0\n1 2 0\n",
        "c p show 1 0\np cnf 3 1\n1 2 0\nc p show 3 0\n",
        "c ind 1 3 0\np cnf 3 1\n1 2 0\n",
        "p pcnf 3 1\nvp 1 3 0\n1 2 0\n",
    ):
        assert cnf(text) == cr.CNF([[1, 2]], 3, show=[1, 3])
    assert cnf("p cnf 3 0\nc p show 0\n").show == ()
    weighted = cnf("p wpcnf 3 1\nvp 1 3 0\nw 1 0.5\n1 2 0\n")
    assert weighted == cr.CNF([[1, 2]], 3, {1: "1/2", -1: "1/2"}, [1, 3])


def test_reading_is_bounded_in_time(cnf):
    with pytest.raises(cr.CircuitTooLargeError, match=r"reading .*a\.cnf took"):
        cnf("p cnf 9 200000\n" + "1 2 3 0\n" * 200_000, max_seconds=1e-3)


def test_other_readers_name_this_one(tmp_path):
    (tmp_path / "a").write_text("p cnf 1 1\n1 0\n")
    with pytest.raises(cr.CircuitFileError, match=r"read it with cr\.read_cnf"):
        cr.read_nnf(tmp_path / "a")
