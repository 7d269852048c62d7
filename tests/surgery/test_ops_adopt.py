import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from modsurg import add, insert_after, replace, wrap
from modsurg.errors import EditError, ModsurgWarning


def test_device_dtype_and_mode_are_taken_over():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to("meta", torch.bfloat16).eval()
    replace(model, "1", nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    norm = model[1][0]
    assert (norm.weight.device.type, norm.weight.dtype, norm.running_mean.dtype) == (
        "meta",
        torch.bfloat16,
        torch.bfloat16,
    )
    assert norm.num_batches_tracked.dtype == torch.int64
    assert not any(module.training for module in model.modules())


def test_a_module_without_weights_gives_the_place_of_its_parent():
    model = nn.Sequential(nn.Sequential(nn.ReLU()), nn.Linear(2, 2)).double()
    replace(model, "0.0", nn.PReLU())
    insert_after(model, "0.0", nn.Linear(2, 2))
    add(model, "0.2", nn.Linear(2, 2))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_requires_grad_is_not_taken_over():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    replace(model, "1", nn.Linear(2, 3))
    model(torch.ones(1, 2)).sum().backward()
    assert model[1].weight.grad is not None
    assert model[0].weight.grad is None


def test_what_belongs_to_the_wrapped_module_stays():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2).half(), nn.LayerNorm(2))).eval()
    model[0][1].train()
    wrap(model, "0", lambda old: nn.Sequential(old, nn.Linear(2, 2)))
    wrapped, added = model[0]
    assert (wrapped[0].weight.dtype, wrapped[1].weight.dtype) == (torch.float16, torch.float32)
    assert added.weight.dtype == torch.float16
    assert wrapped[1].training
    assert not added.training


def test_no_weights_for_a_model_that_has_them():
    model = nn.Sequential(nn.Linear(2, 2))
    with torch.device("meta"):
        new = nn.Linear(2, 2)
    with pytest.raises(EditError, match=r'no weights \(it is on meta\).*new.to_empty\(device="cpu"\)'):
        replace(model, "0", new)


def test_hooks_go_over_with_their_flags_and_handles():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    seen = []
    old = model[0]
    handles = [
        old.register_forward_pre_hook(lambda module, args, kwargs: seen.append("pre"), with_kwargs=True),
        old.register_forward_hook(lambda module, args, out: seen.append("second")),
        old.register_forward_hook(
            lambda module, args, kwargs, out: seen.append("first"), with_kwargs=True, prepend=True
        ),
        old.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward")),
        old.register_full_backward_pre_hook(lambda module, grad_out: seen.append("pre backward")),
    ]
    report = replace(model, "0", nn.Linear(2, 2))
    model(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert seen == ["pre", "first", "second", "pre backward", "backward"]
    for handle in handles:
        handle.remove()
    seen.clear()
    model(torch.ones(1, 2)).sum().backward()
    assert seen == []
    report.undo()
    assert model[0] is old
    model(torch.ones(1, 2)).sum().backward()
    assert seen == []


def test_undo_gives_the_hooks_back():
    model, seen = nn.Sequential(nn.ReLU()), []
    handle = model[0].register_forward_hook(lambda *args: seen.append(1))
    replace(model, "0", nn.GELU()).undo()
    model(torch.ones(1))
    assert seen == [1]
    handle.remove()
    model(torch.ones(1))
    assert seen == [1]


def test_an_always_called_hook_stays_one():
    model = nn.Sequential(nn.Linear(2, 2))
    seen = []
    model[0].register_forward_hook(lambda *args: seen.append(1), always_call=True)
    replace(model, "0", nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.ones(1, 2))
    assert seen == [1]


def test_hooks_of_the_new_module_are_kept_beside():
    model, new, seen = nn.Sequential(nn.ReLU()), nn.GELU(), []
    model[0].register_forward_hook(lambda *args: seen.append("old"))
    new.register_forward_hook(lambda *args: seen.append("new"))
    replace(model, "0", new).undo()
    new(torch.ones(1))
    assert seen == ["new"]
    seen.clear()
    replace(model, "0", new)
    model(torch.ones(1))
    assert seen == ["old", "new"]


def test_a_copy_has_its_hooks_once():
    model, seen = nn.Sequential(nn.Linear(2, 2)), []
    model[0].register_forward_hook(lambda *args: seen.append(1))
    replace(model, "0", copy.deepcopy)
    model(torch.ones(1, 2))
    assert seen == [1]


def test_a_wrapper_does_not_run_the_hooks_twice():
    model, seen = nn.Sequential(nn.Linear(2, 2)), []
    model[0].register_forward_hook(lambda *args: seen.append(1))
    wrap(model, "0", nn.Sequential)
    model(torch.ones(1, 2))
    assert seen == [1]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_hooks_that_are_the_layer_stay_with_it():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 2)))
    old = model[0]
    with pytest.warns(ModsurgWarning, match=r'"0": the new Linear does not have WeightNorm \(a hook of torch'):
        replace(model, "0", nn.Linear(2, 2))
    assert not model[0]._forward_pre_hooks
    assert old._forward_pre_hooks


