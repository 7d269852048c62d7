"""The tree drawn at the top of errors.py is the tree of its classes."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from modsurg import Trainer, edit, errors, load_state, replace


def classes():
    return {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    }


def drawn():
    """Pairs (name, parent) in the order in which they are drawn."""
    path: list[str] = []
    pairs = []
    for line in errors.__doc__.splitlines():
        if match := re.match(r"((?:[│ ]   )*(?:[├└]── )?)(Modsurg\w+|\w+Error)\b", line):
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            pairs.append((match[2], path[-2] if depth else None))
    return pairs


def test_the_drawing_matches_the_classes():
    assert [name for name, _ in drawn()] == list(classes())
    for name, parent in drawn():
        bases = [base.__name__ for base in classes()[name].__bases__]
        assert bases[0] == (parent or {"ModsurgError": "ValueError", "ModsurgWarning": "UserWarning"}[name])


def test_every_class_says_what_it_means():
    for name, value in classes().items():
        assert value.__doc__, name
        assert value.__doc__.endswith("."), name


def test_a_missing_path_is_also_a_lookup_error():
    with pytest.raises(LookupError, match="nothing"):
        raise errors.NoMatchError("nothing there")


def test_every_error_is_used():
    """A class that nothing raises is dead; a base is used through its children."""
    package = Path(errors.__file__).parent
    text = "".join(path.read_text() for path in package.rglob("*.py") if path.name != "errors.py")
    unused = [name for name, value in classes().items() if not value.__subclasses__() and name not in text]
    assert not unused


LINES = {
    "fit": "trainer.fit(batches)",
    "epochs": "for _ in trainer.epochs(batches): trainer.stop()",
    "load_state": "load_state(model, {'other': torch.ones(1)}, strict=False)",
    "verb": "replace(model, '1', nn.ReLU, example=torch.ones(1, 3))",
    "edit": "with edit(model, example=torch.ones(1, 3)) as e: e.replace('1', nn.ReLU)",
    "trainer.edit": "with trainer.edit(example=torch.ones(1, 3)) as e: e.replace('1', nn.ReLU)",
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_warning_is_at_the_line_of_the_user(line):
    class Half(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    model = Half(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, nn.MSELoss(), progress=False)
    names = {"trainer": trainer, "batches": [(torch.ones(2, 3), torch.ones(2, 3))], "model": model}
    verbs = {"torch": torch, "nn": nn, "load_state": load_state, "replace": replace, "edit": edit}
    with pytest.warns(errors.ModsurgWarning) as caught:
        exec(compile(f"\n\n{line}", "theirs.py", "exec"), names | verbs | {"__name__": "theirs"})
    assert (caught[0].filename, caught[0].lineno) == ("theirs.py", 3)
