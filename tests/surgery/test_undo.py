import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from optimizing import OPTIMIZERS, equal, state_of, step
from torch import nn

import modsurg
from modsurg import add, edit, freeze, insert_after, remove, rename, replace, resize, unfreeze, wrap
from modsurg.errors import UndoError


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def adam(model):
    return torch.optim.Adam(model.parameters(), 0.1)


def snapshot(model, *optimizers):
    """Everything that an undo may touch, by value and by identity."""
    return (
        [(path, id(m), m.training, m.extra_repr()) for path, m in model.named_modules(remove_duplicate=False)],
        [
            (name, id(t), t.dtype, t.requires_grad, t.detach().clone(), None if t.grad is None else t.grad.clone())
            for name, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
        ],
        [[list(map(id, group["params"])) for group in each.param_groups] for each in optimizers],
        [state_of(each) for each in optimizers],
    )


def names_in(optimizer, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return [names.get(id(p), "?") for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_edits_of_two_parts_with_one_optimizer_are_undone_in_any_order(order):
    model = nn.Sequential(
        nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3))
    )
    optimizer = adam(model)
    step(model, optimizer)
    before = snapshot(model, optimizer)
    reports = [replace(model, path, nn.Linear(3, 3), optimizer=optimizer) for path in ("0.0", "1.0")]
    reports[order[0]].undo()
    assert names_in(optimizer, model) == [name for name, _ in model.named_parameters()]
    optimizer.load_state_dict(optimizer.state_dict())
    reports[order[1]].undo()
    assert names_in(optimizer, model) == [name for name, _ in model.named_parameters()]
    assert equal(list(snapshot(model)), [*before[:2], [], []])


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (1, 2, 0)])
def test_children_of_one_container_are_undone_in_any_order(order):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = adam(model)
    step(model, optimizer)
    before = snapshot(model, optimizer)
    reports = [replace(model, str(number), nn.Linear(3, 3), optimizer=optimizer) for number in range(3)]
    for number in order:
        reports[number].undo()
        assert names_in(optimizer, model) == [name for name, _ in model.named_parameters()]
    assert equal(list(snapshot(model, optimizer)), list(before))


def test_a_child_that_was_replaced_again_is_named():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    first = replace(model, "0.1", nn.GELU)
    model[0][1] = nn.Tanh()
    with pytest.raises(UndoError, match=r'^"0\.1" was changed since; undo the later edits first'):
        first.undo()
    assert type(model[0][1]) is nn.Tanh


def test_what_the_second_edit_learned_stays_when_the_first_is_undone():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3)))
    optimizer = adam(model)
    first = replace(model, "0.0", nn.Linear(3, 3), optimizer=optimizer)
    replace(model, "1.0", nn.Linear(3, 3), optimizer=optimizer)
    step(model, optimizer)
    learned = optimizer.state[model[1][0].weight]["exp_avg"]
    first.undo()
    assert optimizer.state[model[1][0].weight]["exp_avg"] is learned
    assert set(optimizer.state) <= set(model.parameters())
    step(model, optimizer)


