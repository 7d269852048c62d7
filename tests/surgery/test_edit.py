import contextvars
import copy
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modsurg import edit, insert_after, rename, replace, select
from modsurg.errors import EditError, ModsurgWarning, NoMatchError, UndoError
from modsurg.surgery.report import Report


def fingerprint(model, *optimizers):
    """Everything that an edit could leave different: objects, order, bits, hooks, attributes."""
    seen = []
    for path, module in model.named_modules(remove_duplicate=False):
        seen.append((path, id(module), module.training, list(module._modules), list(map(id, module._modules.values()))))
        for name, value in module.__dict__.items():
            if name in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    if tensor is not None:
                        grad = None if tensor.grad is None else tensor.grad.tolist()
                        seen.append((path, key, id(tensor), tensor.tolist(), tensor.requires_grad, grad))
            elif name.endswith("hooks"):
                seen.append((path, name, [(key, id(hook)) for key, hook in value.items()]))
            elif isinstance(value, int | str | float | tuple | None.__class__):
                seen.append((path, name, value))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            seen.append([(key, value if key != "params" else list(map(id, value))) for key, value in group.items()])
        for key, state in optimizer.state.items():
            seen.append((id(key), {name: v.tolist() if torch.is_tensor(v) else v for name, v in state.items()}))
    return seen


def trained(seed=0):
    torch.manual_seed(seed)
    shared = nn.Linear(4, 4)
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.BatchNorm1d(4),
        shared,
        nn.Sequential(shared, nn.ReLU()),
        nn.ModuleList([nn.ReLU()]),
        nn.Linear(4, 2),
    )
    model[4].forward = lambda x: x
    model[0].register_forward_hook(lambda *args: None)
    first, second = list(model.parameters())[:4], list(model.parameters())[4:]
    optimizers = [torch.optim.Adam(first, 0.1), torch.optim.SGD(second, 0.1, momentum=0.9)]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizers[0], 1)
    for _ in range(2):
        model(torch.randn(8, 4)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    scheduler.step()
    return model, optimizers, scheduler


VERBS = [
    lambda e: e.replace("0", lambda old: nn.Linear(4, 4)),
    lambda e: e.insert_after("1", nn.ReLU()),
    lambda e: e.insert_before("0", lambda old: nn.Linear(4, 4)),
    lambda e: e.wrap(nn.Linear, nn.Sequential),
    lambda e: e.remove("3"),
    lambda e: e.rename("-1", "head"),
    lambda e: e.resize("head.0", out_features=5),
    lambda e: e.freeze("**"),
    lambda e: e.unfreeze("head"),
    lambda e: e.add("extra", nn.Linear(2, 2)),
]


class Fault(BaseException):
    pass


@pytest.mark.filterwarnings("ignore::modsurg.errors.ModsurgWarning")
@pytest.mark.parametrize("stop", range(len(VERBS) + 1))
def test_a_fault_after_any_verb_brings_everything_back(stop):
    model, optimizers, scheduler = trained()
    before = fingerprint(model, *optimizers)
    try:
        with edit(model, optimizer=optimizers, scheduler=scheduler) as e:
            for verb in VERBS[:stop]:
                verb(e)
            raise Fault
    except Fault:
        pass
    assert fingerprint(model, *optimizers) == before
    assert scheduler.get_last_lr() == [0.010000000000000002]


@pytest.mark.filterwarnings("ignore::modsurg.errors.ModsurgWarning")
def test_a_fault_at_every_single_mutation_brings_everything_back(monkeypatch):
    from modsurg.surgery.journal import Journal

    names = ("keep_dict", "keep_list", "keep_tensor", "keep_flags", "keep_attr", "on_undo", "absorb")
    calls, limit = [0], [0]

    def counted(name):
        original = getattr(Journal, name)

        def method(self, *args, **options):
            calls[0] += 1
            original(self, *args, **options)
            if calls[0] == limit[0]:
                raise Fault

        return method

    for name in names:
        monkeypatch.setattr(Journal, name, counted(name))
    while True:
        model, optimizers, scheduler = trained()
        before = fingerprint(model, *optimizers)
        calls[0], limit[0] = 0, limit[0] + 1
        try:
            with edit(model, optimizer=optimizers, scheduler=scheduler) as e:
                for verb in VERBS:
                    verb(e)
        except Fault:
            assert fingerprint(model, *optimizers) == before
        else:
            break
    assert limit[0] > 50


@pytest.mark.filterwarnings("ignore::modsurg.errors.ModsurgWarning")
def test_undo_brings_everything_back():
    model, optimizers, scheduler = trained()
    before = fingerprint(model, *optimizers)
    with edit(model, optimizer=optimizers, scheduler=scheduler) as e:
        for verb in VERBS:
            verb(e)
    assert fingerprint(model, *optimizers) != before
    e.report.undo()
    assert fingerprint(model, *optimizers) == before
    with pytest.raises(UndoError, match="undone already"):
        e.report.undo()


def test_what_comes_back_goes_where_the_model_has_been_moved():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2, dtype=torch.float16))
    with edit(model) as e:
        e.replace("2", nn.Linear(2, 3))
        e.remove("1")
    model.double()
    e.report.undo()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert model[1].running_mean.dtype == torch.float64
    report = replace(model, "0", nn.Linear(2, 2))
    model[0].half()
    report.undo()
    assert model[0].weight.dtype == torch.float64, "only a part was moved, and that is gone"


