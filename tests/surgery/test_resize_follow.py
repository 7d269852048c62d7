import copy
import json

import pytest
import torch
from following import tally
from torch import nn
from torch.nn import functional as F

import modsurg
from modsurg import coupled, edit, replay, resize
from modsurg.errors import ExampleError, RecipeError, ResizeError
from modsurg.tracing import compute_rules


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 5)
    )


class Block(nn.Module):
    """Attention with heads that are numbers of the module, and a residual around it."""

    def __init__(self, width=8, heads=4, head=4):
        super().__init__()
        self.num_heads, self.head_dim = heads, head
        self.before = nn.Linear(3, width)
        self.qkv = nn.Linear(width, 3 * heads * head)
        self.out = nn.Linear(heads * head, width)

    def forward(self, x):
        x = self.before(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))


def test_everything_follows_and_comes_back():
    model = small().eval()
    before, state, expected = str(model), copy.deepcopy(model.state_dict()), model(EXAMPLE)
    report = resize(model, "3", out_channels=4, follow=True, example=EXAMPLE)
    assert (model[3].out_channels, model[5].in_features) == (4, 64)
    assert str(report).splitlines() == [
        "~ 3  Conv2d  out_channels 6 -> 4",
        "  1 layer follows: 5",
        "  parameters 1,163 -> 857, multiply-adds 30,336 -> 25,408",
    ]
    report.undo()
    assert str(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(EXAMPLE), expected)


def test_the_channels_that_stay_are_the_ones_asked_for():
    for keep, kept in {"first": [0, 1, 2], "l1": [2, 4, 6], "l2": [2, 4, 6]}.items():
        model = small()
        weights = model[0].weight.data
        weights[[2, 4, 6]] *= 20
        expected = weights[kept].clone()
        resize(model, "0", out_channels=3, follow=True, keep=keep, example=EXAMPLE)
        assert torch.equal(model[0].weight, expected)
    model = small()
    expected = model[3].weight[:, [7, 1, 5]][:, [1, 2, 0]].clone()
    resize(model, "0", out_channels=3, follow=True, keep=[7, 1, 5], example=EXAMPLE)
    assert torch.equal(model[3].weight, expected)


def test_a_function_gives_the_scores():
    seen = []

    def scores(group):
        seen.append(group)
        weight = next(each.tensor for each in group.members if each.path == "1" and each.name == "weight")
        return weight.abs()

    model = small()
    model[1].weight.data[:] = torch.arange(8.0)
    resize(model, "0", out_channels=0.5, follow=True, keep=scores, example=EXAMPLE)
    assert model[1].weight.tolist() == [4, 5, 6, 7]
    assert (seen[0].path, seen[0].size, seen[0].channels, seen[0].step) == ("0", "out_channels", 8, 1)


@pytest.mark.parametrize("fill", ["init", "zeros"])
def test_growing_keeps_the_function(fill):
    for model, example, site in ((small(), EXAMPLE, "0"), (small(), EXAMPLE, "3"), (Block(), TOKENS, "before")):
        model.eval()
        expected = model(example)
        size = {"0": {"out_channels": 11}, "3": {"out_channels": 8}, "before": {"out_features": 10}}[site]
        resize(model, site, follow=True, example=example, fill=fill, **size)
        got = model(example)
        torch.testing.assert_close(got[..., : expected.shape[-1]], expected)
    assert model.out.out_features == 10


def test_whole_heads_and_their_number():
    model = Block()
    q = model.qkv.weight[4:8].clone()
    report = resize(
        model,
        "qkv",
        out_features=0.25,
        follow=True,
        keep=list(range(4, 8)) + list(range(20, 24)) + list(range(36, 40)),
        example=TOKENS,
    )
    assert (model.num_heads, model.head_dim, model.qkv.out_features, model.out.in_features) == (1, 4, 12, 4)
    assert torch.equal(model.qkv.weight[:4], q)
    report.undo()
    with pytest.raises(ResizeError, match=r'"qkv": out_features=20 is not a multiple of 12, .*Try: out_features=24\.'):
        resize(model, "qkv", out_features=20, follow=True, example=TOKENS)
    resize(model, "qkv", out_features=20, multiple=12, follow=True, example=TOKENS)
    assert model.num_heads == 2
    resize(model, "qkv", out_features=60, follow=True, example=TOKENS)
    assert model.num_heads == 5
    assert model(TOKENS).shape == (2, 5, 8)


def test_torchs_own_attention():
    model = nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)).eval()
    report = resize(model, "0", out_features=4, follow=True, example=TOKENS)
    attention = model[1].self_attn
    assert (attention.embed_dim, attention.num_heads, attention.head_dim, attention.out_proj.in_features) == (
        4,
        2,
        2,
        4,
    )
    assert model(TOKENS).shape == (2, 5, 4)
    assert any("not exact, for all its channels are part of" in note for note in report.notes)


