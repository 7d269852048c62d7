"""diff: what a user sees for two models, states and files."""

import copy
import json
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import modsurg
from modsurg.errors import FormatError, SummaryError
from modsurg.views.diff.api import diff

GOLDEN = Path(__file__).parent / "golden"


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight


class Adapter(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(5))
        )
        self.fc = nn.Linear(8, 10)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def kinds(found) -> list[tuple[str, str | None, str]]:
    return [(change.kind, change.old_path, change.path) for change in found]


def test_equal_is_empty_and_false(net):
    found = diff(net, copy.deepcopy(net))
    assert not found
    assert len(found) == 0
    assert str(found) == ""
    assert repr(found) == "no differences"
    assert found.to_dict()["same"] is True
    assert found.tensors == len(net.state_dict())


def test_a_single_changed_value_is_found_with_place_and_amount(net):
    new = copy.deepcopy(net)
    with torch.no_grad():
        new.blocks[3][0].weight[1, 2, 0, 2] += 0.5
    (change,) = diff(net, new)
    assert (change.kind, change.path) == ("values", "blocks.3.0.weight")
    assert change.values.differing == 1
    assert change.values.index == (1, 2, 0, 2)
    assert change.values.max_abs == pytest.approx(0.5)
    assert change.values.new == pytest.approx(new.blocks[3][0].weight[1, 2, 0, 2].item())


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_random_single_change_is_found_and_nothing_else(data):
    torch.manual_seed(data.draw(st.integers(0, 9)))
    net = Net()
    new = copy.deepcopy(net)
    assert not diff(net, new)
    state = new.state_dict()
    key = data.draw(st.sampled_from([key for key in state if state[key].is_floating_point()]))
    place = data.draw(st.integers(0, state[key].numel() - 1))
    state[key].view(-1)[place] += data.draw(st.sampled_from([1e-3, 1.0, float("inf"), float("nan")]))
    for old, changed in ((net, new), (net.state_dict(), state), (net, state)):
        (change,) = diff(old, changed)
        assert (change.kind, change.path, change.values.differing) == ("values", key, 1)
        assert change.values.index == tuple(int(i) for i in torch.unravel_index(torch.tensor(place), state[key].shape))


def test_replaced_by_class_and_by_arguments(net):
    new = copy.deepcopy(net)
    new.fc = nn.Linear(8, 3)
    new.blocks[0][2] = nn.GELU()
    found = diff(net, new)
    assert kinds(found) == [
        ("replaced", "blocks.0.2", "blocks.0.2"),
        ("replaced", "fc", "fc"),
        ("shape", "fc.weight", "fc.weight"),
        ("shape", "fc.bias", "fc.bias"),
    ]
    assert (found.changes[1].old, found.changes[1].new) == ("Linear(out_features=10)", "Linear(out_features=3)")
    assert (found.changes[2].old, found.changes[2].new) == ("(10, 8)", "(3, 8)")


def test_an_attribute_set_by_hand_is_a_change(net):
    new = copy.deepcopy(net)
    new.stem.stride = (2, 2)
    assert str(diff(net, new)) == "~ stem  Conv2d(stride=(1, 1)) -> Conv2d(stride=(2, 2))"


def test_mode_does_not_count(net):
    assert not diff(net, copy.deepcopy(net).eval())


def test_renamed_keeps_its_values_compared(net):
    new = copy.deepcopy(net)
    new.head = new._modules.pop("fc")
    assert str(diff(net, new)) == "~ fc -> head  Linear(in_features=8, out_features=10, bias=True)"
    with torch.no_grad():
        new.head.bias[4] = 7
    assert kinds(diff(net, new)) == [("renamed", "fc", "head"), ("values", "fc.bias", "head.bias")]


def test_the_print_is_that_of_an_edit():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    before = copy.deepcopy(model)
    report = modsurg.rename(model, "1", "activation")
    assert str(diff(before, model)) == str(report) == "~ 1 -> activation  ReLU"