VERBS = {
    "replace": lambda m: replace(m, "2", nn.Identity),
    "remove": lambda m: remove(m, "1"),
    "freeze": lambda m: freeze(m, "1"),
    "insert": lambda m: insert_after(m, "0", nn.Dropout()),
    "wrap": lambda m: wrap(m, "1", nn.Sequential),
    "rename": lambda m: rename(m, "1", "norm"),
    "resize": lambda m: resize(m, "0", in_features=5),
    "add": lambda m: add(m, "4", nn.Dropout()),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("training", [True, False])
def test_what_returns_is_in_the_mode_that_the_model_has(verb, training):
    model = net().train(not training)
    report = VERBS[verb](model)
    model.train(training)
    report.undo()
    assert [m.training for m in model.modules()] == [training] * 5


def test_unfreeze_is_undone_in_the_mode_that_was_asked_for():
    model = net()
    freeze(model, "1")
    report = unfreeze(model, "1")
    model.eval()
    report.undo()
    assert not model[1].training
    unfreeze(model, "1")
    assert not model[1].training
    freeze(model.train(), "1")
    report = unfreeze(model, "1")
    report.undo()
    assert not model[1].training
    unfreeze(model, "1")
    assert model[1].training


def test_a_part_added_in_the_place_of_none_goes_and_the_mode_stays():
    model = net()
    model.extra = None
    report = add(model, "extra", nn.Linear(2, 2))
    model.eval()
    report.undo()
    assert model.extra is None
    assert not model.training


@pytest.mark.parametrize(
    "verb",
    [
        lambda m: resize(m, "0", in_features=5),
        lambda m: freeze(m, "0"),
        lambda m: freeze(m, "**"),
    ],
)
def test_after_assigning_a_state_it_is_refused(verb):
    model = net()
    report = verb(model)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    before = snapshot(model)
    with pytest.raises(UndoError, match='"0.weight" was changed since; undo the later edits first'):
        report.undo()
    assert equal(list(snapshot(model)), list(before))


def test_what_was_replaced_returns_after_assigning_a_state():
    model = net()
    report, old = replace(model, "3", nn.Linear(4, 7)), model[0].weight
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    report.undo()
    assert model[3].out_features == 2
    assert model[0].weight is not old


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("verb, other", [(freeze, unfreeze), (unfreeze, freeze)])
def test_a_part_that_a_later_freeze_covers_is_not_thawed(verb, other, keep):
    model = net()
    if verb is unfreeze:
        freeze(model, "**")
    before = snapshot(model)
    first = verb(model, "1")
    second = verb(model, "**")
    between = snapshot(model)
    kept = second if keep else None
    del second
    with pytest.raises(UndoError, match='"1.weight" was changed since; undo the later edits first'):
        first.undo()
    assert equal(list(snapshot(model)), list(between))
    if kept is not None:
        kept.undo()
        first.undo()
        assert equal(list(snapshot(model)), list(before))


def test_freezes_of_two_parts_are_undone_in_any_order():
    model = net()
    before = snapshot(model)
    one, two = freeze(model, "0"), freeze(model, "1")
    one.undo()
    two.undo()
    assert equal(list(snapshot(model)), list(before))


def test_what_trains_may_be_set_by_hand():
    model = net()
    report = resize(model, "0", in_features=5)
    model[0].weight.requires_grad_(False)
    report.undo()
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("size", [1, 6])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "LBFGS"])
def test_training_of_a_resized_layer_is_kept_where_it_was(name, size):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer)
    old = model[3].weight.detach().clone()
    report = resize(model, "3", out_features=size, optimizer=optimizer)
    step(model, optimizer)
    trained, state = model[3].weight.detach().clone(), dict(optimizer.state[model[3].weight])
    report.undo()
    rows = min(2, size)
    assert torch.equal(model[3].weight[:rows], trained[:rows])
    assert torch.equal(model[3].weight[rows:], old[rows:])
    for key, value in optimizer.state[model[3].weight].items():
        if torch.is_tensor(value) and value.ndim:
            place = tuple(slice(min(a, b)) for a, b in zip(value.shape, state[key].shape, strict=True))
            assert torch.equal(value[place], state[key][place])
    step(model, optimizer)
    assert torch.isfinite(model[3].weight).all()


def test_an_undo_right_after_a_resize_is_exact():
    for name, make in OPTIMIZERS.items():
        model = net()
        optimizer = make(model.parameters())
        step(model, optimizer)
        before = snapshot(model, optimizer)
        resize(model, "3", out_features=5, optimizer=optimizer).undo()
        assert equal(list(snapshot(model, optimizer)), list(before)), name


def test_statistics_that_moved_since_are_kept():
    model = net()
    report = resize(model, "1", num_features=6)
    model[1](torch.randn(5, 6))
    mean = model[1].running_mean.clone()
    report.undo()
    assert torch.equal(model[1].running_mean, mean[:4])