def test_undo_out_of_turn_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    first = insert_after(model, "0", nn.Tanh())
    second = insert_after(model, "0", nn.GELU())
    with pytest.raises(UndoError, match="was changed since; undo the later edits first"):
        first.undo()
    second.undo()
    first.undo()
    assert [type(child).__name__ for child in model] == ["Linear", "ReLU"]


def test_a_verb_that_fails_inside_the_block_leaves_the_others():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with edit(model) as e:
        e.insert_after("0", nn.GELU())
        with pytest.raises(NoMatchError, match='nothing at "7"'):
            e.replace("7", nn.ReLU())
    assert [type(child).__name__ for child in model] == ["Linear", "GELU", "ReLU"]


def test_a_function_that_fails_half_way_changes_nothing():
    model = nn.Sequential(nn.ReLU(), nn.ReLU())

    def once(old, path):
        if path == "1":
            raise KeyError(path)
        return nn.GELU()

    with pytest.raises(KeyError, match="1"):
        replace(model, nn.ReLU, once)
    assert [type(child).__name__ for child in model] == ["ReLU", "ReLU"]


def test_plan_before_report_after():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with edit(model) as e:
        e.replace("1", nn.Tanh())
        assert str(e.plan()) == "~ 1  ReLU -> Tanh"
        with pytest.raises(EditError, match=r"when the block is over; within it, print\(e.plan\(\)\)"):
            _ = e.report
        with pytest.raises(UndoError, match="is only a plan"):
            e.plan().undo()
    assert str(e.report) == "~ 1  ReLU -> Tanh"
    with pytest.raises(EditError, match="this transaction is over"):
        e.remove("1")


def test_an_empty_transaction():
    model = nn.Sequential(nn.ReLU())
    with edit(model) as e:
        pass
    assert str(e.report) == "nothing changed"
    e.report.undo()


def test_replacements_are_not_revisited():
    class Lora(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down = base, nn.Linear(2, 1)

    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    with edit(model) as e:
        e.wrap(nn.Linear, Lora, count=2)
    assert isinstance(model[0].base, nn.Linear)
    assert isinstance(model[1][0].base, nn.Linear)


def test_the_outermost_match_is_edited_and_the_inner_ones_are_told():
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.ReLU()), nn.ReLU()))
    with pytest.warns(ModsurgWarning, match='1 match lies inside an edited one and was left alone: "0.0"'):
        replace(model, nn.Sequential, nn.Identity)
    assert str(model) == str(nn.Sequential(nn.Identity()))


def test_where_the_outer_one_is_skipped_the_inner_ones_are_met():
    model = nn.Sequential(nn.Sequential(nn.ReLU()), nn.ReLU())
    replace(model, "**", lambda old: nn.GELU() if isinstance(old, nn.ReLU) else None)
    assert [type(module).__name__ for module in model.modules()] == ["Sequential", "Sequential", "GELU", "GELU"]


def test_untie():
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Sequential(shared))
    replace(model, "1.0", nn.GELU(), untie=True)
    assert (type(model[0]), type(model[1][0])) == (nn.ReLU, nn.GELU)
    block = nn.Sequential(nn.ReLU())
    model = nn.Sequential(block, block)
    with pytest.raises(EditError, match=r'"1.0" and "0.0" refer to the same child.*"0", copy.deepcopy, untie=True'):
        replace(model, "1.0", nn.GELU(), untie=True)
    assert type(model[1][0]) is nn.ReLU
    assert str(rename(model, "1.0", "act")).startswith("~ 0.0 = 1.0 -> act")


def test_the_tree_has_no_loops():
    model = nn.Sequential(nn.Sequential(nn.ReLU()))
    with pytest.raises(EditError, match=r'holds "0", its own parent'):
        replace(model, "0.0", lambda old: nn.Sequential(model))
    with pytest.raises(EditError, match="copy.deepcopy"):
        insert_after(model, "0.0", lambda old: nn.Sequential(model[0]))


leaf = st.sampled_from([nn.ReLU, nn.Tanh, lambda: nn.Linear(2, 2), lambda: nn.BatchNorm1d(2)]).map(lambda make: make())
trees = st.recursive(
    leaf, lambda inner: st.lists(inner, min_size=1, max_size=4).map(lambda cs: nn.Sequential(*cs)), max_leaves=12
)


