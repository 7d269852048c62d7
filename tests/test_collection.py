"""What is counted, and what is said beside it."""

import torch
from torch import nn

from modsurg import summary


def test_tied_tensors_and_modules_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.block = nn.Sequential(nn.Linear(4, 4))
            self.again = self.block
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.again(self.block(self.embed(x))))

    found = summary(Tied(), (2, 3))
    total = found.to_dict()["total"]
    assert (total["params"], total["shared_params"]) == (60, 60)
    assert total["macs"] == 6 * (16 + 16 + 40)
    notes = {row["path"]: row["notes"] for row in found.to_dict()["rows"]}
    assert notes["again"] == ["= block"]
    assert notes["head"] == ["= embed.weight"]
    assert "again.0" not in notes


def test_notes_on_calls_frozen_parts_and_other_dtypes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.body.requires_grad_(False)
            self.odd = nn.Linear(4, 4, dtype=torch.float64)
            self.dead = nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(100):
                x = self.body(x)
            return x

    found = summary(Net(), (2, 4)).to_dict()
    notes = {row["path"]: row["notes"] for row in found["rows"]}
    assert notes["body"] == ["100 calls", "frozen"]
    assert notes["body.0"] == ["100 calls"]
    assert notes["dead"] == ["not called"]
    assert notes["odd"] == ["not called", "float64"]
    assert (found["total"]["frozen_params"], found["total"]["trainable_params"]) == (40, 40)
