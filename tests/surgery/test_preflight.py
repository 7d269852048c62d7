import copy
import resource

import pytest
import torch
from torch import nn

from modsurg import add, edit, insert_after, replace
from modsurg.errors import ExampleError, ModsurgWarning


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 2))


def test_a_wrong_shape_names_the_module_and_both_shapes():
    model = net()
    before = str(model)
    with pytest.raises(ExampleError, match=r"nothing was changed. 4 \(Linear.*2x8.*5"):
        replace(model, "4", nn.Linear(5, 2), example=(2, 4))
    assert str(model) == before


@pytest.mark.parametrize(
    "example",
    [torch.ones(3, 4), (3, 4), (torch.ones(3, 4),), {"input": torch.ones(3, 4)}],
    ids=lambda e: type(e).__name__,
)
def test_each_form_of_example(example):
    insert_after(net(), "0", nn.ReLU(), example=example)
    with pytest.raises(ExampleError, match=r"1 \(Linear"):
        insert_after(net(), "0", nn.Linear(3, 3), example=example)


def test_nothing_of_the_model_is_touched():
    model = net()
    model(torch.randn(4, 4)).sum().backward()
    calls = []
    for module in model.modules():
        module.register_forward_hook(lambda *args: calls.append(1))
    random, state = torch.random.get_rng_state(), copy.deepcopy(model.state_dict())
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    insert_after(model, "3", nn.Identity(), example=(2, 4))
    assert calls == []
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items() if key in state)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert model.training


def test_a_new_module_that_is_never_called_is_told():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x)

    model = Net()
    with pytest.warns(ModsurgWarning, match=r'"head" \(Linear\) is never called: the forward of its parent does not'):
        report = add(model, "head", nn.Linear(2, 2), example=(1, 4))
    assert len(report.warnings) == 1


def test_a_model_of_ten_gigabytes_costs_nothing():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(16_384, 16_384) for _ in range(10)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    replace(
        model,
        "3",
        lambda old: nn.Sequential(nn.Linear(16_384, 8, device="meta"), nn.Linear(8, 16_384)),
        example=(1, 16_384),
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_what_can_not_run_on_meta_says_so():
    class Routed(nn.Module):
        def forward(self, x):
            return x[: int(x.sum().item())]

    model = nn.Sequential(Routed(), nn.ReLU())
    with pytest.warns(ModsurgWarning, match="the example was not run; "):
        replace(model, "1", nn.GELU(), example=(3, 3))


def test_a_batch_of_one_is_run_with_norms_in_eval_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    with pytest.warns(
        ModsurgWarning, match=r"the example was run with its norms in eval mode; in train mode 1 \(BatchNorm1d"
    ):
        replace(model, "2", nn.GELU(), example=(1, 4))


def test_the_example_runs_once_for_the_whole_transaction():
    model = net()
    with edit(model, example=(2, 4)) as e:
        e.replace("0", nn.Linear(4, 3))
        e.replace("1", nn.BatchNorm1d(3))
        e.replace("4", nn.Linear(3, 2))
    assert model(torch.ones(2, 4)).shape == (2, 2)


class TrainBranch(nn.Module):
    """Has a branch that only training takes, as auxiliary heads are."""

    def __init__(self):
        super().__init__()
        self.norm, self.head, self.auxiliary = nn.BatchNorm1d(4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(x)
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


@pytest.mark.filterwarnings("ignore:the example was run with its norms in eval mode")
@pytest.mark.parametrize("batch", [1, 2])
def test_a_branch_that_training_alone_takes_is_checked(batch):
    model = TrainBranch()
    with pytest.raises(ExampleError, match=r"on the example; nothing was changed. auxiliary \(Linear"):
        replace(model, "auxiliary", nn.Linear(5, 2), example=(batch, 4))
    with pytest.warns(ModsurgWarning, match='"auxiliary" .* is never called'):
        replace(model.eval(), "auxiliary", nn.Linear(5, 2), example=(batch, 4))


def test_one_warning_for_one_cause():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.rest = nn.Linear(4, 4), nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcde"})

        def forward(self, x):
            return self.used(x)

    with pytest.warns(ModsurgWarning) as caught:
        replace(Unused(), "rest.*", lambda old: nn.Linear(4, 4), example=(2, 4))
    (text,) = [str(each.message) for each in caught]
    assert text == (
        '"rest.a" (Linear), "rest.b" (Linear), "rest.c" (Linear) and 2 more are never called: '
        "the forward of its parent does not use it."
    )


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    "function, refused",
    [
        (lambda x: x.mean(5), True),
        (lambda x: x.mean((1, 1)), True),
        (lambda x: x.mean((1, -2)), True),
        (lambda x: x.softmax(3), True),
        (lambda x: nn.functional.adaptive_avg_pool1d(x, -1), True),
        (lambda x: torch.cat([x, x], 3), True),
        (lambda x: x - (x > 0), True),
        (lambda x: x.expand(2, 2, 3, 4).relu_(), True),
        (lambda x: nn.functional.layer_norm(x, (3,)), True),
        (lambda x: x.mean((1, -1)), False),
        (lambda x: x.clamp(0, 1), False),
        (lambda x: x.clone().clamp_(0, 1), False),
    ],
)
def test_what_torch_refuses_is_refused(function, refused):
    x = torch.ones(2, 3, 4)
    model = nn.Sequential(nn.ReLU(), Function(function))
    if refused:
        with pytest.raises((RuntimeError, IndexError), match="."):
            model(x)
        with pytest.raises(ExampleError, match="1 .Function. on 2x3x4"):
            replace(model, "0", nn.GELU, example=x)
    else:
        model(x)
        replace(model, "0", nn.GELU, example=x)


def test_clamp_is_not_in_place():
    from modsurg import summary

    model = nn.Sequential(Function(lambda x: x.clamp(0, 1)), nn.ReLU())
    assert [row["activations"] for row in summary(model, (2, 8)).to_dict()["rows"]] == [128, 64, 64]


def test_a_missing_batch_size_is_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    with pytest.raises(ExampleError, match=r"Try: the batch size as the first one: \(batch, 3, 8, 8\)"):
        replace(model, "2", nn.Linear(4 * 36, 3), example=(3, 8, 8))
    replace(model, "2", nn.Linear(4 * 36, 3), example=(1, 3, 8, 8))
