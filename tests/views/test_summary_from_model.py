"""What is counted, and what is said beside it."""

import json

import pytest
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


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(nn.DataParallel(torch.compile(model)))])
def test_the_model_inside_of_wrappers_is_shown_and_chosen_from(wrap):
    found = summary(wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), (2, 4), where="0")
    assert [row["path"] for row in found.to_dict()["rows"]] == ["", "0"]
    assert found.to_dict()["about"][-1] == "in DataParallel"


def test_the_long_name_of_a_linear_layer_in_attention_is_not_printed():
    found = summary(nn.MultiheadAttention(4, 2))
    assert found.to_dict()["rows"][1]["class"] == "NonDynamicallyQuantizableLinear"
    assert "out_proj  Linear 4->4" in str(found)


def test_a_length_that_varies_is_data_for_json():
    class Ragged(nn.Module):
        def forward(self, x):
            return torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged)

    found = summary(Ragged(), torch.zeros(3, 4))
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["outputs"] == [[2, -1, 4]]
    assert str(found).startswith("Ragged   3x4 -> 2x?x4 ")


def test_a_forward_without_arguments():
    class Alone(nn.Module):
        def forward(self):
            return torch.ones(3, 4)

    assert str(summary(Alone(), ())).startswith("Alone   -> 3x4 ")