@pytest.mark.parametrize(
    "edit",
    [
        lambda model: modsurg.replace(model, nn.ReLU, nn.GELU),
        lambda model: modsurg.wrap(model, "fc", Adapter),
        lambda model: modsurg.add(model, "extra", nn.Linear(2, 3)),
    ],
)
def test_reports_and_diffs_agree(edit):
    model = nn.Sequential(OrderedDict(fc=nn.Linear(2, 2), act=nn.ReLU()))
    before = copy.deepcopy(model)
    assert str(diff(before, model)) == ""
    assert str(edit(model)).splitlines()[0] == str(diff(before, model)).splitlines()[0]


def test_moved_to_another_parent(net):
    new = copy.deepcopy(net)
    new.tail = nn.Sequential(nn.Flatten(), new._modules.pop("fc"))
    assert kinds(diff(net, new)) == [("added", None, "tail"), ("moved", "fc", "tail.1")]


def test_wrapped_and_unwrapped(net):
    new = copy.deepcopy(net)
    new.fc = Adapter(new.fc)
    assert str(diff(net, new)) == "~ fc  Linear -> Adapter(Linear)"
    assert str(diff(new, net)).startswith("~ fc  Adapter(Linear) -> Linear(")
    with torch.no_grad():
        new.fc.base.bias[0] += 1
    assert kinds(diff(net, new)) == [("wrapped", "fc", "fc.base"), ("values", "fc.bias", "fc.base.bias")]


def test_weights_of_the_wrapper_itself_are_added(net):
    new = copy.deepcopy(net)
    new.fc = nn.Sequential(nn.Sequential(nn.LayerNorm(new.fc.in_features), new.fc), nn.ReLU())
    assert kinds(diff(net, new)) == [("wrapped", "fc", "fc.0.1"), ("added", None, "fc.0.0")]
    assert kinds(diff(new, net)) == [("unwrapped", "fc.0.1", "fc"), ("removed", "fc.0.0", "fc.0.0")]


def test_a_whole_model_wrapped(net):
    assert str(diff(net, nn.Sequential(copy.deepcopy(net), nn.Softmax(1)))) == "~ (root)  Net -> Sequential(Net)"


def test_a_block_less_is_one_removal_and_a_shift(net):
    new = copy.deepcopy(net)
    del new.blocks[1]
    found = diff(net, new)
    assert kinds(found) == [
        ("removed", "blocks.1", "blocks.1"),
        *(("renamed", f"blocks.{i}", f"blocks.{i - 1}") for i in (2, 3, 4)),
    ]
    assert "2-4 -> 1-3" in str(found)


def test_a_block_less_in_a_file(net, tmp_path):
    new = copy.deepcopy(net)
    del new.blocks[1]
    modsurg.save_state(net, tmp_path / "a.safetensors")
    modsurg.save_state(new, tmp_path / "b.safetensors")
    found = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [change.kind for change in found] == ["removed", "renamed", "renamed", "renamed"]


def test_a_layer_more_between_trained_ones():
    torch.manual_seed(0)
    first, second = nn.Linear(4, 8), nn.Linear(8, 2)
    old = nn.Sequential(first, nn.ReLU(), second)
    new = copy.deepcopy(nn.Sequential(first, nn.BatchNorm1d(8), nn.ReLU(), second))
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(0.1)
    found = diff(old, new)
    assert [change.kind for change in found if change.kind != "values"] == ["added", "renamed", "renamed"]
    assert found.counts["values"] == 4


def test_swapped_blocks_are_told_by_their_values(net):
    new = copy.deepcopy(net)
    new.blocks[1], new.blocks[3] = new.blocks[3], new.blocks[1]
    assert sorted(kinds(diff(net, new))) == [
        ("renamed", "blocks.1", "blocks.3"),
        ("renamed", "blocks.3", "blocks.1"),
    ]


def test_blocks_that_shifted_by_one(net):
    new = copy.deepcopy(net)
    torch.manual_seed(1)
    new.blocks = nn.Sequential(*list(new.blocks)[1:], Net().blocks[0])
    assert sorted(kinds(diff(net, new))) == sorted(
        [("removed", "blocks.0", "blocks.0"), ("added", None, "blocks.4")]
        + [("renamed", f"blocks.{i}", f"blocks.{i - 1}") for i in range(1, 5)]
    )