def test_many_layers_at_once_and_one_by_one():
    one, two = small(), small()
    resize(one, nn.Conv2d, out_channels=0.5, follow=True, example=EXAMPLE)
    with edit(two, example=EXAMPLE) as e:
        for path in ("0", "3"):
            e.resize(path, out_channels=0.5, follow=True)
    assert str(one) == str(two)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    with edit(two, example=EXAMPLE) as e:
        e.resize("0", out_channels=6, follow=True)
        e.resize("0", out_channels=3, follow=True)
        e.replace("2", nn.GELU())
        e.resize("3", out_channels=5, follow=True)
    assert [two[0].out_channels, two[3].in_channels, two[3].out_channels] == [3, 3, 5]
    two(EXAMPLE)


def test_what_is_shared_follows():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            x = self.embed(tokens)
            return self.head(x + self.body(x))

    model, tokens = Tied(), torch.tensor([[1, 2]])
    resize(model, "embed", embedding_dim=4, follow=True, example=tokens)
    assert model.head.weight is model.embed.weight
    assert (model.embed.embedding_dim, model.head.in_features, model.body.in_features) == (4, 4, 4)
    resize(model, "embed", num_embeddings=12, fill="mean", follow=True, example=tokens)
    assert model.head.out_features == 12
    torch.testing.assert_close(model.head.weight[11], model.head.weight[:10].mean(0))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_training_goes_on(kind):
    model = small()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.01, **options)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)

    def step():
        optimizer.zero_grad()
        model(EXAMPLE).square().mean().backward()
        optimizer.step()
        scheduler.step()

    step()
    kept = [1, 2, 5]
    old = {
        name: {k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)}
        for name, p in model.named_parameters()
    }
    rate = scheduler.get_last_lr()
    resize(
        model, "0", out_channels=3, keep=kept, follow=True, example=EXAMPLE, optimizer=optimizer, scheduler=scheduler
    )
    for name, index in {"0.weight": (kept,), "1.bias": (kept,), "3.weight": (slice(None), kept)}.items():
        for key, value in optimizer.state[model.get_parameter(name)].items():
            if torch.is_tensor(value) and value.dim():
                assert torch.equal(value, old[name][key][index])
    assert scheduler.get_last_lr() == rate
    step()


def test_a_recipe_repeats_the_choice():
    model, other = small(), small()
    report = resize(model, "0", out_channels=0.5, keep="l2", follow=True, example=EXAMPLE)
    recipe = modsurg.Recipe.from_json(report.recipe.to_json())
    json.loads(report.recipe.to_json())
    report = replay(other, recipe)
    assert str(other) == str(model)
    report.undo()
    assert other[0].out_channels == 8
    replay(other, report.recipe, example=EXAMPLE)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_coupled_shows_and_changes_nothing():
    model = small()
    before = str(model)
    (group,) = coupled(model, "0", EXAMPLE)
    assert str(group).splitlines() == [
        "0  out_channels 8",
        "  0  weight[0], bias[0]",
        "  1  weight[0], bias[0], running_mean[0], running_var[0]",
        "  3  weight[1] reads",
    ]
    assert len(coupled(model, (nn.Conv2d, nn.BatchNorm2d), EXAMPLE)) == 2
    assert str(model) == before


def refusals():
    class Fft(nn.Module):
        def forward(self, x):
            return torch.fft.fft(x).real

    class Halves(nn.Module):
        def forward(self, x):
            return x[:, :4] + 1

    yield (nn.Sequential(nn.Linear(3, 8), Fft(), nn.Linear(8, 2)), r'through _fft_r2c in "1", an operation without')

    class Half(nn.Module):
        def forward(self, x):
            return x[:, :4].sum(1, keepdim=True)

    message = r"the channels can't follow: the edited model does not run on the example; .* 2 \(Linear, weight 2x1"
    yield (nn.Sequential(nn.Linear(3, 8), Halves(), nn.Linear(4, 2)), message)
    message = r'the edited model computes sum in "1" where it computed slice in "1"'
    yield (nn.Sequential(nn.Linear(3, 8), Half()), message)


@pytest.mark.parametrize("number", range(3))
def test_what_cannot_follow_is_refused_and_nothing_changes(number):
    model, message = list(refusals())[number]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ResizeError, match=message):
        resize(model, "0", out_features=2, follow=True, keep=[0, 6], example=torch.randn(2, 3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0].out_features == 8


def test_numbers_in_tuples_follow():
    model = nn.Sequential(nn.Linear(3, 8), nn.Unflatten(1, (8, 1)), nn.Conv1d(8, 2, 1))
    resize(model, "0", out_features=2, follow=True, example=torch.randn(2, 3))
    assert model[1].unflattened_size == (2, 1)
    assert model(torch.randn(2, 3)).shape == (2, 2, 1)


def test_other_refusals():
    model = small()
    with pytest.raises(ResizeError, match=r"follow=True needs an example: resize\(\.\.\., follow=True, example=x\)"):
        resize(model, "0", out_channels=4, follow=True)
    with pytest.raises(ExampleError, match="the model does not run on the example"):
        resize(model, "0", out_channels=4, follow=True, example=(1, 4, 8, 8))
    with pytest.raises(ResizeError, match='"0": its in_channels can\'t change: they are the channels of the input'):
        resize(model, "0", in_channels=4, follow=True, example=EXAMPLE)
    with pytest.raises(ResizeError, match=r'"0": out_channels=-1 must be a positive integer, or a share such as 0\.5'):
        resize(model, "0", out_channels=-1, follow=True, example=EXAMPLE)
    with pytest.raises(ResizeError, match="keep= must list 4 channels of 0, each once, from 0 to 7; it lists 1"):
        resize(model, "0", out_channels=4, keep=[1], follow=True, example=EXAMPLE)
    with pytest.raises(ResizeError, match="keep='most' is not"):
        resize(model, "0", out_channels=4, keep="most", follow=True, example=EXAMPLE)
    with pytest.raises(ResizeError, match="keep= gave 2 scores for the 8 channels of 0"):
        resize(model, "0", out_channels=4, keep=lambda _: torch.ones(2), follow=True, example=EXAMPLE)
    with pytest.raises(ResizeError, match='"2" is a ReLU, which can\'t be resized'):
        coupled(model, "2", EXAMPLE)
    unused = nn.Sequential(small())
    unused.extra = nn.Linear(2, 2)
    unused.forward = lambda x: unused[0](x)
    with pytest.raises(ResizeError, match=r'"extra" \(Linear\) is not called on the example'):
        resize(unused, "extra", out_features=1, follow=True, example=EXAMPLE)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "regnet_y_400mf"])
