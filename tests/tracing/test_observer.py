"""What a recorder keeps of a run."""

import pytest
import torch
from torch import nn

from modsurg.tracing.observer import Failure, Functions, Recorder
from modsurg.tree.walk import walk


def test_a_function_that_only_has_the_name_of_a_product_is_named():
    recorder = Recorder(walk(nn.Identity()))
    recorder.count("linear", (1, 2), {}, 3)
    assert recorder.uncounted == {"linear"}
    assert recorder.macs == {}


def test_tensors_stay_on_meta():
    with Functions(Recorder(walk(nn.Identity())), meta=True):
        x = torch.empty(2, 3, device="meta")
        made = [x.cpu(), x.to("cpu", torch.float16), x + torch.ones(3), x * torch.zeros(300, 300)[0, 0]]
    assert all(each.is_meta for each in made)
    assert made[1].dtype == torch.float16


def test_what_is_made_elsewhere_is_real():
    with Functions(Recorder(walk(nn.Identity())), meta=True):
        x = torch.empty(2, 3, device="meta")
        made = [torch.zeros(300, 300), x.new_zeros(4, device="cpu"), torch.full((2,), 10**9), torch.arange(5, 10**5)]
        made += [torch.randint(0, 10**6, (300, 300)), torch.zeros_like(x, device="cpu"), torch.ones(2, device="meta")]
        with pytest.raises(
            NotImplementedError, match="zeros makes a tensor of 25,000,000 elements that is not on meta"
        ):
            torch.zeros(5000, 5000)
    assert not any(each.is_meta for each in made)


def test_a_device_that_is_not_there_is_meta():
    with Functions(Recorder(walk(nn.Identity())), meta=True):
        assert torch.zeros(2, device="xla").is_meta


def test_small_constants_keep_their_values():
    with Functions(Recorder(walk(nn.Identity())), meta=True):
        assert torch.linspace(0, 1, 3).tolist() == [0.0, 0.5, 1.0]
        assert torch.tensor([1, 2]).sum().item() == 3


def test_a_failure_reads_well():
    failure = Failure("a.b", "Linear", {"weight": (2, 9)}, ((3, 8), ()), RuntimeError("no\n\nlong explanation"))
    assert str(failure) == "a.b (Linear, weight 2x9) on 3x8, scalar: no"
    assert Failure("", "Net", {}, (), ValueError()).message == "ValueError"