def test_two_blocks_gone_and_a_fresh_one_at_the_end(net):
    old = net.blocks
    new = nn.Sequential(*copy.deepcopy(list(old)[2:]), Net().blocks[0])
    assert str(diff(old, new)).splitlines()[:-1] == [
        "- 0           Sequential",
        "- 1           Sequential",
        "~ 2-4 -> 0-2  Sequential",
        "+ 3           Sequential",
    ]


def test_a_block_that_went_to_another_list_with_a_fresh_one_in_its_place(net):
    old = nn.ModuleDict({"a": net.blocks, "b": nn.Sequential(nn.Identity())})
    new = copy.deepcopy(old)
    new.b.append(new.a[1])
    new.a[1] = Net().blocks[0]
    assert kinds(diff(old, new)) == [("added", None, "a.1"), ("moved", "a.1", "b.1")]


def test_dtype_and_requires_grad_are_said_once(net):
    new = copy.deepcopy(net)
    new.blocks.requires_grad_(False)
    found = diff(net, new)
    assert found.counts == {"requires_grad": 20}
    assert str(found).splitlines()[0] == "~ blocks  requires_grad True -> False  (20 tensors)"
    assert {change.path for change in found} == {f"blocks.{name}" for name, _ in net.blocks.named_parameters()}


def test_dtypes_are_compared_by_value(net):
    new = copy.deepcopy(net).to(torch.float64)
    assert set(diff(net, new).counts) == {"dtype"}


def test_tied_and_untied():
    tied = Tied()
    untied = copy.deepcopy(tied)
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    assert str(diff(tied, untied)) == "~ head.weight  tied to embed.weight -> its own tensor"
    assert str(diff(untied, tied)) == "~ head.weight  its own tensor -> tied to embed.weight"
    assert not diff(tied, copy.deepcopy(tied))


def test_a_tied_tensor_is_reported_once():
    tied = Tied()
    new = copy.deepcopy(tied)
    with torch.no_grad():
        new.head.weight[0, 0] += 1
    assert kinds(diff(tied, new)) == [("values", "embed.weight", "embed.weight")]


def test_a_file_that_keeps_a_tied_tensor_once_is_no_difference(tmp_path):
    from safetensors.torch import save_file

    tied = Tied()
    save_file({"embed.weight": tied.embed.weight.detach()}, tmp_path / "foreign.safetensors")
    modsurg.save_state(tied, tmp_path / "ours.safetensors")
    assert not diff(tied, tmp_path / "foreign.safetensors")
    assert not diff(tmp_path / "ours.safetensors", tied)
    assert not diff(tmp_path / "ours.safetensors", tmp_path / "foreign.safetensors")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.safetensors.index.json"])
def test_files_of_every_format_against_the_model(net, tmp_path, name):
    path = modsurg.save_state(net, tmp_path / name)
    assert not diff(net, path)
    assert not diff(path, modsurg.read_state(path))
    with torch.no_grad():
        net.fc.bias[2] += 1
    (change,) = diff(path, net)
    assert (change.path, change.values.index) == ("fc.bias", (2,))


def test_files_of_two_formats(net, tmp_path):
    first = modsurg.save_state(net, tmp_path / "a.safetensors")
    torch.save(net.state_dict(), tmp_path / "b.pt")
    assert not diff(first, tmp_path / "b.pt")


def test_whole_model_files_are_compared_with_their_classes(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(4))
    modsurg.save_model(model, tmp_path / "a.safetensors")
    assert not diff(model, tmp_path / "a.safetensors")
    assert not diff(tmp_path / "a.safetensors", model.state_dict())
    model[1] = nn.GELU()
    model[0].stride = (2, 2)
    modsurg.save_model(model, tmp_path / "b.safetensors")
    for new in (model, tmp_path / "b.safetensors"):
        assert [(change.kind, change.path) for change in diff(tmp_path / "a.safetensors", new)] == [
            ("replaced", "0"),
            ("replaced", "1"),
        ]


