"""Readers of texts as files, for the tests of readers."""

import pytest

import circuitroute as cr
from tests.interop.files import BALANCED


@pytest.fixture
def nnf(tmp_path):
    """Reads a text (or bytes) as an NNF file."""

    def read(text, **options):
        path = tmp_path / "circuit.nnf"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return cr.read_nnf(path, **options)

    return read


@pytest.fixture
def sdd(tmp_path):
    """Reads two texts (or bytes) as an SDD and its vtree."""

    def read(text, vtree=BALANCED, **options):
        paths = tmp_path / "circuit.sdd", tmp_path / "circuit.vtree"
        for path, content in zip(paths, (text, vtree), strict=True):
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return cr.read_sdd(*paths, **options)

    return read