def test_summed_channels_that_were_trained_are_not_overwritten():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    before = snapshot(model)
    report = resize(model, "0", in_channels=1)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(UndoError, match='"0.weight" was changed since'):
        report.undo()
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    before = snapshot(model)
    resize(model, "0", in_channels=1).undo()
    assert equal(list(snapshot(model)), list(before))


@pytest.mark.parametrize(
    "later, part",
    [
        (lambda m: setattr(m[3], "out_features", 9), "3.out_features"),
        (lambda m: setattr(m[3], "weight", nn.Parameter(torch.ones(5, 4))), "3.weight"),
        (lambda m: setattr(m[3].weight, "data", torch.ones(9, 4)), "3.weight"),
        (lambda m: setattr(m, "3", nn.Linear(4, 5)), "3.weight"),
        (lambda m: nn.utils.parametrizations.weight_norm(m[3]), "3.weight"),
    ],
)
def test_a_resized_layer_that_was_changed_by_hand_is_named(later, part):
    model = net()
    report = resize(model, "3", out_features=5)
    later(model)
    before = snapshot(model)
    with pytest.raises(UndoError, match=f'"{part}" was changed since; undo the later edits first'):
        report.undo()
    assert equal(list(snapshot(model)), list(before))


def test_a_weight_that_was_untied_since_is_named():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    report = resize(model, "0", num_embeddings=7)
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())
    with pytest.raises(UndoError, match=r'"1\.weight" was changed since'):
        report.undo()
    assert model[0].weight.shape == (7, 3)


def test_an_edit_inside_a_part_that_was_replaced_since_is_named():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3))
    optimizer = adam(model)
    first = replace(model, "0.0", nn.Linear(3, 3), optimizer=optimizer)
    second = replace(model, "0", nn.Linear(3, 3), optimizer=optimizer)
    with pytest.raises(UndoError, match='"0.*" was changed since; undo the later edits first'):
        first.undo()
    second.undo()
    first.undo()
    assert names_in(optimizer, model) == [name for name, _ in model.named_parameters()]


def test_a_group_that_was_added_since_stays():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = adam(model[0])
    report = replace(model, "0", nn.Linear(3, 3), optimizer=optimizer)
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 1.0})
    step(model, optimizer)
    report.undo()
    assert names_in(optimizer, model) == [name for name, _ in model.named_parameters()]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1.0]
    assert model[1].weight in optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())


def test_groups_that_are_gone_are_named():
    model = net()
    optimizer = adam(model)
    report = replace(model, "3", nn.Linear(4, 7), optimizer=optimizer)
    optimizer.param_groups.clear()
    with pytest.raises(UndoError, match="param_groups of Adam was changed since"):
        report.undo()
    assert model[3].out_features == 7


def test_a_scheduler_that_went_on_goes_on():
    model = net()
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    report = replace(model, "3", nn.Linear(4, 7), scheduler=scheduler)
    step(model, optimizer)
    scheduler.step()
    report.undo()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


def test_a_hook_that_was_registered_since_goes_to_what_returns():
    model, seen = net(), []
    model[3].register_forward_hook(lambda *_: seen.append("first"))
    report = replace(model, "3", nn.Linear(4, 7))
    handle = model[3].register_forward_hook(lambda *_: seen.append("second"))
    report.undo()
    model(torch.ones(2, 3))
    assert seen == ["first", "second"]
    handle.remove()
    model(torch.ones(2, 3))
    assert seen == ["first", "second", "first"]


def test_a_head_that_was_moved_in_keeps_its_training():
    model, head = net().double(), nn.Linear(4, 7)
    report = replace(model, "3", head)
    with torch.no_grad():
        head.weight.fill_(3.0)
    report.undo()
    assert head.weight.dtype == torch.float32
    assert (head.weight == 3).all()


