"""The house of docs/architecture.md: imports point down, in no circle, and stand at the top of a module."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from helpers.paths import ROOT

SRC = ROOT / "src"


def floors() -> dict[str, int]:
    """Wing or module -> its floor, 0 at the ground, as the block under "Floors" in docs/architecture.md draws them."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawn = page.split("## Floors")[1].split("```")[1].strip().splitlines()
    levels = {}
    for level, line in enumerate(reversed(drawn)):
        for name in line.split():
            levels[name] = level
    return levels


FLOORS = floors()
COMMANDS = {name for name, level in FLOORS.items() if level >= FLOORS["train"]}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): ast.parse(path.read_text()) for path in sorted(SRC.rglob("*.py"))}


def wing(module: str) -> str:
    return module.split(".")[0]


def imported_modules(node: ast.AST) -> list[str]:
    """The modules of ours that an import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        below = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name in MODULES else node.module for name in below]
    else:
        return []
    return [name for name in names if wing(name) in FLOORS]


def is_main_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def imports(module: str) -> list[tuple[str, bool]]:
    """(imported module, whether the import is inside a function) for each import of ours in a module.

    What a module does when it is run as a script, `if __name__ == "__main__"`, is a command's door and does not count.
    """
    found = []

    def walk(node: ast.AST, in_function: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if is_main_block(child):
                continue
            found.extend((name, in_function) for name in imported_modules(child))
            walk(child, in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    walk(MODULES[module], False)
    return found


def test_every_module_has_a_floor():
    assert {wing(module) for module in MODULES} == set(FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    for imported, _ in imports(module):
        if wing(imported) != wing(module):
            assert FLOORS[wing(imported)] < FLOORS[wing(module)], f"{module} imports {imported}"


def test_there_is_no_circle():
    graph = {module: {name for name, _ in imports(module)} - {module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {error.args[1]}")


@pytest.mark.parametrize("module", sorted(set(MODULES) - COMMANDS))
def test_no_import_inside_a_function_crosses_floors(module):
    """But in a command's file, at its door."""
    crossing = [name for name, in_function in imports(module) if in_function and wing(name) != wing(module)]
    assert not crossing, f"{module} imports {crossing} inside a function"


@pytest.mark.parametrize("path", sorted(SRC.glob("*/__init__.py")), ids=lambda path: path.parent.name)
def test_a_wing_hands_on_names_and_does_nothing_else(path):
    allowed = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign)
    for node in ast.parse(path.read_text()).body:
        assert isinstance(node, allowed)
        if isinstance(node, ast.Assign):
            assert ast.unparse(node.targets[0]) == "__all__"


def test_no_name_hides_a_library():
    hidden = {"utils", "datasets", "types", "lerobot", "tokenize"}
    assert not hidden & {wing(module) for module in MODULES}


def test_setuptools_finds_every_module():
    """None is listed by hand."""
    from setuptools.discovery import ModuleFinder, PEP420PackageFinder

    packages = set(PEP420PackageFinder.find(str(SRC)))
    modules = set(ModuleFinder.find(str(SRC)))
    assert {wing(module) for module in MODULES} <= packages | modules
