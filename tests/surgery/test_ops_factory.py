import pytest
from torch import nn

from modsurg import replace, wrap
from modsurg.errors import EditError


def net():
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())


def test_a_module_without_parameters_is_copied_for_each_site():
    model, new = net(), nn.Dropout(0.25)
    replace(model, nn.ReLU, new)
    assert model[1] is new
    assert model[3] is not new
    assert model[3].p == 0.25


def test_a_module_with_parameters_is_for_one_site():
    model = net()
    with pytest.raises(EditError, match=r"one PReLU with parameters for 2 sites.*lambda old: PReLU\(...\)"):
        replace(model, nn.ReLU, nn.PReLU())
    replace(model, "1", nn.PReLU())
    assert isinstance(model[1], nn.PReLU)


def test_a_class_is_called_without_arguments():
    model = net()
    replace(model, nn.ReLU, nn.GELU)
    assert isinstance(model[3], nn.GELU)
    with pytest.raises(EditError, match=r'Linear\(\) for "1" failed: .*lambda old: Linear'):
        replace(model, nn.GELU, nn.Linear)


def test_a_function_takes_the_old_module_and_the_path():
    model = net()
    seen = []
    replace(model, nn.Linear, lambda old, path: seen.append((path, old)) or nn.Identity())
    assert [path for path, _ in seen] == ["0", "2"]
    replace(model, nn.Identity, lambda old: None)
    assert isinstance(model[0], nn.Identity)


def test_optional_arguments_are_left_alone():
    def make(old, width=3):
        return nn.Linear(2, width)

    model = net()
    replace(model, "0", make)
    assert model[0].out_features == 3


def test_what_makes_no_module():
    model = net()
    with pytest.raises(EditError, match='for "1" the function returned a int, not a module'):
        replace(model, "1", lambda old: 5)
    with pytest.raises(EditError, match="makes no module; give a module"):
        replace(model, "1", 5)
    for wrapper in (nn.Sequential(), nn.ReLU(), 5):
        with pytest.raises(
            EditError, match=r"a wrapper is a class, or .* not a \w+ that is there .*nn.Sequential\(old"
        ):
            wrap(model, "1", wrapper)
    assert isinstance(model[1], nn.ReLU)


@pytest.mark.parametrize("verb", [replace, wrap])
def test_what_fails_in_the_function_says_for_which_place(verb):
    model = nn.Sequential(nn.BatchNorm1d(8), nn.BatchNorm1d(6))
    with pytest.raises(ValueError, match=r"must be divisible") as raised:
        verb(model, nn.BatchNorm1d, lambda old: nn.GroupNorm(4, old.num_features))
    assert raised.value.__notes__ == ['It was called for "1" (BatchNorm1d); nothing was changed.']
    assert isinstance(model[0], nn.BatchNorm1d)
    with pytest.raises(EditError, match="it has no child") as raised:
        verb(model, "0", lambda old: refuse())
    assert not hasattr(raised.value, "__notes__")


def refuse():
    raise EditError("it has no child")


@pytest.mark.parametrize("function", [lambda: nn.ReLU(), lambda old, path, more: nn.ReLU()])
def test_a_function_of_other_arguments_is_refused(function):
    with pytest.raises(
        EditError, match=r"can't be called with the old module, nor with it and its path; write it as \(old"
    ):
        replace(nn.Sequential(nn.ReLU()), "0", function)
