import pytest
import torch
from torch import nn

from modsurg import select
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


def test_a_compiled_model_is_looked_through(net):
    assert select(torch.compile(net), "2.0").modules == (net[2][0],)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("2.7", r'nothing at "2.7" in Sequential: it has 2 children, 0 to 1'),
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
    with pytest.raises(NoMatchError, match=r'empty \(None\). Fill it: add\(model, "downsample", module\)'):
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
