"""A summary in a README."""

from torch import nn

from modsurg import summary


def test_names_and_classes_can_not_break_the_table():
    odd = type("A|B", (nn.ReLU,), {})
    model = nn.Sequential()
    model.add_module("a_b|c", odd())
    model.add_module("d`|", odd())
    text = summary(model).to_markdown()
    assert "A\\|B" in text
    assert "| `a_b\\|c` |" in text
    assert "| `` d`\\| `` |" in text
    assert all(line.count("|") - line.count("\\|") == 5 for line in text.splitlines() if line.startswith("|"))


def test_runs_have_their_whole_path():
    model = nn.Sequential(nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(4))))
    assert "| `0.0-3` | 4 x Sequential |" in summary(model).to_markdown()
