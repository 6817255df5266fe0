"""How the suite itself is built."""

import ast
import os
import subprocess
import sys

import pytest

from helpers.paths import ROOT, WITHOUT_TORCHCODEC

TEST_MODULES = sorted((ROOT / "tests").glob("test_*.py"))


def imported_modules(source: str) -> set[str]:
    """The modules that a file imports, at its top or in a function."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    return modules


@pytest.mark.parametrize("path", TEST_MODULES, ids=lambda path: path.name)
def test_no_test_module_imports_another(path):
    """What two of them need is in tests/helpers; conftest.py holds fixtures, which pytest hands out by name."""
    others = {"conftest", *(module.stem for module in TEST_MODULES)}
    assert not imported_modules(path.read_text()) & others


def test_torchcodec_can_be_hidden():
    """CI runs the tests that decode video twice; the second time as if FFmpeg's libraries were missing."""
    code = "from data.decode import load_torchcodec; assert load_torchcodec()[0] is None; import torchcodec"
    environment = {**os.environ, "PYTHONPATH": str(WITHOUT_TORCHCODEC)}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert f'File "{WITHOUT_TORCHCODEC}' in shown.stderr
    assert "RuntimeError: Could not load libtorchcodec" in shown.stderr
