import collections
import enum
import math
import operator
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from modsurg.errors import TrustError
from modsurg.structure.trust import Trust, qualified_name


class Net(nn.Module):
    class Inner(nn.Module):
        pass


class Kind(enum.Enum):
    A = 1


class Options:
    pass


def helper(x):
    return x


system = os.system  # a name in this module that is not of this module

HERE = __name__


@pytest.mark.parametrize(
    "value",
    [
        nn.Conv2d,
        nn.functional.relu,
        nn.functional.gelu,
        nn.functional.max_pool2d,
        torch.relu,
        torch.sigmoid,
        torch.einsum,
        Net,
        Net.Inner,
        Options,
        dict,
        collections.OrderedDict,
        math.sqrt,
    ],
    ids=lambda value: value.__name__,
)
def test_a_name_leads_back_to_its_object(value):
    assert Trust([HERE]).resolve([qualified_name(value)]) == [value]


def test_a_function_is_trusted_by_its_own_name_only():
    with pytest.raises(TrustError, match="helper"):
        Trust([HERE]).resolve([f"{HERE}:helper"])
    assert Trust([f"{HERE}.helper"]).resolve([f"{HERE}:helper"]) == [helper]
    assert Trust([helper]).resolve([f"{HERE}:helper"]) == [helper]


def test_local_and_anonymous_things_have_no_name():
    def local():
        pass

    assert qualified_name(local) is None
    assert qualified_name(lambda: 0) is None
    assert qualified_name([].append) is None


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "posix:system",
        "builtins:eval",
        "builtins:getattr",
        "builtins:exec",
        "builtins:__import__",
        "torch:load",
        "torch:from_file",
        "torch.hub:load",
        "torch.serialization:load",
        "torch.nn.modules.module:os",
        "torch.nn.modules.module.os:system",
        "torch.nn.modules.module:itertools.chain",
        "torch.nn.modules.module:torch.load",
        "torch.nn.modules.module:functools.partial",
        "torch.nn.modules.module:OrderedDict",
        "torch.nn.functional:importlib",
        "torch.nn.functional:handle_torch_function",
        "torch.nn:Module.__init__.__globals__",
        "torch.nn.modules.module:Module.__class__",
        "torchvision.models:resnet50",
        "torchvision.models.resnet:resnet50",
        "torchvision.models._api:get_model",
        "torchvision.models._api:load_state_dict_from_url",
        "torchvision.models.resnet:ResNet50_Weights.get_state_dict",
        "torch.nn.modules.linear:Linear.forward",
        "math",
        "math:",
        ":system",
        "",
        "torch.nn.modules..linear:Linear",
        "torch.nn.modules.linear:<locals>.Linear",
    ],
)
def test_nothing_else_is_trusted(name):
    with pytest.raises(TrustError, match=r"not trusted|not there"):
        Trust().resolve([name])


def test_a_module_that_is_not_trusted_is_not_imported(tmp_path):
    (tmp_path / "surprise.py").write_text("import pathlib; pathlib.Path('ran').touch()\nclass Net: pass")
    code = """
from modsurg.errors import TrustError
from modsurg.structure.trust import Trust
try:
    Trust(["safe"]).resolve(["surprise:Net", "safe_not_really:Net"])
except TrustError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "surprise.Net" in done.stdout
    assert "safe_not_really.Net" in done.stdout
    assert not (tmp_path / "ran").exists()


def test_one_missing_name_keeps_the_trusted_ones_from_being_imported(tmp_path):
    (tmp_path / "known.py").write_text("import pathlib; pathlib.Path('ran').touch()\nclass Net: pass")
    code = """
from modsurg.structure.trust import Trust
try:
    Trust(["known"]).resolve(["known:Net", "other:Net"])
except ValueError:
    pass
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert not (tmp_path / "ran").exists()


def test_what_a_trusted_module_has_imported_is_not_its_own():
    with pytest.raises(TrustError, match="not trusted"):
        Trust([HERE]).resolve([f"{HERE}:system"])
    with pytest.raises(TrustError, match=r"has no os\.system"):
        Trust([HERE]).resolve([f"{HERE}:os.system"])


def test_the_error_lists_everything_and_the_line_to_write():
    with pytest.raises(TrustError) as caught:
        Trust().resolve(["timm.models.vit:Vit", "mypkg.nets:Net", "timm.layers:Mlp", "__main__:Head", "torch.fx:Graph"])
    text = str(caught.value)
    assert text.startswith("5 names are not trusted")
    assert all(name in text for name in ("timm.models.vit.Vit", "mypkg.nets.Net", "timm.layers.Mlp", "__main__.Head"))
    assert 'load_model(path, trust=("mypkg", "timm", "torch.fx", Head,))' in text


