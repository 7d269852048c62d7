"""Real checkpoint files that other packages ship, of every age. Their code is not needed and not imported."""

import importlib.metadata

import pytest
import torch

from modsurg import convert, load_state, read_state, summary, verify
from modsurg.checkpoints.formats.torch_save.reader import TorchSource

pytestmark = [
    pytest.mark.legacy,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
FILES = {
    "facenet-pytorch": {"pnet.pt": 13, "rnet.pt": 16, "onet.pt": 21},
    "lpips": {"v0.0/alex.pth": 5, "v0.1/alex.pth": 5, "v0.1/squeeze.pth": 7, "v0.1/vgg.pth": 5},
    "resemblyzer": {"pretrained.pt": 16},
    "chgnet": {"chgnet_0.2.0_e30f77s348m32.pth.tar": 99, "chgnet_0.3.0_e29f68s314m37.pth.tar": 136},
    "silero-vad": {"silero_vad.jit": 30},
}
CASES = [(package, name, count) for package, files in FILES.items() for name, count in files.items()]


def find(package, name):
    """The file of an installed package."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed: make legacy")
    found = [file for file in files if str(file).endswith(name)]
    if not found:
        pytest.skip(f"this release of {package} has no {name}")
    return found[0].locate()


def expected(path, taken):
    """What torch reads, with the package's trust in itself."""
    if path.suffix == ".jit":
        return torch.jit.load(path).state_dict()
    state = torch.load(path, map_location="cpu", weights_only=False)
    for name in filter(None, taken.split(".")):
        state = state[name]
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(("package", "name", "count"), CASES)
def test_same_as_torch(package, name, count):
    source = TorchSource(find(package, name))
    theirs = expected(source.path, source.taken)
    assert len(source) == count
    assert sorted(source) == sorted(theirs)
    assert all(torch.equal(source.read(key), value) for key, value in theirs.items())
    assert verify(source.path)


@pytest.mark.parametrize(("package", "name", "count"), CASES)
def test_converts(package, name, count, tmp_path):
    done = convert(find(package, name), tmp_path / "a.safetensors")
    assert done.tensors == count
    assert verify(done.target)
    assert str(summary(done.target))


def test_where_the_state_was():
    assert read_state(find("resemblyzer", "pretrained.pt")).source.taken == "model_state"
    assert read_state(find("chgnet", "chgnet_0.3.0_e29f68s314m37.pth.tar")).source.taken == "model.state_dict"


def test_fills_a_model_of_ours():
    path = find("resemblyzer", "pretrained.pt")
    lstm = torch.nn.LSTM(40, 256, 3, batch_first=True)
    report = load_state(lstm, path, rename={"lstm.": ""}, strict=False)
    assert len(report.loaded) == 12
