import pytest
from test_edit import Fault, fingerprint
from torch import nn

from modsurg import edit, freeze, insert_after, resize, unfreeze
from modsurg.errors import EditError, RecipeError, UndoError


def test_the_verbs_stand_in_the_block():
    model = nn.Sequential(nn.ReLU())
    e = edit(model)
    with pytest.raises(EditError, match=r"the verbs of a transaction are called in its block: with edit\(model\) as e"):
        e.replace("0", nn.GELU)
    with pytest.raises(KeyboardInterrupt, match="in the block"), e:
        e.replace("0", nn.GELU)
        raise KeyboardInterrupt("in the block")
    with pytest.raises(EditError, match="there is no report: the block failed, and everything is as it was before"):
        e.report  # noqa: B018  # a property that raises
    with pytest.raises(EditError, match="this transaction is over; open another"):
        e.replace("0", nn.GELU)
    with pytest.raises(EditError, match="this transaction is over; open another"):
        e.__enter__()
    assert isinstance(model[0], nn.ReLU)


def tower():
    return nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))


def changes_within(model, fails=False):
    with edit(model) as outer:
        with edit(model[0]) as first:
            first.replace("1", nn.GELU)
        outer.replace("0.0", lambda old: nn.Linear(2, 2))
        with pytest.raises(ZeroDivisionError, match="the second"), edit(model) as second:
            second.remove("0.0")
            raise ZeroDivisionError("the second")
        insert_after(model, "0.0", nn.Tanh)
        outer.insert_before("0", nn.ReLU)
        if fails:
            raise Fault("the outer")
    return outer.report


def test_a_transaction_within_another_goes_back_with_it():
    model = tower()
    before = fingerprint(model)
    with pytest.raises(Fault, match="the outer"):
        changes_within(model, fails=True)
    assert fingerprint(model) == before
    state = model.state_dict()
    report = changes_within(model)
    assert [type(m).__name__ for m in model[1]] == ["Linear", "Tanh", "GELU"]
    assert list(report.remap(state)) == ["2.weight", "2.bias"]
    assert report.notes[-1] == "within it another edit was made, of 1 change: see its report"
    with pytest.raises(RecipeError, match="this edit can't be recorded: another transaction was made within it"):
        report.recipe  # noqa: B018  # a property that raises
    report.undo()
    assert fingerprint(model) == before


def test_an_outer_transaction_waits_for_the_inner_one():
    model, other = tower(), tower()
    with edit(model) as outer:
        with edit(other) as elsewhere, edit(model):
            elsewhere.remove("0.0")
            with pytest.raises(EditError, match="a transaction within this one is open; use its verbs, or let its"):
                outer.remove("0.0")
        outer.remove("0.0")
    assert len(model[0]) == len(other[0]) == 1


@pytest.mark.parametrize(
    "first, second",
    [
        (lambda m: freeze(m, "1"), lambda m: unfreeze(m, "1")),
        (lambda m: resize(m, "1", out_features=3), lambda m: resize(m, "1", out_features=5)),
    ],
)
def test_undo_of_weights_out_of_turn_is_refused(first, second):
    model = tower()
    before = fingerprint(model)
    earlier, later = first(model), second(model)
    with pytest.raises(UndoError, match='"1.(weight|bias)" was changed since; undo the later edits first'):
        earlier.undo()
    later.undo()
    earlier.undo()
    assert fingerprint(model) == before
