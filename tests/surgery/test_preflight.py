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


def test_what_runs_in_eval_mode_only_says_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    with pytest.warns(ModsurgWarning, match=r"the example was run in eval mode; in train mode 1 \(BatchNorm1d"):
        replace(model, "2", nn.GELU(), example=(1, 4))


def test_the_example_runs_once_for_the_whole_transaction():
    model = net()
    with edit(model, example=(2, 4)) as e:
        e.replace("0", nn.Linear(4, 3))
        e.replace("1", nn.BatchNorm1d(3))
        e.replace("4", nn.Linear(3, 2))
    assert model(torch.ones(2, 4)).shape == (2, 2)
