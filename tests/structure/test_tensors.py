import pytest
import torch
from blueprints import Net, again, assert_same
from torch import nn

from modsurg.errors import FormatError
from modsurg.structure.build import build, describe


def test_buffers_and_tensors_outside_the_state():
    model = Net(inner=nn.Linear(2, 2))
    model.register_buffer("small", torch.arange(4.0), persistent=False)
    model.register_buffer("large", torch.randn(300, 300), persistent=False)
    model.plain = torch.randn(3)
    model.anchors = [torch.ones(2), torch.zeros(0, 4)]
    back = again(model)
    assert_same(model, back)
    for name in ("small", "large", "plain"):
        assert torch.equal(getattr(back, name), getattr(model, name))
    assert torch.equal(back.anchors[0], torch.ones(2))
    assert back.anchors[1].shape == (0, 4)
    assert list(back.state_dict()) == ["inner.weight", "inner.bias"]
    assert [key for key in describe(model).state if key not in model.state_dict()] == ["modsurg.beside.1"]


def test_memory_that_two_tensors_share_stays_shared():
    weight = nn.Parameter(torch.randn(3, 4))
    model = Net(w=weight, t=nn.Parameter(weight.data.t()))
    model.row = weight.data[1]
    back = again(model)
    assert_same(model, back)
    with torch.no_grad():
        back.w[1, 2] = 7
    assert back.t[2, 1] == 7
    assert back.row[2] == 7


def test_strides_dtypes_and_odd_tensors():
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    model.register_buffer("expanded", torch.ones(1, 3).expand(2, 3))
    model.register_buffer("number", torch.tensor(3, dtype=torch.int64))
    model.register_buffer("halves", torch.ones(2, dtype=torch.bfloat16))
    model.register_buffer("nothing", torch.empty(0, 3))
    model.register_buffer("imaginary", torch.ones(2, dtype=torch.complex64).conj())
    back = again(model)
    assert_same(model, back)
    assert back.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_tensor_in_the_tree_takes_no_more_than_the_file_has():
    description = describe(nn.Linear(2, 3))
    for shape in ([2**30], [2**18, 2]):
        description.data["tensors"][0] = {"data": "eJwDAAAAAAE=", "dtype": "float32", "shape": shape}
        with pytest.raises(FormatError, match=r"the tensors inside the tree take more than 1,048,588 bytes"):
            build(description.data, values=description.state)
        assert build(description.data).weight.is_meta


def test_a_tensor_of_the_file_is_copied_once():
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    description = describe(model)
    description.data["tensors"] += [description.data["tensors"][0]] * 9
    with pytest.raises(FormatError, match="is named twice, each time with strides of its own"):
        build(description.data, values=description.state)


def test_values_of_another_shape_are_refused():
    description = describe(nn.Linear(2, 3))
    with pytest.raises(FormatError, match=r"'weight' is torch.float32 \[5\] in the file"):
        build(description.data, values={**description.state, "weight": torch.ones(5)})
    with pytest.raises(FormatError, match="no tensor 'bias'"):
        build(description.data, values={"weight": description.state["weight"]})