@pytest.mark.parametrize("size", [3, 30_000], ids=["in the tree", "beside it"])
def test_what_a_whole_model_file_holds_beside_its_state_is_compared(tmp_path, size):
    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache", torch.rand(size, dtype=torch.float64), persistent=False)
            self.plain = torch.rand(size)

    old = Holding()
    new = copy.deepcopy(old)
    first = modsurg.save_model(old, tmp_path / "old.safetensors")
    assert not diff(first, new)
    new.cache[1], new.plain[1] = 7, 7
    second = modsurg.save_model(new, tmp_path / "new.safetensors")
    for pair in ((first, second), (first, new), (old, second), (old, new)):
        assert sorted(change.path for change in diff(*pair)) == ["cache", "plain"]
    assert not diff(second, new)


def test_a_wrapper_s_prefix_in_the_keys_is_one_line(net):
    state = {f"module.{key}": value.clone() for key, value in net.state_dict().items()}
    state["module.fc.bias"][1] = 3
    found = diff(net.state_dict(), state)
    assert kinds(found) == [("moved", "", "module"), ("values", "fc.bias", "module.fc.bias")]


def test_nested_states_with_numbers(net):
    old = {"model": net.state_dict(), "epoch": 3, "rates": [0.1, 0.2]}
    new = {"model": net.state_dict(), "epoch": 4, "rates": [0.1, 0.2], "best": 0.5}
    found = diff(old, new)
    assert kinds(found) == [("value", "epoch", "epoch"), ("added", None, "best")]
    assert str(found).splitlines()[0] == "~ epoch  3 -> 4"


def test_arrays_and_numbers_of_numpy_are_compared():
    old = {"array": numpy.ones(3), "random": ("MT19937", numpy.arange(4), 7), "best": numpy.float32(0.5)}
    new = {"array": numpy.zeros(3), "random": ("MT19937", numpy.arange(4)[::-1], 7), "best": numpy.float32(0.25)}
    assert [(change.kind, change.path) for change in diff(old, new)] == [
        ("values", "array"),
        ("values", "random.1"),
        ("value", "best"),
    ]
    assert not diff(old, copy.deepcopy(old))


def test_an_array_that_a_module_holds_is_compared(net):
    net.table, net.width = numpy.ones(3), numpy.int64(3)
    other = copy.deepcopy(net)
    assert not diff(net, other)
    other.table[1], other.width = 0, numpy.int64(4)
    assert [(change.kind, change.path) for change in diff(net, other)] == [("replaced", ""), ("values", "table")]


@pytest.mark.parametrize("value", [object(), numpy.array(["a"]), numpy.ones(2, dtype=">f4")])
def test_what_is_known_by_its_class_alone_is_said(value):
    found = diff({"a": {"b": value}}, {"a": {"b": value}})
    assert not found
    assert str(found) == "! of a.b only the class is known, and it was not compared further"


def test_nan_equals_nan_and_zeros_have_signs():
    nan = torch.tensor([float("nan"), 0.0])
    assert not diff({"a": nan}, {"a": nan.clone()})
    (change,) = diff({"a": nan}, {"a": torch.tensor([float("nan"), -0.0])})
    assert (change.values.differing, change.values.max_abs) == (1, 0.0)


def test_what_of_a_file_was_not_compared_is_said(net, tmp_path):
    torch.save({"model": net.state_dict(), "epoch": 3}, tmp_path / "run.pt")
    found = diff(net, tmp_path / "run.pt")
    assert not found
    assert "only model was compared, not epoch" in str(found).replace("\n ", "")


PACKED = (torch.ones(3), {"scale": [torch.zeros(2)]})


@pytest.mark.parametrize("place", ["beside", "within"])
@pytest.mark.parametrize(
    ("other", "same"),
    [
        (PACKED, True),
        ((torch.ones(3), {"scale": [torch.ones(2)]}), False),
        ((torch.ones(3),), False),
        ((torch.ones(3), {"scale": []}), False),
        ("nothing", False),
    ],
)
def test_tensors_beside_the_state_count(tmp_path, place, other, same):
    for name, packed in (("a", PACKED), ("b", other)):
        state = {"w": torch.ones(2)}
        data = {"model": state, "packed": packed} if place == "beside" else {**state, "packed": packed}
        torch.save(data, tmp_path / f"{name}.pt")
    found = diff(tmp_path / "a.pt", tmp_path / "b.pt")
    assert (bool(found), found.to_dict()["same"], found.left) == (not same, same, () if same else ("packed",))
    assert ("not packed" in str(found).replace("\n ", "")) is not same
    assert diff({"w": torch.ones(2)}, tmp_path / "a.pt")