@pytest.mark.filterwarnings("ignore::FutureWarning")
@torch.no_grad()
def test_copies_of_normed_and_pruned_layers_compute_the_same():
    x = torch.ones(1, 2)
    for make in (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm):
        model = nn.Sequential(make(nn.Linear(2, 2))).eval()
        before = model(x)
        report = replace(model, "0", copy.deepcopy)
        assert report.warnings == ()
        assert torch.equal(model(x), before)
    pruned = nn.Linear(2, 2)
    prune.l1_unstructured(pruned, "weight", 1)
    model = nn.Sequential(pruned)
    before = model(x)
    wrap(model, "0", nn.Sequential)
    assert torch.equal(model(x), before)


def test_a_parametrization_that_is_lost_is_told():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.warns(ModsurgWarning, match="the new Linear does not have the parametrization of weight"):
        replace(model, "0", nn.Linear(2, 2))


def test_state_dict_hooks_that_are_lost_are_told():
    model = nn.Sequential(nn.Linear(2, 2), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    model[0].register_state_dict_post_hook(lambda *arguments: None)
    with pytest.warns(ModsurgWarning, match='"0": the new Linear does not have its state_dict hooks'):
        replace(model, "0", nn.Linear(2, 2))
    assert replace(model, "1", nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))).warnings == ()


def test_a_forward_that_was_set_by_hand_is_told():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].forward = lambda x: x
    with pytest.warns(ModsurgWarning, match="does not have the forward that was set on the old module itself"):
        replace(model, "0", nn.Linear(2, 2))


def test_a_hook_that_is_a_method_of_the_old_one_is_told():
    class Counting(nn.Linear):
        def count(self, module, args):
            self.calls = 1

    model = nn.Sequential(Counting(2, 2))
    model[0].register_forward_pre_hook(model[0].count)
    with pytest.warns(ModsurgWarning, match="1 hook is a method of the old module, and not carried"):
        replace(model, "0", nn.Linear(2, 2))


def test_backward_hooks_of_two_kinds_do_not_mix():
    model, new = nn.Sequential(nn.ReLU()), nn.GELU()
    model[0].register_full_backward_hook(lambda *args: None)
    new.register_backward_hook(lambda *args: None)
    with pytest.warns(ModsurgWarning, match="backward hooks were not carried"):
        replace(model, "0", new)


def test_a_lazy_replacement_initialises_itself():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
    replace(model, "1", nn.LazyLinear(4))
    assert model(torch.ones(1, 2)).shape == (1, 4)
    assert type(model[1]) is nn.Linear


@pytest.mark.parametrize("home", [torch.float16, "meta"])
def test_a_lazy_module_takes_device_and_dtype_over(home):
    model = nn.Sequential(nn.Linear(4, 4).to(home))
    new = nn.LazyLinear(3)
    weight = new.weight
    report = insert_after(model, "0", new)
    assert type(new.weight) is nn.UninitializedParameter
    assert (new.weight.dtype, new.weight.device) == (model[0].weight.dtype, model[0].weight.device)
    report.undo()
    assert new.weight is weight
