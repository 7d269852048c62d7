"""Imports between packages point down, and no files import each other in a circle: read from the source."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import modsurg

ROOT = Path(modsurg.__file__).parent
STANDS_ON = {
    "errors": set(),
    "tree": {"errors"},
    "tracing": {"errors", "tree"},
    "structure": {"errors", "tree"},
    "surgery": {"errors", "tree", "tracing", "structure"},
    "checkpoints": {"errors", "tree", "tracing", "structure"},
    "views": {"errors", "tree", "tracing", "structure", "checkpoints"},
    "training": {"errors", "tree", "tracing", "structure", "surgery", "checkpoints", "views"},
    "cli": {"errors", "tree", "tracing", "structure", "surgery", "checkpoints", "views", "training"},
}
FILES = sorted(ROOT.rglob("*.py"))
DOORS = [path for path in FILES if path.name == "__init__.py" and path.parent != ROOT]
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def name_of(path):
    return str(path.relative_to(ROOT))


def package_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def modules_imported(tree):
    """Every module that is named in an import, wherever it is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages_imported(tree):
    return {name.split(".")[1] for name in modules_imported(tree) if name.startswith("modsurg.")}


@pytest.mark.parametrize("path", [path for path in FILES if package_of(path) in STANDS_ON], ids=name_of)
def test_imports_point_down(path):
    here = package_of(path)
    upward = packages_imported(TREES[path]) & set(STANDS_ON) - STANDS_ON[here] - {here}
    assert not upward, f"{here} imports {upward}"


def test_every_file_is_in_a_package():
    outside = {name_of(path) for path in FILES if package_of(path) not in STANDS_ON}
    assert outside == {"__init__.py", "__main__.py", "rules.py"}


def test_no_cycle_of_files():
    """No two files import each other, however far round; imports in functions and for type checkers count too."""
    name = {".".join(["modsurg", *path.relative_to(ROOT).with_suffix("").parts]): path for path in FILES}
    below = {
        path: {
            name[candidate]
            for target in modules_imported(TREES[path])
            for candidate in (target, target.rpartition(".")[0])
            if candidate in name and candidate != "modsurg"
        }
        for path in FILES
        if path.name != "__init__.py"
    }
    while free := [path for path, imported in below.items() if not imported & set(below)]:
        for path in free:
            del below[path]
    assert not below, "in a cycle, or above one: " + ", ".join(sorted(map(name_of, below)))


def test_no_two_classes_of_one_name():
    names = [node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert [name for name, count in Counter(names).items() if count > 1] == []


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parent != ROOT and path.name == "__init__.py"], ids=name_of
)
def test_package_inits_are_empty(path):
    assert len(TREES[path].body) == 1
    assert ast.get_docstring(TREES[path])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_command_line_prints(path):
    printing = [
        node.lineno
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not printing or name_of(path) == "cli.py", f"line {printing}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_readable(path):
    assert path.read_text().count("\n") <= 500
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = node.end_lineno - node.lineno + 1
            assert size <= 60 + len((ast.get_docstring(node) or "").splitlines()), f"{node.name} has {size} lines"
