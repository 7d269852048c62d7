"""How a saved tensor lies in its storage."""

import pytest
import torch

from modsurg.checkpoints.formats.torch_save.tensors import Storage, checked, storage_dtype
from modsurg.checkpoints.formats.torch_save.unpickler import Name
from modsurg.errors import FormatError

STORAGE = Storage("0", torch.float32, 24)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(4, 6),
        torch.arange(24.0).reshape(4, 6).t(),
        torch.arange(24.0).reshape(4, 6)[1:3, 2:5],
        torch.arange(24.0)[3:9],
        torch.arange(24.0)[::5],
        torch.arange(24.0)[4],
        torch.arange(24.0)[:0],
        torch.arange(24.0).reshape(2, 1, 12).transpose(0, 1),
        torch.arange(24.0)[:3].expand(4, 3),
    ],
)
def test_agrees_with_torch(tensor):
    stored = checked(STORAGE, (tensor.storage_offset(), tensor.shape, tensor.stride()))
    assert stored.contiguous == tensor.is_contiguous()
    assert stored.numel == tensor.numel()
    assert stored.nbytes == tensor.numel() * 4
    if tensor.numel():
        base = torch.arange(24.0)
        reached = base[stored.first // 4 : (stored.first + stored.span) // 4]
        assert reached[0] == tensor.min()
        assert reached[-1] == tensor.max()


def test_beyond_the_storage():
    with pytest.raises(FormatError, match=r"a tensor of shape \(5, 5\) reaches beyond its storage of 24 elements"):
        checked(STORAGE, (0, (5, 5), (5, 1)))


@pytest.mark.parametrize("shape", [(0, 1 << 61, 1 << 61), (1 << 31, 1 << 31, 0)])
def test_nothing_of_a_size_that_torch_can_not_count(shape):
    with pytest.raises(FormatError, match="a shape that no memory can have"):
        checked(STORAGE, (0, shape, (0, 0, 0)))


def test_storage_classes():
    assert storage_dtype(Name("torch", "HalfStorage")) is torch.float16
    assert storage_dtype(Name("torch.cuda", "LongStorage")) is torch.int64
    with pytest.raises(FormatError, match=r"a storage of class os\.system"):
        storage_dtype(Name("os", "system"))
