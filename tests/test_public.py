"""The public names are the namespace, they are resolved late, and each is documented."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import modsurg

PACKAGE = Path(modsurg.__file__).parent


def test_all_is_the_namespace():
    assert modsurg.__all__ == sorted(modsurg.__all__, key=lambda name: (name.islower(), name))
    assert set(dir(modsurg)) == {*modsurg.__all__, "__version__", "errors", "rules"}
    assert set(modsurg._HOMES) == set(modsurg.__all__)


@pytest.mark.parametrize("name", modsurg.__all__)
def test_every_name_is_there_and_documented_with_an_example(name):
    value = getattr(modsurg, name)
    assert value.__name__ == name
    assert value.__module__ == f"modsurg.{modsurg._HOMES[name]}"
    documentation = inspect.getdoc(value) or ""
    assert documentation, f"{name} has no docstring"
    if inspect.isfunction(value):
        assert ">>>" in documentation, f"{name} has no example"
        assert "Args:" in documentation, f"{name} does not name its arguments"


def test_type_checkers_see_the_same_homes():
    text = (PACKAGE / "__init__.py").read_text()
    block = text[text.index("if TYPE_CHECKING") : text.index("_HOMES =")]
    seen = {
        name: home
        for home, names in re.findall(r"from modsurg\.([\w.]+) import (\([^)]*\)|.*)", block)
        for name in re.findall(r"\w+", names)
    }
    assert seen == modsurg._HOMES


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'modsurg' has no attribute 'replaces'"):
        modsurg.replaces  # noqa: B018 - the access is the test


def test_a_name_that_is_nearly_there():
    with pytest.raises(AttributeError, match=r"no attribute 'replcae'\. Did you mean 'replace'\?"):
        modsurg.replcae  # noqa: B018 - the access is the test
    with pytest.raises(ImportError, match=r"cannot import name 'replcae' from 'modsurg'\. Did you mean 'replace'\?"):
        exec("from modsurg import replcae", {})
    assert not hasattr(modsurg, "replcae")
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", modsurg.__version__)


def test_importing_modsurg_imports_nothing_heavy():
    heavy = "torch numpy rich safetensors torchvision tensorboard matplotlib"
    code = f"import sys, modsurg; print([name for name in {heavy.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_keywords_are_named():
    """But for the parts of a run and options of a group, which the caller names, and sizes, which `resize` checks."""
    for name in set(modsurg.__all__) - {"save_checkpoint", "load_checkpoint", "resize", "param_groups"}:
        value = getattr(modsurg, name)
        if inspect.isfunction(value):
            kinds = [parameter.kind for parameter in inspect.signature(value).parameters.values()]
            assert inspect.Parameter.VAR_KEYWORD not in kinds, f"{name} swallows typos"
