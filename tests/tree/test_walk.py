from torch import nn

from modsurg.tree.walk import walk


def test_the_order_is_torchs_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), nn.ReLU())
    assert list(walk(model).modules) == [name for name, _ in model.named_modules(remove_duplicate=False)]


def test_every_path_of_a_shared_parent():
    block = nn.Sequential(nn.ReLU())
    tree = walk(nn.ModuleDict({"a": block, "b": block}))
    assert tree.paths[id(block[0])] == ["a.0", "b.0"]
    assert tree.parent("b.0") is block


def test_none_slots_are_left_out():
    model = nn.Sequential(nn.ReLU())
    model.register_module("empty", None)
    assert list(walk(model).modules) == ["", "0"]


def test_a_module_that_holds_itself_ends():
    model = nn.Sequential(nn.Sequential(nn.ReLU()))
    model[0].add_module("up", model)
    assert list(walk(model).modules) == ["", "0", "0.0"]


def test_deeper_than_the_recursion_limit():
    model = nn.Sequential(nn.ReLU())
    for _ in range(3000):
        model = nn.Sequential(model)
    assert len(walk(model).modules) == 3002
