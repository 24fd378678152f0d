"""A third party's package, installed beside the library as anyone would: found, compiled, held to the contract."""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "plugin_parity"

BROKEN = {
    "pyproject.toml": """
        [build-system]
        requires = ["hatchling"]
        build-backend = "hatchling.build"

        [project]
        name = "broken-plugin"
        version = "1"

        [project.entry-points."circuitroute.compilers"]
        broken = "broken_plugin"
        """,
    "broken_plugin.py": "raise RuntimeError('written in a hurry')",
}


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A virtual environment of its own that sees this checkout and what is installed here, with the plug-in."""
    folder = tmp_path_factory.mktemp("house")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    place = sysconfig.get_path("purelib", vars={"base": str(folder / "env")})
    seen = [ROOT, ROOT / "compilers", sysconfig.get_path("purelib"), *site.getsitepackages()]
    Path(place, "seen.pth").write_text("\n".join(map(str, seen)), encoding="utf-8")
    shutil.copytree(EXAMPLE, folder / "parity", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    (folder / "broken").mkdir()
    for name, text in BROKEN.items():
        (folder / "broken" / name).write_text(textwrap.dedent(text), encoding="utf-8")
    install(python, folder / "parity")
    return folder, python


def install(python, project, *options):
    # Nothing is downloaded: what the package needs is seen already, its build backend too.
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check",
        "--no-index", "--no-deps", "--no-build-isolation", *options, project)  # fmt: skip


def run(*command, cwd=None):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "COV"))}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_its_own_tests_pass_where_it_is_installed(house):
    """They start by asserting that its entry point is found without an import."""
    folder, python = house
    shutil.rmtree(folder / "parity" / "circuitroute_parity", ignore_errors=True)  # the installed one is tested
    printed = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", cwd=folder / "parity")
    assert " passed" in printed
    assert "failed" not in printed
    assert "skipped" not in printed


def test_a_broken_plugin_is_named_and_takes_nothing_down(house):
    folder, python = house
    install(python, folder / "broken", "--target", folder / "hurried")
    code = """
    import sys, warnings
    sys.path.insert(0, "hurried")
    import circuitroute as cr
    from circuitroute_parity import Checksum, Parity

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert cr.compile(Checksum(9, 0), 8).model_count() == 30
    (warning,) = caught
    assert "broken_plugin could not be imported: RuntimeError('written in a hurry')" in str(warning.message)
    assert cr.compile(Parity(odd=True) & cr.Exactly(3), 8).model_count() == 56
    try:
        cr.compile(cr.Constraint(), 3)
    except cr.UnsupportedConstraintError as error:
        print(error)
    """
    printed = run(python, "-c", textwrap.dedent(code), cwd=folder)
    assert "The plug-in broken_plugin could not be imported: RuntimeError: written in a hurry" in printed
