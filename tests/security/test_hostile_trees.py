"""Opening a file executes nothing of it and nothing that it names."""

import ast
import contextlib
import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import hostile
import pytest
import security_cases
import torch
from torch import nn

import modsurg
import modsurg.structure.build
from modsurg.errors import ModsurgError, TrustError
from modsurg.structure.trust import _PACKAGES, CONTAINERS, ENUMS, FUNCTIONS, Trust, is_data_class, is_module_class

LIMITED = """
import os, pathlib, resource, sys, time
import torch
import hostile, modsurg, modsurg.errors, security_cases
from modsurg.checkpoints import model
from modsurg.structure import build
os.chdir(sys.argv[1])
hostile.use(hostile.write(pathlib.Path("first.safetensors"), hostile.one(1)))
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (500 << 20), now + (500 << 20)))
for label, data, trust in security_cases.too_much(""):
    path = hostile.write(pathlib.Path("case.safetensors"), data)
    start = time.process_time()
    try:
        modsurg.load_model(path, trust=trust)
        modsurg.summary(path)
    except modsurg.errors.ModsurgError:
        pass
    except Exception as error:
        print(label, type(error).__name__, str(error)[:200])
    if time.process_time() - start > 5:
        print(label, "took", time.process_time() - start)
"""


@pytest.mark.parametrize("kind", ["code_that_runs", "too_much"])
def test_nothing_of_a_hostile_tree_runs(tmp_path, kind):
    mark = tmp_path / "mark"
    for label, data, trust in getattr(security_cases, kind)(str(mark)):
        try:
            hostile.use(hostile.write(tmp_path / "case.safetensors", data), trust=trust)
        except Exception as error:
            raise AssertionError(f"{label} gave {type(error).__name__}") from error
        assert not mark.exists(), label


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited by way of /proc")
def test_nothing_takes_much_time_or_memory(tmp_path):
    tests = Path(hostile.__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(Path(modsurg.__file__).parents[1])])}
    code = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(code, capture_output=True, text=True, check=False, env=environment)
    assert (done.stdout, done.stderr) == ("", "")


def classes_of(package):
    """The name of every class that the files of a package define."""
    spec = find_spec(package)
    home = Path(spec.origin)
    files = home.parent.rglob("*.py") if home.name == "__init__.py" else [home]
    for file in files:
        parts = file.relative_to(home.parent).with_suffix("").parts if home.name == "__init__.py" else ()
        module = ".".join((package, *parts)).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                yield f"{module}:{node.name}"


def check_nameable(packages, trust):
    counts = {"modules": 0, "data": 0, "functions": 0}
    for name in sorted({name for package in packages for name in classes_of(package)}):
        try:
            (value,) = Trust(trust).resolve([name])
        except TrustError:
            continue
        if is_module_class(value):
            counts["modules"] += 1
            homes = [base.__module__ for base in value.__mro__ if base not in (nn.Module, object)]
            assert not any(home.startswith(("torch.fx", "torch.jit", "torch.export")) for home in homes), name
        elif isinstance(value, type) and is_data_class(value):
            counts["data"] += 1
            assert not any(hasattr(value, code) for code in ("__del__", "__set__", "__get__")), name
            assert "__setstate__" not in dir(value), name
        elif name in ENUMS:
            continue
        else:
            counts["functions"] += 1
            assert name in FUNCTIONS, name
    return counts


def test_what_can_be_named_by_default():
    counts = check_nameable(_PACKAGES, ())
    assert counts["modules"] > 400
    assert counts["data"] < 20


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_what_can_be_named_of_a_trusted_package(package):
    pytest.importorskip(package)
    assert check_nameable([package], package)["modules"] > 400


def test_the_functions_that_may_be_named_are_pure():
    """Their results come from their arguments: none takes a path, a name or something to call."""
    for name in FUNCTIONS:
        module, _, short = name.partition(":")
        if module.startswith("timm") and find_spec("timm") is None:
            continue
        function = getattr(importlib.import_module(module), short)
        assert callable(function), name
        assert short not in ("load", "save", "from_file", "compile", "map", "vmap"), name
    assert len(FUNCTIONS) < 160
    assert all(kind.__module__ in ("builtins", "collections") for kind in CONTAINERS)


def test_a_recipe_runs_nothing(tmp_path):
    mark = tmp_path / "mark"
    recipe = json.loads(modsurg.replace(nn.Sequential(nn.ReLU()), "0", nn.Identity()).recipe.to_json())
    for label, data, trust in security_cases.code_that_runs(str(mark)):
        recipe["modules"] = [data]
        model = nn.Sequential(nn.ReLU())
        with contextlib.suppress(ModsurgError):
            modsurg.replay(model, modsurg.Recipe.from_json(json.dumps(recipe)), trust=trust)
        with contextlib.suppress(Exception):  # what was built may not run
            model(torch.zeros(1, 2))
        assert not mark.exists(), label


def test_a_recipe_does_not_choose_what_initialises_a_module():
    recipe = json.loads(modsurg.replace(nn.Sequential(nn.ReLU()), "0", nn.Identity()).recipe.to_json())
    data = hostile.one({"name": 1}, ["torch:relu"])
    data["modules"][0]["attributes"]["reset_parameters"] = {"name": 1}
    data["modules"][0]["buffers"] = {"b": 0}
    data["tensors"] = [{"dtype": "float32", "shape": [1]}]
    recipe["modules"] = [data]
    report = modsurg.replay(nn.Sequential(nn.ReLU()), modsurg.Recipe.from_json(json.dumps(recipe)))
    assert "not initialised by their class" in str(report)


def test_a_recipe_makes_no_module_that_is_much_larger_than_the_model():
    recipe = json.loads(modsurg.replace(nn.Sequential(nn.ReLU()), "0", nn.Linear(2, 2)).recipe.to_json())
    for tensor in recipe["modules"][0]["tensors"]:
        tensor["shape"] = [1 << 16] * len(tensor["shape"])
    with pytest.raises(ModsurgError, match=r"takes 17,180,131,328 bytes, over 268,435,456"):
        modsurg.replay(nn.Sequential(nn.ReLU()), modsurg.Recipe.from_json(json.dumps(recipe)))


@pytest.mark.parametrize("names", [["a", "a"], ["weight"], ["forward"], ["__len__"], ["in_features"], ["training"]])
def test_a_parametrization_hides_nothing(tmp_path, names):
    layer = nn.Linear(2, 2)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    data = modsurg.structure.build.describe(layer).data
    node = data["modules"][data["root"]]
    node["parametrized"] = names
    if names == ["weight"]:
        node.setdefault("parameters", {})["weight"] = 0
    lists = data["modules"][node["children"]["parametrizations"]]
    inner = next(iter(lists["children"].values()))
    lists["children"] = dict.fromkeys(names, inner)
    with pytest.raises(ModsurgError, match=r"replaces|already|twice|tree is damaged"):
        modsurg.structure.build.build(data)


@pytest.mark.parametrize(
    "attribute", [["", "forward", 3], ["", "training", 1], ["0", "weight", 3], ["0", "in_features", "x"]]
)
def test_a_recipe_sets_sizes_only(attribute):
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    report = modsurg.resize(model, "0", out_features=2, follow=True, example=torch.zeros(1, 2))
    recipe = json.loads(report.recipe.to_json())
    recipe["edits"][0]["follow"]["layers"][0]["attributes"] = [attribute]
    other = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    with pytest.raises(ModsurgError, match="which is not a size there"):
        modsurg.replay(other, modsurg.Recipe.from_json(json.dumps(recipe)))
    assert other[0].out_features == 4