def test_nobody_is_told_to_trust_more_than_is_needed():
    with pytest.raises(
        TrustError, match=r'trust=\("torch\._C\.Thing", "torch\.utils\.data\.dataset\.Part", Local,\)\)'
    ):
        Trust().resolve(["torch.utils.data.dataset:Part", "torch._C:Thing", "mypkg:make.<locals>.Local"])
    for name in ("torch.utils.cpp_extension:load", "torch.package.package_importer:PackageImporter", "copyreg:pickle"):
        with pytest.raises(TrustError, match="the file may be hostile"):
            Trust().resolve([name])


def test_nobody_is_told_to_trust_the_operating_system():
    with pytest.raises(TrustError, match=r"posix\.system: the file may be hostile") as caught:
        Trust().resolve(["posix:system", "mypkg:Net"])
    assert "trust=" not in str(caught.value)


def test_a_class_answers_for_itself_and_for_main():
    assert Trust(Net).resolve([f"{HERE}:Net", "__main__:Net"]) == [Net, Net]
    assert Trust([Net.Inner]).resolve([f"{HERE}:Net.Inner"]) == [Net.Inner]
    with pytest.raises(TrustError, match="Kind"):
        Trust([Net]).resolve([f"{HERE}:Kind"])


def test_a_class_may_be_trusted_by_its_full_name():
    assert Trust([f"{HERE}.Net"]).resolve([f"{HERE}:Net"]) == [Net]
    with pytest.raises(TrustError, match="Kind"):
        Trust([f"{HERE}.Net"]).resolve([f"{HERE}:Kind"])
    assert Trust(["_operator.add"]).resolve(["_operator:add"]) == [operator.add]
    with pytest.raises(TrustError, match="mul"):
        Trust(["_operator.add"]).resolve(["_operator:mul"])


def test_two_classes_of_one_name_are_told_apart():
    other = type("Net", (nn.Module,), {"__module__": "elsewhere"})
    script = type("Net", (nn.Module,), {"__module__": "__main__"})
    trust = Trust([Net, other])
    assert trust.resolve([f"{HERE}:Net", "elsewhere:Net"]) == [Net, other]
    with pytest.raises(TrustError, match=r"two of the classes would answer for __main__\.Net: say rename="):
        trust.resolve(["__main__:Net"])
    assert Trust([Net, other], {"__main__.Net": other}).resolve(["__main__:Net"]) == [other]
    assert Trust([Net, script]).resolve(["__main__:Net", f"{HERE}:Net"]) == [script, Net]
    assert Trust([script, Net]).resolve(["__main__:Net"]) == [script]


def test_trust_takes_names_and_classes_only():
    with pytest.raises(TrustError, match="not Sequential"):
        Trust([nn.Sequential()])


def test_rename_by_class_by_name_and_by_package():
    assert Trust(rename={"old.Net": Net}).resolve(["old:Net"]) == [Net]
    assert Trust(HERE, rename={"old.nets.Net": f"{HERE}.Net"}).resolve(["old.nets:Net"]) == [Net]
    assert Trust(rename={"old.layers": "torch.nn.modules.linear"}).resolve(["old.layers:Linear"]) == [nn.Linear]
    assert Trust(rename={"old": "torch.nn"}).resolve(["old.modules.linear:Linear"]) == [nn.Linear]


def test_a_new_name_has_to_be_trusted_too():
    with pytest.raises(TrustError, match=r"os\.system"):
        Trust(rename={"old.Net": "os.system"}).resolve(["old:Net"])


def test_a_class_that_is_gone_is_asked_for_by_rename():
    with pytest.raises(TrustError, match=r'rename=\{"torch.nn.modules.linear.Linaer": Linaer\}'):
        Trust().resolve(["torch.nn.modules.linear:Linaer"])
    with pytest.raises(TrustError, match=r"No module named 'gone_for_good'"):
        Trust(["gone_for_good"]).resolve(["gone_for_good:Net"])


def test_a_module_that_moved_whole_needs_one_rule():
    with pytest.raises(TrustError, match=r'rename=\{"gone": "new_gone"\}, trust=\("new_gone",\)\)$'):
        Trust("gone").resolve(["gone.nets:Net", "gone.nets:Block"])
    with pytest.raises(TrustError, match=r'rename=\{"gone\.nets\.Net": Net\}\)$'):
        Trust("gone").resolve(["gone.nets:Net"])
    with pytest.raises(TrustError, match=r'rename=\{"gone\.nets\.Net": Net\}\)$'):
        Trust(("gone", "lost")).resolve(["lost:Block", "gone.nets:Net"])


def test_a_trusted_module_that_fails_on_import(tmp_path, monkeypatch):
    (tmp_path / "fails_on_import.py").write_text("class Layer(undefined): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrustError, match=r"fails_on_import\.Layer: name 'undefined' is not defined"):
        Trust("fails_on_import").resolve(["fails_on_import:Layer"])
