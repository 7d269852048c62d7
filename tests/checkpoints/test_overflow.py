"""A dtype in which finite values become infinite is refused, or asked for by name."""

import pytest
import torch
from loads import refused
from torch import nn

from modsurg import convert, load_state, read_state, save_state
from modsurg.errors import LoadError, ModsurgWarning, SaveError

LARGE = {"w": torch.tensor([1e5, 1.0])}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".safetensors.index.json", ""])
def test_convert(suffix, tmp_path):
    source = save_state(LARGE, tmp_path / "a.safetensors")
    target = tmp_path / f"b{suffix}"
    with pytest.raises(SaveError, match=r"w: 1 finite value does not fit in torch\.float16.*nothing was written"):
        convert(source, target, dtype=torch.float16)
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]
    convert(source, target, dtype=torch.float16, allow_overflow=True)
    assert read_state(target)["w"].tolist() == [float("inf"), 1]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (torch.tensor([1e300], dtype=torch.float64), torch.float32),
        (torch.tensor([torch.finfo(torch.float32).max]), torch.bfloat16),
        (torch.tensor([500.0], dtype=torch.float16), torch.float8_e4m3fn),
        (torch.tensor([6e4], dtype=torch.bfloat16), torch.float8_e4m3fn),
        (torch.tensor([-1e5]), torch.float16),
    ],
)
def test_other_dtypes(values, dtype, tmp_path):
    with pytest.raises(SaveError, match="w: 1 finite value does not fit"):
        save_state({"w": values}, tmp_path / "a.pt", dtype=dtype)
    path = save_state({"w": values}, tmp_path / "a.pt")
    with pytest.raises(LoadError, match="w: 1 finite value does not fit"):
        read_state(path, dtype=dtype)["w"]
    largest = torch.finfo(dtype).max
    assert read_state(path, dtype=dtype, allow_overflow=True)["w"].double().abs().item() in (largest, float("inf"))


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        (torch.tensor([1e5]), "dtype=torch.bfloat16, or allow_overflow=True"),
        (torch.tensor([1e300], dtype=torch.float64), "dtype=torch.float64, or allow_overflow=True"),
        (torch.tensor([torch.finfo(torch.float32).max]), "dtype=torch.float64, or allow_overflow=True"),
    ],
)
def test_the_dtype_that_is_recommended_has_room(values, advice, tmp_path):
    path = save_state({"w": values}, tmp_path / "a.pt")
    with pytest.raises(SaveError, match="does not fit") as caught:
        convert(path, tmp_path / "b.pt", dtype=torch.float16)
    recommended = str(caught.value).split("Try: ")[1].split("; nothing")[0]
    assert recommended == advice
    for option in recommended.split(", or "):
        name, value = option.split("=")
        options = {"dtype": torch.float16} | {name: eval(value)}
        assert convert(path, tmp_path / "b.pt", **options)


def test_infinite_values_and_those_that_fit(tmp_path):
    values = {"w": torch.tensor([float("inf"), float("nan"), 65519.0])}
    assert read_state(save_state(values, tmp_path / "a.pt", dtype=torch.float16))["w"][0] == float("inf")
    small = {"w": torch.tensor([460.0, -448.0])}
    assert save_state(small, tmp_path / "b.pt", dtype=torch.float8_e4m3fn)


def test_load_state(tmp_path):
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(2, dtype=torch.float16))})
    refused(model, LARGE, r"w  file float32, model float16, which overflows at 1 value")
    refused(model, save_state(LARGE, tmp_path / "a.pt"), "overflows at 1 value")
    report = load_state(model, LARGE, on_mismatch="skip")
    assert "overflows" in report.skipped["w"]
    load_state(model, {"w": torch.tensor([6e4, 1.0])})
    assert model["w"].tolist() == [6e4, 1]


def test_scales_of_block_formats_keep_their_dtype(tmp_path):
    state = {"s": torch.tensor([0.5, 1.0]).to(torch.float8_e8m0fnu), "w": torch.ones(2)}
    with pytest.warns(ModsurgWarning, match="s: block format, so its own dtype was kept"):
        save_state(state, tmp_path / "b.safetensors", dtype=torch.float16)
    done = convert(save_state(state, tmp_path / "a.safetensors"), tmp_path / "c.safetensors", dtype=torch.float16)
    assert done.kept == ("s",)
    assert "own dtype kept: s" in str(done)