def test_whole_pickled_models(tmp_path):
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, activation=nn.functional.gelu), nn.ReLU())
    torch.save(model, tmp_path / "a.pt")
    assert not diff(model, tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_nested_tensors():
    old, new = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), torch.nested.nested_tensor([torch.ones(2)])
    assert not diff({"a": old}, {"a": old.clone()})
    assert [change.kind for change in diff({"a": old}, {"a": new})] == ["shape"]


def test_meta_says_what_was_not_compared(net):
    found = diff(net, copy.deepcopy(net).to("meta"))
    assert not found
    assert "not compared" in str(found)
    assert str(diff(net.to("meta"), copy.deepcopy(net))) == ""


def test_uncommon_modules():
    for make in (
        lambda: nn.LazyLinear(3),
        lambda: nn.LSTM(2, 3, bidirectional=True),
        lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
        lambda: parametrizations.orthogonal(nn.Linear(2, 2)),
        lambda: nn.MultiheadAttention(4, 2),
        lambda: nn.ParameterList([torch.ones(2), torch.zeros(3)]),
        lambda: torch.compile(nn.Linear(2, 2)),
        lambda: nn.Module(),
    ):
        model = make()
        assert not diff(model, copy.deepcopy(model))


def test_compile_wrappers_are_looked_through(net):
    assert not diff(torch.compile(net), copy.deepcopy(net))


def test_to_dict_is_json_with_stable_keys(net):
    new = copy.deepcopy(net)
    new.fc = nn.Identity()
    with torch.no_grad():
        new.stem.weight[0, 0, 0, 0] = float("nan")
    data = json.loads(json.dumps(diff(net, new).to_dict(), allow_nan=False))
    assert list(data) == [
        "old",
        "new",
        "same",
        "tensors_compared",
        "bytes_compared",
        "counts",
        "changes",
        "notes",
        "left",
    ]
    assert all(list(change) == ["kind", "path", "old_path", "old", "new", "values"] for change in data["changes"])
    assert data["changes"][0]["values"] == {
        "differing": 1,
        "total": 216,
        "max_abs": "nan",
        "max_rel": "inf",
        "index": [0, 0, 0, 0],
        "old": pytest.approx(net.stem.weight[0, 0, 0, 0].item()),
        "new": "nan",
    }


def test_a_large_tensor_is_compared_in_pieces(tmp_path):
    old = torch.zeros(3_000_000)
    new = old.clone()
    new[2_999_999] = 2
    seen = []
    (change,) = diff({"a": old}, {"a": new}, progress=lambda done, total: seen.append((done, total)))
    assert change.values.index == (2_999_999,)
    assert seen == [(12_000_000, 12_000_000)]


def test_what_can_t_be_compared_is_said(tmp_path):
    with pytest.raises(TypeError, match=r"compares models, states and files, not a int: pass an nn\.Module"):
        diff(3, nn.Linear(1, 1))
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.pt"):
        diff(tmp_path / "gone.pt", nn.Linear(1, 1))
    (tmp_path / "page.safetensors").write_text("<!doctype html>")
    with pytest.raises(FormatError, match="is an HTML page"):
        diff(nn.Linear(1, 1), tmp_path / "page.safetensors")


def golden_pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    old = Net()
    for parameter in old.parameters():
        nn.init.ones_(parameter)
    for number, block in enumerate(old.blocks):
        nn.init.constant_(block[0].weight, number)
        block[0].weight.data[0] = number + 0.5
    new = copy.deepcopy(old)
    del new.blocks[1]
    new.stem = nn.Conv2d(1, 8, 3, padding=1)
    new.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 2))
    new.fc = nn.Identity()
    for parameter in (*new.stem.parameters(), *new.head.parameters()):
        nn.init.zeros_(parameter)
    new.blocks[0][2] = nn.GELU()
    new.blocks[0].requires_grad_(False)
    with torch.no_grad():
        new.blocks[2][0].weight[7, 0, 1, 2] = 5
        new.blocks[3][0].bias.mul_(2)
    return old, new


