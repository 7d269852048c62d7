"""Every script of the tutorial, as a reader would start it; its numbers and trees are those of the tutorial."""

import re
import runpy
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

FOLDER = Path(__file__).parent.parent / "examples/tutorial"
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))
SHARED = Path(__file__).parents[2] / "shared"
INSECTS = SHARED / "data/hymenoptera.tar"
TEXT = SHARED / "tutorial/pytorch-tutorial-zh.txt"
BODY = """\
Mynn(
  (sequential1): Sequential(
    (0): Conv2d(3, 32, kernel_size=(5, 5), stride=(1, 1), padding=(2, 2))
    (1): MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
    (2): Conv2d(32, 32, kernel_size=(5, 5), stride=(1, 1), padding=(2, 2))
    (3): MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
    (4): Conv2d(32, 64, kernel_size=(5, 5), stride=(1, 1), padding=(2, 2))
    (5): MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
    (6): Flatten(start_dim=1, end_dim=-1)
    (7): Linear(in_features=1024, out_features=64, bias=True)
    (8): Linear(in_features=64, out_features=10, bias=True)
  )
  (sequential2): Linear(in_features=10, out_features=10, bias=True)
  (classfication): Sequential(
    (0): Linear(in_features=10, out_features=10, bias=True)
    (1): {middle}
    (2): Linear(in_features=10, out_features=10, bias=True)
  )
"""
LINEAR = "Linear(in_features=10, out_features=10, bias=True)"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Start a script with these arguments, in an empty folder; what it prints."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)

    def start(number, *arguments):
        (script,) = FOLDER.glob(f"{number:02}_*.py")
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return start


def test_one_script_a_section():
    assert [int(script.name[:2]) for script in SCRIPTS] == list(range(1, 16))


@pytest.mark.parametrize("number", range(1, 16))
def test_help(number, run, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        run(number, "--help")
    assert "usage:" in capsys.readouterr().out


def test_environment(run):
    printed = run(1)
    assert re.search(r"^torch +\d", printed, re.MULTILINE)
    assert "torch.cuda.is_available():" in printed
    assert "1 + 1 on" in printed
    assert "MaxPool2d" in printed


def test_dataset(run):
    assert "ants, bees, both: 124 121 245\n" in run(2)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    if not INSECTS.exists():
        pytest.skip(f"the photographs are not at {INSECTS}")
    folder = tmp_path_factory.mktemp("insects")
    with tarfile.open(INSECTS) as archive:
        archive.extractall(folder, [part for part in archive if "/val/" not in f"/{part.name}"], filter="data")
    (train,) = folder.rglob("train")
    return train.parent


def test_dataset_of_photographs(run, photographs):
    printed = run(2, "--data", photographs)
    assert "ants, bees, both: 124 121 245\n" in printed
    assert "train[123]: JPEG (" in printed
    assert re.search(r"train\[123\].*ants\ntrain\[124\].*bees\n", printed)


def test_a_folder_without_insects(run, tmp_path):
    with pytest.raises(SystemExit, match="it needs train/ants"):
        run(2, "--data", tmp_path)
    for name in ("ants", "bees"):
        (tmp_path / "train" / name).mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "train/ants/gray.jpg")
    with pytest.raises(SystemExit, match="it needs train/ants"):
        run(2, "--data", tmp_path)
    Image.new("L", (8, 8)).save(tmp_path / "train/bees/gray.jpg")
    assert "HWC (8, 8, 3)" in run(3, "--data", tmp_path)


@pytest.fixture
def text():
    if not TEXT.exists():
        pytest.skip(f"the tutorial's text is not at {TEXT}")
    return TEXT.read_text()


def test_what_the_text_says_of_the_photographs(run, photographs, text):
    counts, shape = "124 121 245", "(512, 768, 3)"
    assert f"# {counts}\n" in text
    assert f"# {shape}\n" in text
    assert f"ants, bees, both: {counts}\n" in run(2, "--data", photographs)
    assert f"step 1: HWC {shape}, " in run(3, "--data", photographs)


def test_what_the_text_says_of_cifar10(run, text):
    (classes,) = re.findall(r"^\['airplane'.*\]$", text, re.MULTILINE)
    assert f"{classes}\na sample: RGB (32, 32) " in run(5)


@pytest.mark.filterwarnings("ignore::modsurg.errors.ModsurgWarning")  # the script shows it
def test_the_trees_are_those_of_the_text(run, text):
    printed = run(14)
    trees = re.findall(r"^Mynn\(\n.*?^\)\n", text, re.MULTILINE | re.DOTALL)
    assert len(trees) == 3
    for tree in trees:
        assert tree.replace("classficatipm", "classfication") in printed  # a slip of the second