def test_every_layer_of_small_models(name):
    models = pytest.importorskip("torchvision.models")
    counts = tally(getattr(models, name)(num_classes=10), torch.randn(2, 3, 64, 64))
    assert not counts.wrong
    assert not counts.refused
    assert counts.exact == counts.layers


def test_the_oracle_notices(monkeypatch):
    """A group that forgets a reader is found wrong."""

    def forget(op, a, b, dim_a, dim_b):
        op.labels.fix(())

    monkeypatch.setattr(compute_rules, "contract", forget)
    counts = tally(small(), EXAMPLE)
    assert counts.wrong or counts.refused


def test_a_recipe_of_another_model_is_refused():
    recipe = resize(small(), "0", out_channels=0.5, follow=True, example=EXAMPLE).recipe
    other = nn.Sequential(*small(), nn.ReLU())
    other[1] = nn.BatchNorm2d(9)
    with pytest.raises(RecipeError, match=r'resizes "1\.weight" of shape \(8,\); here it has the shape \(9,\)'):
        replay(other, recipe)
    with pytest.raises(RecipeError, match='resizes "3", and there is no such module here'):
        replay(small()[:3], recipe)


def test_heads_in_a_recipe():
    model, other = Block(), Block()
    report = resize(model, "qkv", out_features=0.5, follow=True, example=TOKENS)
    replay(other, modsurg.Recipe.from_json(report.recipe.to_json()))
    assert (other.num_heads, other.out.in_features, other(TOKENS).shape) == (2, 8, (2, 5, 8))


@pytest.mark.parametrize("groups", [1, 2, 4, 16])
def test_group_norms_lose_whole_groups(groups):
    def net():
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(groups, 16), nn.ReLU(), nn.Conv2d(16, 2, 3))

    counts = tally(net(), torch.rand(2, 3, 8, 8))
    assert not counts.wrong
    assert not counts.refused
    model = net()
    report = resize(model, "0", out_channels=8, follow=True, example=(1, 3, 8, 8))
    assert (model[1].num_groups, model[1].num_channels) == (max(1, groups // 2), 8)
    assert ("not exact" in str(report)) == (groups == 1)


def test_groups_that_the_code_fixes_are_kept():
    class Fixed(nn.Module):
        def __init__(self, groups):
            super().__init__()
            self.a, self.b, self.groups_ = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), str(groups)

        def forward(self, x):
            return self.b(nn.functional.group_norm(self.a(x), int(self.groups_)))

    report = resize(Fixed(4), "a", out_channels=4, follow=True, example=(1, 3, 8, 8))
    assert "not exact" in str(report)
    with pytest.raises(ResizeError, match="the code of the model fixes"):
        resize(Fixed(8), "a", out_channels=4, follow=True, example=(1, 3, 8, 8))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_follow_their_input(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.r, self.o = nn.Linear(6, 8), kind(8, 5, 2, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.o(self.r(self.a(x))[0])

    assert tally(Net(), torch.rand(2, 4, 6)).exact == 2
    model = Net()
    resize(model, "a", out_features=4, follow=True, example=(2, 4, 6))
    assert model.r.input_size == 4
    assert model(torch.rand(2, 4, 6)).shape == (2, 4, 3)


def test_a_width_that_the_code_only_checks_follows():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.t, self.o = nn.Linear(6, 8), nn.Transformer(8, 2, 1, 1, 16, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.o(self.t(self.i(x), self.i(x)))

    counts = tally(Net(), torch.rand(2, 4, 6))
    assert not counts.wrong
    assert not counts.refused
    model = Net()
    resize(model, "i", out_features=4, follow=True, example=(2, 4, 6))
    assert model.t.d_model == 4


def test_a_group_prints_shortly():
    (group,) = coupled(small(), "0", example=EXAMPLE)
    assert repr([group]) == f"[{group}]"
    assert "tensor" not in repr(group)