@pytest.mark.parametrize(("suffix", "show"), [("txt", str), ("md", lambda found: found.to_markdown())])
def test_golden(suffix, show):
    text = show(diff(*golden_pair()))
    assert text + "\n" == (GOLDEN / f"diff.{suffix}").read_text()


def test_golden_html():
    found = diff(*golden_pair())
    assert found._repr_html_() + "\n" == (GOLDEN / "diff.html").read_text()


def test_width_and_colour():
    found = diff(*golden_pair())
    assert max(map(len, str(found).splitlines())) <= 80
    coloured = found.render(color=True)
    assert "\x1b[31m-" in coloured
    assert "\x1b" not in found.render()
    assert max(map(len, found.render(width=120).splitlines())) > 80


def test_a_sharded_model_is_compared_by_its_values(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = nn.Sequential(nn.Linear(4, 4))
        sharded = fully_shard(copy.deepcopy(model), mesh=init_device_mesh("cpu", (1,)))
        assert diff(model, sharded).counts == {"replaced": 1}
        with torch.no_grad():
            model[0].bias += 1
        assert diff(model, sharded).counts == {"replaced": 1, "values": 1}
    finally:
        torch.distributed.destroy_process_group()


def test_a_default_device_changes_nothing(tmp_path):
    """As after torch.set_default_device("cuda"): the files and what is counted of them are on the CPU all the same."""
    states = {}
    for name, dtype, shift in (("a", torch.float32, 0), ("b", torch.float16, 1)):
        states[name] = {f"layers.{n}.weight": torch.full((4, 4), float(n + shift), dtype=dtype) for n in range(3)}
        states[name]["head"] = torch.arange(6.0) + shift
        modsurg.save_state(states[name], tmp_path / f"{name}.safetensors")
    paths = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    expected = diff(*paths).render()
    with torch.device("meta"):
        assert diff(*paths).render() == expected
    assert "head" in expected


def test_keys_that_lie_in_other_keys():
    state = {"a": torch.rand(2), "a.b": torch.rand(3), "c.d": torch.rand(1), "c": torch.rand(2)}
    assert not diff(state, dict(reversed(state.items())))
    for key in state:
        other = {name: value.clone() for name, value in state.items()}
        other[key][0] = 7
        assert kinds(diff(state, other)) == [("values", key, key)]
        del other[key]
        assert kinds(diff(state, other)) == [("removed", key, key)]
        assert kinds(diff(other, state)) == [("added", None, key)]


def test_a_moved_prefix_is_one_line(net):
    state = net.state_dict()
    head = {"head.weight": torch.rand(2, 2)}
    old = {f"backbone.{key}": value for key, value in state.items()} | head
    found = diff(old, state | head)
    assert str(found).splitlines()[0] == "~ backbone.* -> *  3 moved"
    assert {change.kind for change in found} == {"moved"} | {"removed"} & {change.kind for change in found}


def test_a_tolerance(net):
    new = copy.deepcopy(net)
    with torch.no_grad():
        new.fc.bias += 1e-4
        new.fc.weight[0, 0] += 1
    found = diff(net, new, atol=1e-3)
    assert kinds(found) == [("values", "fc.weight", "fc.weight")]
    assert "! 1 tensor differs by at most atol=0.001, and count as equal" in str(found)
    assert not diff(net, new, atol=2)
    assert kinds(diff(net, new)) == [("values", "fc.weight", "fc.weight"), ("values", "fc.bias", "fc.bias")]
    with pytest.raises(SummaryError, match="atol='a' must be a number, 0 or more"):
        diff(net, new, atol="a")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_differences_that_are_rounding_are_told(net, dtype):
    rounded = {key: value.to(dtype) if value.is_floating_point() else value for key, value in net.state_dict().items()}
    name = str(dtype).removeprefix("torch.")
    assert f"all differences are within the rounding of {name}" in str(diff(net.state_dict(), rounded))
    with torch.no_grad():
        net.fc.bias[0] += 1
    assert "rounding" not in str(diff(net.state_dict(), rounded))
