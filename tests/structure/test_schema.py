import json
import subprocess
import sys
from random import Random

import pytest
from blueprints import Net, damage, linear
from torch import nn

from modsurg.errors import FormatError, TrustError
from modsurg.structure.build import build, describe
from modsurg.structure.schema import KEY, checked, outline, read_tree

WRONG = (
    "^(this is not a tree that modsurg wrote|the tree is damaged: .+|.* of a Linear, which belongs to nn.Module itself"
    "|'load' is not a dtype|strides .+ of a tensor .+|a negative size"
    "|a tensor that reaches out of the memory of the one it lies in|.+ inside the tree .+"
    "|a value of the unknown kind 'array'|no parametrization of 'weight'|a hook of kind '_' without its parameter)$"
)


@pytest.mark.parametrize(
    "path_and_value",
    [
        ("version", "1"),
        ("version", None),
        ("names", None),
        ("names", [3]),
        ("modules", []),
        ("root", 3),
        ("root", -1),
        ("root", "2"),
        ("modules", {}),
        ("modules", 0, "class", 99),
        ("modules", 0, "class", -1),
        ("modules", 0, "class", "x"),
        ("modules", 0, "parameters", {"weight": 7}),
        ("modules", 0, "parameters", {"weight": "0"}),
        ("modules", 0, "attributes", {"_parameters": {}}),
        ("modules", 0, "attributes", {"_compiled_call_impl": None}),
        ("modules", 0, "attributes", {"x": {"module": 9}}),
        ("modules", 0, "attributes", {"training": {"array": 0}}),
        ("modules", 0, "attributes", 44),
        ("modules", 0, "parametrized", ["weight"]),
        ("modules", 0, "hooks", {"_forward_hooks": [["x", {"name": 0}]]}),
        ("modules", 2, "children", {"0": 2}),
        ("modules", 2, "children", {"0": 5}),
        ("modules", 2, "children", {"a.b": 0}),
        ("modules", 2, "children", {"": 0}),
        ("modules", 2, "children", [0]),
        ("tensors", 0, "shape", [-1, 2]),
        ("tensors", 0, "shape", [2**40, 2**40]),
        ("tensors", 0, "shape", "22"),
        ("tensors", 0, "dtype", "load"),
        ("tensors", 0, "dtype", "int64"),
        ("tensors", 0, "stride", [0, 0]),
        ("tensors", 0, "of", 1),
        ("tensors", 0, {"data": "", "dtype": "float32", "shape": [1]}),
        ("tensors", 0, {"of": 1, "offset": 0, "dtype": "float32", "shape": [2**20], "stride": [1]}),
        ("tensors", 0, {"of": 1, "offset": -1, "dtype": "float32", "shape": [1], "stride": [1]}),
        ("tensors", 0, {"data": "eJwDAAAAAAI=", "dtype": "float32", "shape": [1]}),
        ("tensors", 0, "name", 3),
        ("tensors", 0, []),
        ("modules", 0, []),
        ("attributes", 0, "text"),
        ("attributes", None),
        ("shared", None),
    ],
    ids=str,
)
def test_a_damaged_tree_is_one_clear_error(path_and_value):
    with pytest.raises(FormatError, match=WRONG):
        build(damage(linear(), *path_and_value))


def test_a_tree_of_a_later_version_says_so():
    with pytest.raises(FormatError, match=r"version 9.* upgrade modsurg"):
        build(damage(linear(), "version", 9))


def test_a_tree_with_more_paths_than_any_model_is_refused():
    for levels in (16, 60):  # a kilobyte that takes a minute to look at, and one that takes for ever
        data = linear()
        kind = data["modules"][2]["class"]
        data["modules"] += [
            {"class": kind, "attributes": {}, "children": {"0": at, "1": at}} for at in range(2, 2 + levels)
        ]
        with pytest.raises(FormatError, match="paths"):
            build(data)


def test_a_shape_that_no_memory_has_is_refused_before_it_is_counted():
    with pytest.raises(FormatError, match="a shape that can be"):
        checked(damage(linear(), "tensors", 0, "shape", [2, 10**400]))


def test_one_module_at_many_places_is_no_such_tree():
    model = nn.Sequential(*[nn.Sequential(*[nn.ReLU()] * 300)] * 300)
    assert len(list(outline(checked(describe(model).data)))) == 1 + 300 + 300 * 300


def test_a_class_that_is_no_module_is_refused():
    data = linear()
    data["names"][data["modules"][0]["class"]] = "collections:OrderedDict"
    with pytest.raises(FormatError, match="as the class of a module"):
        build(data)


def test_every_path_with_its_class_and_tensors():
    shared = nn.Linear(2, 3, bias=False)
    model = Net(a=shared, b=nn.Sequential(shared, nn.BatchNorm1d(3)))
    model.b[1].bias.requires_grad_(False)
    places = list(outline(describe(model).data))
    assert [place.path for place in places] == [name for name, _ in model.named_modules(remove_duplicate=False)]
    assert [place.name for place in places] == ["Net", "Linear", "Sequential", "Linear", "BatchNorm1d"]
    assert places[1].number == places[3].number
    assert places[1].kind == "torch.nn.modules.linear.Linear"
    assert places[1].attributes["in_features"] == 2
    (weight,) = places[1].tensors
    assert (weight.key, weight.dtype, weight.shape, weight.parameter, weight.trainable) == (
        "a.weight",
        "float32",
        (3, 2),
        True,
        True,
    )
    slots = places[4].tensors
    assert [slot.name for slot in slots] == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert [slot.trainable for slot in slots] == [True, False, False, False, False]
    assert [slot.parameter for slot in slots] == [True, True, False, False, False]


def places_in(data, path=()):
    """Every way into the data, by keys and positions."""
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield (*path, key)
            yield from places_in(value, (*path, key))


ODD = [None, True, -1, 10**9, 10**30, 1.5, "x", "", [], {}, [[]], "float32", {"name": 0}, {"module": 0}, {"tensor": 0}]
ODD += [{"shared": 0}, {"list": [1]}, {"object": {"class": 0}}, {"partial": [{"name": 0}, [], {}]}, {"handle": [0]}]


def test_whatever_is_changed_it_is_a_model_or_a_clear_error():
    random = Random(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.LSTM(1, 1), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    model.extra = {"a": (1, 2.5), "b": [model[0], model[0].weight], "c": nn.functional.relu, "d": model[0].forward}
    text = json.dumps(describe(model).data)
    places = list(places_in(json.loads(text)))
    refused = 0
    for _ in range(300):
        data = json.loads(text)
        *path, last = random.choice(places)
        damage(data, *path, last, random.choice(ODD))
        try:
            build(data)
        except (FormatError, TrustError):
            refused += 1
    assert refused > 100


def test_the_tree_is_read_from_the_metadata():
    data = linear()
    assert read_tree({KEY: json.dumps(data)}) == data
    assert read_tree({"format": "pt"}) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"version": 1}', '{"version": true}'])
def test_metadata_that_is_no_tree_is_refused(text):
    with pytest.raises(FormatError, match=r"tree"):
        read_tree({KEY: text})


def test_a_tree_is_read_without_torch():
    data = json.dumps(linear())
    code = (
        "import json, sys\n"
        "from modsurg.structure.schema import checked, outline\n"
        "print([place.path for place in outline(checked(json.load(sys.stdin)))], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, text=True, check=True)
    assert done.stdout == "['', '0', '1'] False\n"


def test_a_class_that_nobody_has_is_still_in_the_outline():
    data = linear()
    data["names"][0] = "gone:Linear"
    assert [place.kind for place in outline(checked(data))][1] == "gone.Linear"
