import copy

import pytest
import torch
from torch import nn

from modsurg import replace, select
from modsurg.errors import CountError, NoMatchError, WhereError


@pytest.fixture
def net():
    shared = nn.ReLU()
    return nn.Sequential(
        nn.Linear(2, 2), shared, nn.Sequential(nn.Linear(2, 2, bias=False), shared), nn.Conv2d(1, 1, 1)
    )


def test_each_form_of_where(net):
    assert select(net, "2.0").paths == ("2.0",)
    assert select(net, "?").paths == ("0", "1", "2", "3")
    assert select(net, "**.0").paths == ("0", "2.0")
    assert select(net, r"re:2\..*").paths == ("2.1", "2.0")
    assert select(net, nn.Linear).paths == ("0", "2.0")
    assert select(net, (nn.Linear, nn.Conv2d)).paths == ("0", "2.0", "3")
    assert select(net, lambda path, module: path.startswith("2.")).paths == ("2.1", "2.0")
    assert select(net, net[2][0]).paths == ("2.0",)
    assert select(net, "").modules == (net,)


def test_a_tied_module_is_one_site_with_all_its_paths(net):
    (site,) = select(net, nn.ReLU)
    assert site.paths == ("1", "2.1")
    (site,) = select(net, "2.1")
    assert site.paths == ("1", "2.1")
    assert site.matched == ("2.1",)
    assert site.path == "2.1"


def test_selections_combine_in_module_order(net):
    linears, inner = select(net, nn.Linear), select(net, "2.**")
    assert (linears & inner).paths == ("2.0",)
    assert (inner | linears).paths == ("0", "2.1", "2", "2.0")
    assert (linears - inner).paths == ("0",)
    assert net[0] in linears
    assert "2.0" in linears
    assert select(net, linears - inner).paths == ("0",)


def test_selections_of_two_models_do_not_mix(net):
    with pytest.raises(WhereError, match="two different models"):
        select(net, nn.Linear) & select(nn.Sequential(nn.Linear(1, 1)), nn.Linear)


def test_negative_numbers_count_from_the_end(net):
    assert select(net, "-1").paths == ("3",)
    assert select(net, "-2.-1").paths == ("2.1",)
    sliced = nn.Sequential(*(nn.ReLU() for _ in range(4)))[2:]
    assert list(sliced._modules) == ["2", "3"]
    assert select(sliced, "-1").paths == ("3",)


def test_count_is_asserted(net):
    assert len(select(net, nn.Linear, count=2)) == 2
    with pytest.raises(CountError, match=r'count=1, but 2 sites match in Sequential: "0", "2.0"'):
        select(net, nn.Linear, count=1)
    with pytest.raises(CountError, match=r'count=2, but 1 site matches in Sequential: "0"'):
        select(net, "0", count=2)
    with pytest.raises(CountError, match="count='2', but 2 sites match"):
        select(net, nn.Linear, count="2")


def test_a_name_that_is_there_is_no_pattern():
    net = nn.ModuleDict({"x[0]": nn.ReLU(), "x0": nn.ReLU(), "a*": nn.ReLU(), "re:b": nn.ReLU(), "ab": nn.ReLU()})
    for name in net:
        assert select(net, name).paths == (name,)


def test_a_compiled_model_is_looked_through(net):
    assert select(torch.compile(net), "2.0").modules == (net[2][0],)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("2.7", r'nothing at "2.7" in Sequential: "2" has 2 children, 0 to 1'),
        ("-5", "it has 4 children, 0 to 3"),
        ("0.weight", "weight is a tensor of Linear, not a module"),
        (nn.LSTM, r"no LSTM in Sequential. It has Sequential \(2\), Linear \(2\)"),
        ("re:x", "must match a whole path, such as"),
        (lambda path, module: False, "holds for none of the 6 modules"),
        (nn.ReLU(), "this ReLU object is not in Sequential"),
    ],
)
def test_no_match_says_what_is_there(net, where, message):
    with pytest.raises(NoMatchError, match=message):
        select(net, where)


