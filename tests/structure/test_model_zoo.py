"""Whole models that nobody here wrote: the same tree, the same keys and the same output in a fresh process."""

import inspect
import json
import re
import subprocess
import sys

import pytest
import torch
from blueprints import assert_same
from torchvision.models import get_model, get_model_builder, list_models
from zoo import transformers_models

from modsurg import load_model, save_model
from modsurg.errors import SaveError
from modsurg.structure.build import build, describe

OPEN = """
import pathlib, sys, torch
from modsurg import load_model
trust = sys.argv[1].split(",")
for path in [path for name in sys.argv[2:] for path in pathlib.Path().glob(f"{name}.model.*")]:
    name = str(path)
    x, expected, text, keys = torch.load(f"{name.partition('.')[0]}.run", weights_only=False)
    model = load_model(path, trust=trust)
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**x) if isinstance(x, dict) else model(x)
    found = [value for value in torch.utils._pytree.tree_leaves(
        output.to_tuple() if hasattr(output, "to_tuple") else output) if isinstance(value, torch.Tensor)]
    same = len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected))
    if not (same and repr(model) == text and list(model.state_dict()) == keys):
        print(name, "differs")
"""

# torch itself writes no pickle of these.
NOT_PICKLED = ("torch can't pickle it", "torch leaves out of a pickle")
SMALL = ["alexnet", "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small"]
SMALL += ["regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "lraspp_mobilenet_v3_large"]


def without_weights(name):
    options = {"weights_backbone": None} if has_backbone(name) else {}
    try:
        with torch.device("meta"):
            return get_model(name, weights=None, **options)
    except NotImplementedError:  # it computes its widths with tensors
        return get_model(name, weights=None, **options)


def has_backbone(name):
    return "weights_backbone" in inspect.signature(get_model_builder(name)).parameters


def one_of_each_architecture():
    first = {}
    for name in list_models():
        first.setdefault(get_model_builder(name).__module__, name)
    return sorted(first.values())


def check_structure(name):
    model = without_weights(name)
    text = json.dumps(describe(model).data)
    back = build(json.loads(text))
    assert repr(back) == repr(model)
    assert list(back.state_dict()) == list(model.state_dict())
    assert json.dumps(describe(back).data) == text


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", one_of_each_architecture())
def test_every_architecture_of_torchvision(name):
    check_structure(name)


@pytest.mark.models
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", sorted(set(list_models()) - {"regnet_y_128gf"}))
def test_every_model_of_torchvision(name):
    check_structure(name)


def keep(directory, name, model, x):
    """Save a model, and beside it what it gives."""
    model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**x) if isinstance(x, dict) else model(x)
    leaves = torch.utils._pytree.tree_leaves(output.to_tuple() if hasattr(output, "to_tuple") else output)
    tensors = [value for value in leaves if isinstance(value, torch.Tensor)]
    torch.save([x, tensors, repr(model), list(model.state_dict())], directory / f"{name.partition('.')[0]}.run")
    save_model(model, directory / f"{name}.model.safetensors")
    try:
        save_model(model, directory / f"{name}.model.pt")
    except SaveError as error:
        if not any(words in str(error) for words in NOT_PICKLED):
            raise


def open_in_a_fresh_process(directory, names, trust=""):
    code = [sys.executable, "-c", OPEN, trust, *names]
    done = subprocess.run(code, cwd=directory, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr if done.returncode else "") == ("", "")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_models_of_torchvision_give_the_same_in_a_fresh_process(tmp_path):
    for name in SMALL:
        options = {"weights_backbone": None} if has_backbone(name) else {}
        options |= {"init_weights": False} if name == "googlenet" else {}
        keep(tmp_path, name, get_model(name, weights=None, **options), torch.randn(1, 3, 96, 96))
    open_in_a_fresh_process(tmp_path, SMALL)


SIZES = ["test", "atto", "femto", "pico", "nano", "xxs", "xxt", "tiny", "ti", "mini", "small", "s"]


def one_of_each_family_of_timm():
    """A name that sounds small; to build them all and count would take minutes."""
    timm = pytest.importorskip("timm")
    from timm.models._registry import _model_to_module

    families = {}
    for name in timm.list_models():
        families.setdefault(_model_to_module[name], []).append(name)
    return [min(names, key=lambda name: (size(name), len(name), name)) for names in families.values()]


def size(name):
    words = re.split(r"[_\d]", name)
    return next((at for at, size in enumerate(SIZES) if size in words or (len(size) > 2 and size in name)), len(SIZES))


def made_by_timm(name):
    """The model, of two blocks only where it is a large transformer, and an input of a size that it takes."""
    import timm

    try:
        with torch.device("meta"):
            large = sum(parameter.numel() for parameter in timm.create_model(name).parameters()) > 80e6
        model = timm.create_model(name, depth=2) if large else timm.create_model(name)
    except (NotImplementedError, RuntimeError, TypeError):  # it computes with tensors, or has no depth
        model = timm.create_model(name)
    channels, *sides = model.default_cfg["input_size"]
    if not model.default_cfg.get("fixed_input_size"):
        sides = [224 if side > 500 else side for side in sides]
    return model, torch.randn(1, channels, *sides)


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
def test_one_of_each_family_of_timm(tmp_path):
    names = one_of_each_family_of_timm()
    assert len(names) > 80
    for start in range(0, len(names), 12):
        some = names[start : start + 12]
        for name in some:
            keep(tmp_path, name, *made_by_timm(name))
        open_in_a_fresh_process(tmp_path, some, "timm")
        for file in tmp_path.iterdir():
            file.unlink()


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
def test_a_model_of_transformers_gives_its_hidden_states(tmp_path):
    """transformers takes note of a class in its constructor; one on meta costs nothing."""
    model, _ = transformers_models()["gpt2"]
    save_model(model.eval(), tmp_path / "gpt2.safetensors")
    code = """
import sys, torch
from modsurg import load_model
model = load_model("gpt2.safetensors", trust="transformers")
with torch.device("meta"):
    type(model)(model.config)
print(len(model(torch.zeros(1, 3, dtype=torch.int64), output_hidden_states=True).hidden_states))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
def test_models_of_transformers_give_the_same_in_a_fresh_process(tmp_path):
    models = transformers_models()
    for name, (model, x) in models.items():
        keep(tmp_path, name, model, x)
        back = load_model(tmp_path / f"{name}.model.safetensors", trust="transformers")
        assert_same(model, back)
    open_in_a_fresh_process(tmp_path, list(models), "transformers")
    gpt2 = load_model(tmp_path / "gpt2.model.safetensors", trust="transformers")
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    assert gpt2.config is gpt2.transformer.config


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
def test_a_model_with_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    model, x = transformers_models()["gpt2"]
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"]))
    keep(tmp_path, "lora", model, x)
    open_in_a_fresh_process(tmp_path, ["lora"], "transformers,peft")