def test_tensorboard(run, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert f"--logdir={tmp_path / 'logs'}" in run(3, "--logs", tmp_path / "logs")
    events = accumulator.EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("y = x")] == [(x, x) for x in range(100)]
    assert [(point.step, point.value) for point in events.Scalars("y = x^2")] == [(x, x * x) for x in range(100)]
    by_height, by_channel = events.Images("picture HWC"), events.Images("picture CHW")
    assert [image.step for image in by_height] == [1, 2]
    assert [image.encoded_image_string for image in by_height] == [image.encoded_image_string for image in by_channel]


def test_transforms(run, tmp_path):
    from PIL import Image

    printed = run(4, "--out", tmp_path / "sheet.png")
    assert re.search(r"Normalize +\(3, \d+, \d+\) +from -", printed)
    assert re.search(r"Resize +\(3, 24, 24\) +from  0", printed)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 128


def test_cifar10_and_loader(run):
    printed = run(5)
    classes = "'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'"
    assert f"[{classes}]" in printed
    assert "a sample: RGB (32, 32) 0 airplane" in printed
    assert "drop_last=False: 4 batches, the last of 8, 200 pictures" in printed
    assert "drop_last=True: 3 batches, the last of 64, 192 pictures" in printed
    assert "a batch: (64, 3, 32, 32)" in printed
    assert Path("runs/tutorial/batch.png").exists()


def test_module(run):
    assert run(6) == "tensor(2.)\n"


def test_convolution(run):
    printed = run(7)
    assert "(3, 5, 5) -> (6, 3, 3)" in printed
    assert "[54., 81., 108.]" in re.sub(r" +", " ", printed).replace("[ ", "[")


def test_pooling(run):
    printed = run(8)
    assert "ceil_mode=True: (3, 5, 5) -> (3, 2, 2) [[3.0, 5.0], [3.0, 5.0]]" in printed
    assert "ceil_mode=False: (3, 5, 5) -> (3, 1, 1) [[3.0]]" in printed
    assert Path("runs/tutorial/pooling.png").exists()


def test_activation(run):
    printed = run(9)
    assert "(1, 1, 2, 2) [1.0, -0.5, -1.0, 3.0]" in printed
    assert re.search(r"ReLU\(\) +1.00  0.00  0.00  3.00", printed)
    assert Path("runs/tutorial/activation.png").exists()


def test_sequential(run):
    printed = run(10)
    assert "(64, 3, 32, 32) -> (64, 10)" in printed
    assert "    (7): Linear(in_features=1024, out_features=64, bias=True)" in printed
    assert "params 145,578" in printed
    assert "145,578" in Path("runs/tutorial/network.svg").read_text()


def test_losses(run):
    printed = run(11)
    assert "L1, sum:  tensor(2.)" in printed
    assert "L1, mean: tensor(0.6667)" in printed
    assert "MSE:      tensor(1.3333)" in printed
    left, right = re.search(r"cross entropy: (\S+), by hand (\S+)", printed).groups()
    assert left == right


def test_backward(run):
    printed = run(12)
    first, second = (float(length) for length in re.findall(r"length (\S+)", printed))
    assert first > 0
    assert second == pytest.approx(2 * first, rel=1e-2)
    assert "before: None" in printed
    assert "after zero_grad: None" in printed


def test_optimizer(run):
    rows = [tuple(map(float, row.split())) for row in run(13, "--epochs", "2", "--limit", "128").splitlines()[1:3]]
    assert [epoch for epoch, _, _ in rows] == [1, 2]
    assert rows[0][1] > rows[1][1]
    assert all(by_hand == pytest.approx(trainer, abs=2e-3) for _, by_hand, trainer in rows)
    assert Path("runs/tutorial/curves.png").exists()


@pytest.mark.filterwarnings("ignore::modsurg.errors.ModsurgWarning")  # the script shows it
def test_surgery(run):
    printed = run(14)
    assert f"--- as it was\n{BODY.format(middle=LINEAR)})\n" in printed
    assert f"--- add_ReLU added\n{BODY.format(middle=LINEAR)}  (add_ReLU): ReLU()\n)\n" in printed
    assert f"--- classfication[1] replaced\n{BODY.format(middle='ReLU()')}  (add_ReLU): ReLU()\n)\n" in printed
    assert "both print alike: True" in printed
    assert '"add_ReLU" (ReLU) is never called' in printed
    assert "Adam: 2 parameters left it" in printed
    printed = re.sub(r"\n  (?=\S)", " ", printed)
    assert 'nothing at "clasfication.1" in Mynn. Nearest: "classfication.1"' in printed
    assert "nothing was changed. sequential2 (Linear" in printed
    assert "not called" in Path("runs/tutorial/surgery.svg").read_text()
    assert "after undo, sequential1.8 is Linear(in_features=64" in printed


def test_keeping(run):
    printed = run(15)
    assert len(re.findall(r"^ *[\d,]+ bytes", printed, re.MULTILINE)) == 5
    assert "torch.load('my_model.pth'): UnpicklingError\n  Weights only load failed" in printed
    assert "load_model with trust=(Mynn,): Mynn" in printed
    assert "the same: [True, True, True]" in printed