def test_a_typo_in_any_segment_names_the_nearest_path():
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"attention": nn.ModuleDict({"query": nn.Linear(1, 1)})})})
    for typo in ("encoderr.attention.query", "encoder.atention.query", "encoder.attention.qury", "query", "x.query"):
        with pytest.raises(NoMatchError, match=r'Nearest: .*"encoder\.attention\.query"'):
            select(model, typo)


def test_an_empty_slot_is_told_apart():
    model = nn.Sequential(nn.ReLU())
    model.register_module("downsample", None)
    with pytest.raises(NoMatchError, match=r'it is None. Try: add\(model, "downsample", module\)'):
        select(model, "downsample")


def test_what_is_no_where(net):
    with pytest.raises(WhereError, match="where=5 is a int; give a path"):
        select(net, 5)


def test_modules_that_left_the_model(net):
    linears = select(net, "2.0")
    del net[2]
    with pytest.raises(NoMatchError, match="none of the selected modules is in Sequential any more"):
        select(net, linears)


def test_the_nearest_paths_and_no_others():
    model = nn.Sequential(nn.ModuleDict({"conv1": nn.ReLU(), "conv2": nn.ReLU()}), nn.ModuleDict({"conv1": nn.ReLU()}))
    with pytest.raises(NoMatchError, match=r'nothing at "0.con1" in Sequential. Nearest: "0.conv1", "0.conv2"\.$'):
        select(model, "0.con1")


@pytest.mark.parametrize(
    "where, said",
    [
        ("blocks[1].conv", 'Nearest: "blocks.1.conv"'),
        ("blocks/1/conv", 'Nearest: "blocks.1.conv"'),
        ("blocks..1.conv", 'Nearest: "blocks.1.conv"'),
        ("model.blocks.0.conv", 'Nearest: "blocks.0.conv"'),
        ("1.conv", 'Nearest: "blocks.1.conv"'),
        ("blocks.7.conv", '"blocks" has 2 children, 0 to 1'),
        ("blocks.0.skip.0.conv", r"it is None. Try: add\(model, \"blocks.0.skip\", module\)"),
        ("blocks.0.conv.weight.data", "weight is a tensor of Conv2d, not a module"),
        ("blocks.0. conv", 'Nearest: "blocks.0.conv"'),
        (".", "nothing at"),
        (".blocks", 'Nearest: "blocks"'),
        ("blocks[-1].conv", 'Nearest: "blocks.1.conv"'),
        ("blocks[-2].conv", 'Nearest: "blocks.0.conv"'),
        ("Conv2d", r"in ModuleDict: Conv2d is the class of 3 modules; give the class, not its name\.$"),
        ("**.Sequential", "Sequential is the class of 1 module; give the class"),
    ],
)
def test_what_is_meant_by_a_path_of_another_kind_is_named(where, said):
    block = nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1), "skip": nn.Identity()})
    block["skip"] = None
    model = nn.ModuleDict({"blocks": nn.Sequential(block, copy.deepcopy(block)), "conv": nn.Conv2d(1, 1, 1)})
    with pytest.raises(NoMatchError, match=said):
        select(model, where)


def test_a_union_of_classes():
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.GELU())
    assert select(model, nn.ReLU | nn.GELU).paths == ("1", "2")
    with pytest.raises(NoMatchError, match="no torch.nn.* in Sequential. It has"):
        select(model, nn.Tanh | nn.SiLU)


@pytest.mark.parametrize(
    "where, said",
    [
        ((nn.ReLU, 3), "does not hold classes only; give classes"),
        (lambda path: True, "can't be called with a path and a module: too many positional arguments"),
        ({"0", "1"}, "is a set; give a path, .* or a list of these"),
    ],
)
def test_a_where_of_another_kind_is_refused(where, said):
    with pytest.raises(WhereError, match=said):
        select(nn.Sequential(nn.ReLU(), nn.ReLU()), where)


