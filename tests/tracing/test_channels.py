import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modsurg.tracing.channels import Channels, channels
from modsurg.tracing.labels import Labels, flat_sets


class Called(nn.Module):
    """A model that is one function of some layers."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def found(function, example, **layers):
    result = channels(Called(function, **layers).eval(), example)
    assert isinstance(result, Channels), result
    return result


def sets(result, path, name, dim):
    return flat_sets(result.leaves[path, name][dim], result.sets).tolist()


def together(result, *places):
    """Whether these dimensions have the same channels, in the same order, and can change."""
    first, *others = (sets(result, *place) for place in places)
    return result.fixed not in first and all(other == first for other in others)


def test_a_convolution_its_norm_and_what_reads_it():
    result = channels(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), (2, 3, 8, 8))
    assert together(result, ("0", "weight", 0), ("0", "bias", 0), ("1", "running_var", 0), ("3", "weight", 1))
    assert result.reads["3", "weight"] == {1}
    assert result.reads["0", "weight"] == {1}
    assert set(sets(result, "0", "weight", 1)) == {result.fixed}  # the channels of the picture
    assert result.parameters == 3 * 4 * 9 + 4 + 8 + 10
    assert result.macs == 2 * (36 * 4 * 27 + 36 * 2 * 4)


def test_a_sum_ties_and_a_concatenation_does_not():
    layers = {"a": nn.Linear(3, 4), "b": nn.Linear(3, 4), "c": nn.Linear(4, 2), "d": nn.Linear(8, 2)}
    result = found(lambda m, x: m.c(m.a(x) + m.b(x)) + m.d(torch.cat([m.a(x), m.b(x)], 1)), (1, 3), **layers)
    assert together(result, ("a", "weight", 0), ("b", "weight", 0), ("c", "weight", 1))
    result = found(lambda m, x: m.d(torch.cat([m.a(x), m.b(x)], 1)), (1, 3), **layers)
    assert sets(result, "d", "weight", 1) == sets(result, "a", "weight", 0) + sets(result, "b", "weight", 0)
    assert len(set(sets(result, "d", "weight", 1))) == 8


def test_flattened_pictures_repeat_a_channel():
    result = channels(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(8, 2)), (1, 3, 2, 2))
    one, two = sets(result, "0", "weight", 0)
    assert sets(result, "2", "weight", 1) == [one] * 4 + [two] * 4


def test_groups_go_as_a_whole():
    result = channels(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1, groups=2)), (1, 3, 2, 2))
    (a, b), (c, d) = set(sets(result, "0", "weight", 0)), set(sets(result, "1", "weight", 0))
    assert {a, b} == {c, d}
    assert (
        sets(result, "1", "weight", 0)
        == [sets(result, "0", "weight", 0)[0]] * 4 + [sets(result, "0", "weight", 0)[2]] * 4
    )
    assert [attribute.name for attribute in result.attributes if attribute.path == "1"] == ["groups"]
    depthwise = channels(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1, groups=4)), (1, 3, 2, 2))
    assert sets(depthwise, "1", "weight", 0) == [n for n in sets(depthwise, "0", "weight", 0) for _ in range(2)]


def test_heads_go_as_a_whole():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = 2
            self.qkv = nn.Linear(3, 3 * 2 * 4)
            self.out = nn.Linear(8, 3)

        def forward(self, x):
            b, n, _ = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, 4).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).reshape(b, n, -1))

    result = channels(Attention(), (1, 5, 3))
    one, two = sorted(set(sets(result, "out", "weight", 1)))
    assert sets(result, "out", "weight", 1) == [one] * 4 + [two] * 4
    assert sets(result, "qkv", "weight", 0) == ([one] * 4 + [two] * 4) * 3
    (heads,) = (dim for attribute, dim in result.attributes.items() if attribute.name == "heads")
    assert flat_sets(heads, result.sets).tolist() == [one, two]
    assert not result.spanned


def test_torchs_own_attention_ties_its_heads_to_its_input():
    model = nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    for mode in (True, False):
        result = channels(model.train(mode), (1, 5, 3))
        one, two = sorted(set(sets(result, "0", "weight", 0)))
        assert (
            sets(result, "0", "weight", 0) == sets(result, "1.self_attn.out_proj", "weight", 1) == [one] * 4 + [two] * 4
        )
        assert together(result, ("1.linear1", "weight", 0), ("1.linear2", "weight", 1))
        assert result.spanned[one] == "a norm"


def test_grouped_heads():
    def attend(m, x):
        q = m.q(x).view(1, 5, 4, 2).transpose(1, 2)
        k, v = (each(x).view(1, 5, 2, 2).transpose(1, 2) for each in (m.k, m.v))
        return m.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).reshape(1, 5, 8))

    result = found(attend, (1, 5, 3), q=nn.Linear(3, 8), k=nn.Linear(3, 4), v=nn.Linear(3, 4), o=nn.Linear(8, 3))
    one, two = sorted(set(sets(result, "k", "weight", 0)))
    assert sets(result, "k", "weight", 0) == sets(result, "v", "weight", 0) == [one] * 2 + [two] * 2
    assert sets(result, "q", "weight", 0) == sets(result, "o", "weight", 1) == [one] * 4 + [two] * 4


@pytest.mark.parametrize(
    "function, read",
    [
        (lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), [0, 0, 0, 0, 1, 1, 1, 1]),
        (lambda m, x: m.b(F.glu(m.a(x), 1)[:, :2]), [0, 1, 2, 3, 0, 1, 2, 3]),
        (lambda m, x: m.b(m.a(x).view(1, 2, 4, 2, 2).transpose(1, 2).flatten(1, 2)[:, :2]), None),
    ],
)
def test_what_is_split_goes_together(function, read):
    result = found(function, (1, 3, 2, 2), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(2, 2, 1))
    places = sets(result, "a", "weight", 0)
    if read is not None:
        assert [sorted(set(places)).index(each) for each in places] == read
    else:  # shuffled channels: each half gets smaller
        assert places[:4] == places[4:]


def test_squeeze_and_excite():
    def excite(m, x):
        y = m.a(x)
        return m.d(y * torch.sigmoid(m.c(torch.relu(m.b(y.mean((2, 3), keepdim=True))))))

    layers = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(4, 2, 1), "c": nn.Conv2d(2, 4, 1), "d": nn.Conv2d(4, 1, 1)}
    result = found(excite, (1, 3, 2, 2), **layers)
    assert together(result, ("a", "weight", 0), ("b", "weight", 1), ("c", "weight", 0), ("d", "weight", 1))
    assert together(result, ("b", "weight", 0), ("c", "weight", 1))
    assert not result.spanned


@pytest.mark.parametrize(
    "function, what",
    [
        (lambda y: y / y.mean(1, keepdim=True), "a mean"),
        (lambda y: y.softmax(1), "a softmax"),
        (lambda y: F.layer_norm(y, (4,)), "a norm"),
        (lambda y: F.group_norm(y, 1), "a norm"),
    ],
)
def test_operations_over_all_the_channels_are_told(function, what):
    result = found(lambda m, x: m.b(function(m.a(x))), (1, 3), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    assert {result.spanned[each] for each in sets(result, "a", "weight", 0)} == {what}


@pytest.mark.parametrize("function", [lambda y: torch.fft.fft(y).real, lambda y: torch.linalg.svd(y)[0].sum() + y])
def test_an_unknown_operation_is_told_with_its_module(function):
    result = found(lambda m, x: m.b(function(m.a(x))), (4, 3), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    (text,) = {result.refused[each] for each in sets(result, "a", "weight", 0)}
    assert text.endswith("in the model")


def test_a_number_of_the_code_that_sizes_two_things_ties_them():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.width = 4
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            one, two = self.a(x).split(self.width, 1)
            return self.b(one) + self.c(two)

    result = channels(Sized(), (1, 3))
    assert together(result, ("b", "weight", 1), ("c", "weight", 1))


def test_the_model_and_the_random_state_stay_as_they_are():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    kinds = {name: type(value) for name, value in vars(model[0]).items()}
    channels(model, (2, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert kinds == {name: type(value) for name, value in vars(model[0]).items()}
    assert torch.equal(torch.get_rng_state(), state)


def test_what_fails_is_told():
    failure = channels(nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2)), (1, 3))
    assert str(failure).startswith("1 (Linear, weight 2x5")


def test_products_meet_in_their_common_sizes():
    labels = Labels()
    whole = labels.fresh(12)
    a = labels.split(whole, (2, 6))
    b = labels.split(whole, (4, 3))
    labels.unify(a, b)
    assert labels.resolve().shape == (labels.count,)
    assert [part.size for part in labels.split(whole, (1, 12))] == [1, 12]


def test_a_channel_that_is_picked_stays_where_its_value_is_used():
    layers = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}
    shape_only = found(lambda m, x: m.b(m.a(x)) + torch.zeros(m.a(x)[:, 0].shape[0], 1), (2, 3), **layers)
    assert together(shape_only, ("a", "weight", 0), ("b", "weight", 1))
    used = found(lambda m, x: m.b(m.a(x)) + m.a(x)[:, :1][:, 0, None], (2, 3), **layers)
    assert set(sets(used, "a", "weight", 0)) != {used.fixed}
    for function in (lambda m, x: m.b(m.a(x)) + m.a(x)[:, 0, None], lambda m, x: m.a(x)[:, 0]):
        used = found(function, (2, 3), **layers)
        assert set(sets(used, "a", "weight", 0)) == {used.fixed}