def test_moves_between_an_edit_and_its_undo():
    model = net()
    report = resize(model, "0", in_features=5)
    model.half().double()
    report.undo()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model[0].weight.shape == (4, 3)


def test_a_gradient_that_came_since_is_kept():
    model = net()
    model(torch.ones(5, 3)).sum().backward()
    report = resize(model, "3", out_features=1)
    model.zero_grad()
    model(torch.ones(5, 3)).sum().backward()
    grad = model[3].weight.grad.clone()
    report.undo()
    assert torch.equal(model[3].weight.grad, torch.cat([grad, torch.zeros_like(grad)]))


def test_an_undo_inside_a_failed_transaction_and_twice():
    model = net()
    report = replace(model, "3", nn.Linear(4, 7))
    report.undo()
    with pytest.raises(UndoError, match="undone already"):
        report.undo()


def test_an_edit_inside_what_an_edit_put_in_is_named():
    model = net()
    first = wrap(model, "0", nn.Sequential)
    second = insert_after(model, "0.0", nn.ReLU)
    with pytest.raises(UndoError, match=r'^"0\.1" was changed since; undo the later edits first'):
        first.undo()
    second.undo()
    first.undo()
    first = replace(model, "3", nn.Linear(4, 7))
    second = freeze(model, "3")
    with pytest.raises(UndoError, match=r'^"3\.weight" was changed since'):
        first.undo()
    second.undo()
    first.undo()
    assert model[3].out_features == 2