@pytest.mark.parametrize(
    "model, said", [("fc", "a str"), ({}, "a dict"), (None, "a NoneType"), (nn.ReLU, "the class ReLU")]
)
def test_what_is_no_model_is_refused(model, said):
    with pytest.raises(WhereError, match=f"the model is {said}, not an nn.Module object; the model comes first"):
        select(model, "fc")


def test_a_compiled_part_is_looked_through():
    model = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), backend="eager"))
    assert select(model, "0.1").paths == select(model, "0.-1").paths == ("0._orig_mod.1",)


@pytest.fixture
def tied():
    shared = nn.Linear(2, 2)
    return nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(2, 2))


def test_two_names_of_one_module_are_both_kept(tied):
    both = select(tied, "0") | select(tied, "2")
    (site,) = both
    assert site.matched == ("0", "2")
    old = tied[0]
    replace(tied, both, lambda old: nn.Linear(2, 3), untie=True)
    assert old not in tied.modules()


def test_minus_takes_away_paths(tied):
    (first, second) = select(tied, nn.Linear) - "2"
    assert (first.matched, first.paths, second.matched) == (("0",), ("0", "2"), ("3",))
    assert (select(tied, nn.Linear) - ["0", "2"]).paths == ("3",)
    assert len(select(tied, "0") - "0") == 0


def test_and_keeps_common_paths(tied):
    assert [site.matched for site in select(tied, "**") & "2"] == [("2",)]
    assert len(select(tied, "0") & "2") == 0


@pytest.mark.parametrize(
    "combine, paths",
    [
        (lambda s: s & nn.Linear, ("0", "3")),
        (lambda s: s & (lambda path, module: path == "1"), ("1",)),
        (lambda s: s - "0" - "2" - "", ("1", "3")),
        (lambda s: s & ["3", nn.ReLU], ("1", "3")),
        (lambda s: (s & "3") | nn.ReLU, ("1", "3")),
        (lambda s: s & nn.LSTM, ()),
        (lambda s: s - "9" & "3", ("3",)),
    ],
)
def test_the_other_side_of_an_operator_is_resolved(tied, combine, paths):
    assert combine(select(tied, "**")).paths == paths


def test_an_empty_selection_says_so(tied):
    with pytest.raises(NoMatchError, match="the selection is empty: it selects nothing in Sequential"):
        replace(tied, select(tied, "0") - "0", nn.ReLU)


def test_that_nothing_matches_can_be_asserted(tied):
    assert len(select(tied, nn.Dropout, count=0)) == 0
    assert len(select(tied, ["9", nn.Dropout], count=0)) == 0
    report = replace(tied, nn.Dropout, nn.Identity, count=0)
    assert report.changes == ()
    with pytest.raises(CountError, match='count=0, but 1 site matches in Sequential: "1"'):
        replace(tied, nn.ReLU, nn.GELU, count=0)


def test_a_list_is_all_of_its_forms_in_their_order(tied):
    assert select(tied, ["3", nn.ReLU, "0"]).paths == ("3", "1", "0")
    assert select(tied, [["3"], select(tied, "0"), lambda path, module: path == "3"]).paths == ("3", "0")
    assert [site.matched for site in select(tied, ["2", "0"])] == [("2", "0")]
    assert len(replace(tied, ["3", nn.ReLU], nn.Identity).changes) == 2


def test_each_form_of_a_list_must_match(tied):
    with pytest.raises(NoMatchError, match='nothing at "9" in Sequential: it has 4 children'):
        select(tied, ["0", "9"])
    with pytest.raises(NoMatchError, match="the list is empty"):
        select(tied, [])


def test_the_repr_of_a_site_is_one_line(tied):
    assert [repr(site) for site in select(tied, "2") | nn.ReLU] == [
        "<Linear at '2' (also '0')>",
        "<ReLU at '1'>",
    ]


@pytest.mark.filterwarnings("ignore:1 match lies inside an edited one")
def test_an_edit_of_a_list_takes_the_outer_sites_first():
    model = nn.Sequential(nn.Sequential(nn.ReLU()))
    report = replace(model, ["0.0", "0"], nn.Identity)
    assert [change.paths for change in report.changes] == [("0",)]