@settings(max_examples=60, deadline=None)
@given(tree=trees, data=st.data())
@pytest.mark.filterwarnings("ignore::modsurg.errors.ModsurgWarning")
def test_random_edits_on_random_trees(tree, data):
    model = nn.Sequential(tree, nn.Linear(2, 2))
    leaves = [module for module in model.modules() if not module._modules]
    model.append(data.draw(st.sampled_from(leaves)))
    x = torch.ones(3, 2)
    model.eval()
    before, output = fingerprint(model), model(x)
    reports = []
    for _ in range(data.draw(st.integers(1, 5))):
        paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
        if not paths:
            break
        path = data.draw(st.sampled_from(paths))
        verb = data.draw(st.sampled_from(["copy", "wrap", "insert", "remove", "freeze"]))
        site = select(model, path).sites[0]
        with edit(model) as e:
            if verb == "copy":
                e.replace(path, copy.deepcopy)
            elif verb == "wrap":
                e.wrap(path, nn.Sequential)
            elif verb == "insert":
                e.insert_after(path, nn.Identity())
            elif verb == "remove":
                e.remove(path)
            else:
                e.freeze(path)
        reports.append(e.report)
        paths = {p: id(m) for p, m in model.named_modules(remove_duplicate=False)}
        if verb in ("copy", "wrap"):
            assert len({paths.get(p) for p in site.paths}) == 1
        if verb != "remove" and all("remove" not in [c.kind for c in r.changes] for r in reports):
            assert torch.equal(model(x), output)
        for container in model.modules():
            if isinstance(container, nn.Sequential):
                assert list(container._modules) == [str(i) for i in range(len(container))]
    for report in reversed(reports):
        report.undo()
    assert fingerprint(model) == before


def test_what_is_over_is_not_open_in_a_copied_context():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with edit(model) as e:
        e.replace("0", nn.Linear(2, 2))
        later = contextvars.copy_context()
    report = later.run(replace, model, "1", nn.Tanh())
    assert [each["verb"] for each in e.report.recipe.edits] == ["replace"]
    report.undo()
    e.report.undo()
    assert isinstance(model[1], nn.ReLU)


def test_a_transaction_that_outlasts_the_one_around_it():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with edit(model) as e:
        e.rename("0", "first")
        later, inner = contextvars.copy_context(), edit(model)
        later.run(inner.__enter__)
    inner.replace("1", nn.Tanh())
    later.run(inner.__exit__, None, None, None)
    assert [each["verb"] for each in e.report.recipe.edits] == ["rename"]


@torch.inference_mode()
def test_what_is_made_under_inference_mode_trains_all_the_same():
    with torch.inference_mode(False):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        adam = torch.optim.Adam(model.parameters())
        model(torch.ones(2, 2)).sum().backward()
        adam.step()
    with edit(model, optimizer=adam) as e:
        e.resize("0", in_features=3)
        e.replace("1", lambda old: nn.BatchNorm1d(2))
    with pytest.raises(EditError, match=r'"0" was made under .*: with torch.inference_mode\(False\): new = Linear'):
        insert_after(model, "0", nn.Linear(2, 2))
    with torch.inference_mode(False):
        model(torch.ones(2, 3)).sum().backward()
        adam.step()


def test_a_report_in_a_prompt_is_short():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    report = replace(model, nn.ReLU, nn.GELU)
    assert repr(report) == "<Report of 1 change: print it to read them>"
    with edit(model) as e:
        assert repr(e.plan()) == "<Report of 0 changes: print it to read them>"
    assert repr(Report((), ("mind this",), ())) == "<Report of 0 changes, 1 warning: print it to read them>"
    assert not [name for name in inspect.signature(Report).parameters if name.startswith("_")]


def test_a_long_line_leaves_out_what_is_as_by_default():
    class Mine(nn.BatchNorm2d):
        def __init__(self):
            super().__init__(16, eps=1e-3)

    model = nn.Sequential(nn.BatchNorm2d(16, momentum=None), Mine(), nn.ReLU(), nn.Conv2d(16, 16, (3, 3), (2, 1)))
    report = replace(model, nn.BatchNorm2d, lambda old: nn.GroupNorm(8, old.num_features))
    first, second = str(report).splitlines()
    assert first == "~ 0  BatchNorm2d(16, momentum=None) -> GroupNorm(8, 16)"
    assert second.startswith("~ 1  Mine(16, eps=0.001, momentum=0.1, affine=True, "), "which it has no defaults for"
    assert second.endswith("-> GroupNorm(8, 16)")
    report = replace(
        model, "3", nn.Conv2d(16, 16, (3, 3), (2, 1), padding=(1, 1), dilation=(2, 2), groups=2, bias=False)
    )
    old = "Conv2d(16, 16, kernel_size=(3, 3), stride=(2, 1))"
    assert str(report).startswith(f"~ 3  {old} -> Conv2d(16, 16, kernel_size=(3, 3), stride=(2, 1), padding=(1, 1)")
    report = replace(model, "2", nn.GELU)
    assert str(report) == "~ 2  ReLU -> GELU(approximate='none')"