class Edits(RuleBasedStateMachine):
    """Random edits, modes and steps; undone in a random order, each is exact, or refused with nothing changed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = [nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.1)]
        self.model = nn.Sequential(*(nn.Sequential(*copy.deepcopy(block)) for _ in range(3)))
        self.optimizer = torch.optim.Adam(self.model.parameters(), 0.01)
        self.reports = []
        self.training = True
        self.quiet = True  # nothing but edits and undos happened
        self.first = snapshot(self.model, self.optimizer)

    parts = st.sampled_from(["0", "1", "2", "0.0", "1.0", "2.0", "0.1", "1.1", "2.1"])

    def attempt(self, verb):
        before = snapshot(self.model, self.optimizer)
        try:
            self.reports.append(verb())
        except modsurg.errors.ModsurgError:
            assert equal(list(snapshot(self.model, self.optimizer)), list(before))

    @rule(path=parts, verb=st.sampled_from([freeze, unfreeze]), follow=st.booleans())
    def freezes(self, path, verb, follow):
        self.attempt(lambda: verb(self.model, path, optimizer=self.optimizer if follow else None))

    @rule(path=parts)
    def replaces(self, path):
        self.attempt(lambda: replace(self.model, path, lambda old: nn.Linear(3, 3), optimizer=self.optimizer))

    @rule(path=parts)
    def removes(self, path):
        self.attempt(lambda: remove(self.model, path, optimizer=self.optimizer))

    @rule(path=parts)
    def inserts(self, path):
        self.attempt(lambda: insert_after(self.model, path, nn.Linear(3, 3), optimizer=self.optimizer))

    @rule(path=parts)
    def wraps(self, path):
        self.attempt(lambda: wrap(self.model, path, nn.Sequential, optimizer=self.optimizer))

    @rule(path=parts, fails=st.booleans())
    def transactions(self, path, fails):
        def verb():
            with edit(self.model, optimizer=self.optimizer) as e:
                e.freeze(path)
                e.replace(path, lambda old: nn.Linear(3, 3))
                if fails:
                    e.remove("9")
            return e.report

        self.attempt(verb)

    @rule(training=st.booleans())
    def sets_mode(self, training):
        self.model.train(training)
        self.training, self.quiet = training, False

    @rule()
    def steps(self):
        self.optimizer.zero_grad()
        if self.model(torch.randn(4, 3)).requires_grad:
            step(self.model, self.optimizer)
        self.quiet = False

    @rule()
    def loads(self):
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        self.quiet = False

    @precondition(lambda self: self.reports)
    @rule(data=st.data())
    def undoes(self, data):
        report = data.draw(st.sampled_from(self.reports))
        before = snapshot(self.model, self.optimizer)
        try:
            report.undo()
        except UndoError:
            assert report is not self.reports[-1]
            assert equal(list(snapshot(self.model, self.optimizer)), list(before))
        else:
            self.reports.remove(report)

    @invariant()
    def optimizer_has_what_the_model_has(self):
        own = {id(p) for p in self.model.parameters()}
        held = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        assert len(held) == len(set(held))
        assert set(held) <= own
        trained = {id(p) for p in self.model.parameters() if p.requires_grad}
        assert trained <= set(held)
        assert all(entry["exp_avg"].shape == p.shape for p, entry in self.optimizer.state.items())

    @invariant()
    def modes_are_those_that_were_asked_for(self):
        for module in self.model.modules():
            assert modsurg.tree.eval_lock.mode(module) == self.training

    def teardown(self):
        for report in reversed(self.reports):
            report.undo()
        if self.quiet:
            assert equal(list(snapshot(self.model, self.optimizer)), list(self.first))
        names = [name for name, _ in self.model.named_parameters()]
        assert names_in(self.optimizer, self.model) == names
        assert [id(m) for m in self.model.modules()] == [each[1] for each in self.first[0]]
        assert all(p.requires_grad for p in self.model.parameters())


Edits.TestCase.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
TestEdits = pytest.mark.filterwarnings("ignore::modsurg.errors.ModsurgWarning")(Edits.TestCase)


def test_a_neighbour_of_a_frozen_norm_gets_the_mode_that_was_asked_for():
    model = net()
    freeze(model, "1")
    insert_after(model, "1", nn.Dropout())
    assert model[2].training


def variants():
    """Every optimizer of torch that takes dense parameters of any shape, in each way in which it can run."""
    for name in ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"):
        for options in (
            {},
            {"foreach": True},
            {"foreach": False},
            {"fused": True},
            {"amsgrad": True},
            {"momentum": 0.9},
        ):
            try:
                getattr(torch.optim, name)([nn.Parameter(torch.ones(2))], lr=0.01, **options)
            except (TypeError, RuntimeError):
                continue
            yield name, options
    yield "Adafactor", {}
    yield "LBFGS", {"max_iter": 3}
    yield "SGD", {"momentum": 0.9, "dampening": 0.5, "fused": True}


def test_no_optimizer_is_forgotten():
    own = {name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)}
    matrices_or_sparse = {"Muon", "SparseAdam"}  # see test_optimizers_groups
    assert own - {"Optimizer"} - matrices_or_sparse <= {name for name, _ in variants()}


FOLLOWED = {
    "replace": lambda m, o: replace(m, "3", lambda old: nn.Linear(4, 2), optimizer=o),
    "resize": lambda m, o: resize(m, "3", out_features=5, optimizer=o),
    "remove": lambda m, o: remove(m, "1", optimizer=o),
    "insert": lambda m, o: insert_after(m, "0", nn.Linear(4, 4), optimizer=o),
    "freeze": lambda m, o: freeze(m, "0", optimizer=o),
}


@pytest.mark.parametrize("verb", FOLLOWED)
@pytest.mark.parametrize("steps", [(0, 0), (0, 2), (2, 0), (2, 2)])
def test_every_optimizer_steps_after_an_edit_and_after_its_undo(verb, steps):
    for name, options in variants():
        model = net()
        model[1] = nn.LayerNorm(4)
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, **options)
        for _ in range(steps[0]):
            step(model, optimizer)
        report = FOLLOWED[verb](model, optimizer)
        for _ in range(steps[1]):
            step(model, optimizer)
        report.undo()
        assert names_in(optimizer, model) == [each for each, _ in model.named_parameters()]
        before = [p.detach().clone() for p in model.parameters()]
        step(model, optimizer)
        step(model, optimizer)
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), (name, options)
        optimizer.load_state_dict(optimizer.state_dict())
