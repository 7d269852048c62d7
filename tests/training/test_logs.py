"""What is seen of a run."""

import io
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from modsurg import Trainer
from modsurg.errors import TrainingError
from modsurg.training.history import History
from modsurg.training.progress_display import ProgressDisplay, _clock


def make(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(144, 3))
    return Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), options.pop("loss", nn.CrossEntropyLoss()), **options
    )


def loader():
    dataset = TensorDataset(torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3)
    dataset.classes = ["cat", "dog", "eel"]
    return DataLoader(dataset, batch_size=4)


class Terminal(io.StringIO):
    def isatty(self):
        return True


class TestScreen:
    def test_lines_where_there_is_no_terminal(self, capsys):
        make().fit(loader(), loader(), epochs=2)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2
        assert lines[0].startswith("epoch 1/2  loss ")
        assert "val_loss" in lines[0]
        assert "samples/s" in lines[0]
        assert "\x1b" not in lines[0]

    def test_a_line_within_an_epoch_has_the_time_left(self, capsys):
        screen = ProgressDisplay(True)
        screen.begin(1, 3, 0, 10)
        screen.show(5, 80, {"loss": 0.5})
        line = capsys.readouterr().out
        assert line.startswith("epoch 1/3  batch 5/10  loss 0.5  ")
        assert line.endswith("left\n")

    def test_a_bar_in_a_terminal(self, monkeypatch):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        screen = ProgressDisplay(True)
        screen.begin(2, 3, 0, 10)
        screen.show(5, 80, {"loss": 0.5})
        screen.end({"epoch": 2, "loss": 0.25, "seconds": 2.0, "samples_per_second": 40})
        text = terminal.getvalue()
        assert "5/10" in text
        assert "loss 0.5" in text
        assert text.endswith("epoch 2/3  loss 0.25  40 samples/s  2.0 s\n")

    def test_what_stands_in_for_stdout_need_not_be_a_file(self, monkeypatch):
        class Twice:
            text = ""

            def write(self, text):
                self.text += text

            def flush(self):
                pass

        for stand_in in (Twice(), None):
            monkeypatch.setattr(sys, "stdout", stand_in)
            make().fit(loader())
            assert stand_in is None or stand_in.text.startswith("epoch 1/1  loss ")

    def test_quiet(self, capsys):
        make(progress=False).fit(loader())
        assert capsys.readouterr().out == ""

    def test_the_bar_is_imported_for_a_terminal_only(self):
        import subprocess

        code = (
            "import sys, modsurg.training.trainer; print([m for m in sys.modules if m in "
            + repr(["rich.progress", "tensorboard", "torchvision", "matplotlib"])
            + "])"
        )
        assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"

    def test_times(self):
        assert [_clock(s) for s in (1.25, 61, 3700)] == ["1.2 s", "1:01", "1:01:40"]


class TestBoard:
    def test_a_directory_that_cannot_be_made(self, tmp_path):
        pytest.importorskip("tensorboard")
        (tmp_path / "file").touch()
        with pytest.raises(TrainingError, match="log_dir can't be made: .*File exists"):
            make(log_dir=tmp_path / "file", progress=False).fit(loader())

    def test_everything_is_there(self, tmp_path):
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        trainer = make(log_dir=tmp_path, progress=False, seed=1, metrics={"accuracy": lambda o, t: o.argmax(1) == t})
        batches = list(loader()) * 25
        functions = [Trainer.histograms, lambda t: t.board.writer.add_scalar("mine", 3.0, t.step)]
        trainer.fit(batches, loader(), on_epoch=functions)
        points = self.points(tmp_path)
        curves = {"loss/train", "lr/0", "loss/val", "accuracy/val", "accuracy/train", "samples_per_second"}
        assert set(points) == {*curves, "mine"}
        assert [step for step, _ in points["loss/train"]] == [50]
        tags = EventAccumulator(str(tmp_path)).Reload().Tags()
        assert "weights/0.weight" in tags["histograms"]
        assert points["loss/val"][-1] == (50, pytest.approx(trainer.history[-1]["val_loss"]))

    def points(self, directory):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(directory)).Reload()
        return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}

    @pytest.mark.parametrize("epochs", [1, 6])
    def test_a_short_run_has_a_point_of_each_curve_an_epoch(self, tmp_path, epochs):
        pytest.importorskip("tensorboard")
        trainer = make(log_dir=tmp_path, progress=False)
        history = trainer.fit(loader(), loader(), epochs=epochs)
        points = self.points(tmp_path)
        steps = [2 * epoch for epoch in range(1, epochs + 1)]
        for tag in ("loss/train", "loss/val", "lr/0"):
            assert [step for step, _ in points[tag]] == steps
        assert [value for _, value in points["loss/train"]] == pytest.approx(history["loss"])

    def test_a_step_with_a_point_gets_no_second_one_at_the_end_of_its_epoch(self, tmp_path):
        pytest.importorskip("tensorboard")
        batches = list(loader()) * 25
        make(log_dir=tmp_path, progress=False).fit([*batches, batches[0]], epochs=2)
        assert [step for step, _ in self.points(tmp_path)["loss/train"]] == [50, 51, 100, 102]
        make(log_dir=tmp_path / "even", progress=False).fit(batches, epochs=2)
        assert [step for step, _ in self.points(tmp_path / "even")["loss/train"]] == [50, 100]

    @pytest.mark.parametrize("stop", [1, 2, 3, 50, 51])
    def test_a_run_that_goes_on_writes_no_point_twice(self, tmp_path, stop):
        """Not even those that a killed run wrote after its last file."""
        pytest.importorskip("tensorboard")
        batches = list(loader()) * (26 if stop >= 50 else 1)

        def start(end=None):
            trainer = make(log_dir=tmp_path / "logs", checkpoint_dir=tmp_path, progress=False, seed=1)

            def on_step(trainer):
                if trainer.step == stop:
                    trainer.save(tmp_path / "kept.safetensors")
                if trainer.step == end:
                    raise ZeroDivisionError("killed")

            trainer.fit(batches, loader(), 3, resume=end is None and tmp_path / "kept.safetensors", on_step=on_step)
            return trainer.history

        with pytest.raises(ZeroDivisionError, match="killed"):
            start(end=stop + 2)
        for file in (tmp_path / "logs").iterdir():
            file.rename(file.with_name("events.out.tfevents.0"))  # read first, also if both are of one second
        history = start()
        points = self.points(tmp_path / "logs")
        steps = {tag: [step for step, _ in values] for tag, values in points.items()}
        assert steps == {tag: sorted(set(found)) for tag, found in steps.items()}
        assert steps["loss/val"] == history["step"]
        assert [value for _, value in points["loss/val"]] == pytest.approx(history["val_loss"])
        if stop < 50:
            assert steps["loss/train"] == history["step"]
            assert [value for _, value in points["loss/train"]] == pytest.approx(history["loss"])

    def test_a_start_with_nothing_to_resume_writes_no_point_twice(self, tmp_path):
        pytest.importorskip("tensorboard")
        with pytest.raises(ZeroDivisionError, match="division"):
            make(log_dir=tmp_path / "logs", checkpoint_dir=tmp_path / "a", progress=False).fit(
                loader(), epochs=2, resume=True, on_epoch=lambda t: 1 / (2 - t.epoch)
            )
        for file in (tmp_path / "logs").iterdir():
            file.rename(file.with_name("events.out.tfevents.0"))
        make(log_dir=tmp_path / "logs", checkpoint_dir=tmp_path / "b", progress=False).fit(loader(), resume=True)
        assert [step for step, _ in self.points(tmp_path / "logs")["loss/train"]] == [2]

    def test_loaders_are_the_same_with_it(self, tmp_path):
        pytest.importorskip("tensorboard")

        class Placed:
            def __init__(self):
                self.batches, self.at = list(loader()), 0

            def __iter__(self):
                while self.at < len(self.batches):
                    self.at += 1
                    yield self.batches[self.at - 1]
                self.at = 0

            def state_dict(self):
                return {"at": self.at}

        def drawn():
            return DataLoader(loader().dataset, 4, shuffle=True, generator=torch.Generator().manual_seed(1))

        for start in (Placed, drawn):
            seen, unseen = make(log_dir=tmp_path, progress=False), make(progress=False)
            for trainer in (seen, unseen):
                torch.manual_seed(2)
                trainer.fit(start(), epochs=3)
            assert seen.history["loss"] == unseen.history["loss"]
            assert seen.step == 6

    def test_the_run_is_the_same_with_it(self, tmp_path):
        pytest.importorskip("tensorboard")
        seen, unseen = make(log_dir=tmp_path, progress=False), make(progress=False)
        for trainer in (seen, unseen):
            torch.manual_seed(2)
            trainer.fit(loader(), loader(), epochs=2)
        assert torch.equal(seen.model[4].weight, unseen.model[4].weight)

    def test_without_tensorboard(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(TrainingError, match=r'log_dir= needs TensorBoard: pip install "modsurg\[tensorboard\]"'):
            make(log_dir=tmp_path).fit(loader())

    def test_histograms_need_a_directory(self):
        with pytest.raises(TrainingError, match=r"Trainer\(..., log_dir=...\)"):
            make().histograms()


class TestHistory:
    rows = [
        {"epoch": 1, "loss": 2.0, "val_loss": 3.0, "lr": 0.1},
        {"epoch": 2, "loss": 1.0, "val_loss": 2.5, "lr": 0.1},
    ]

    def test_columns_and_rows(self):
        history = History([dict(row) for row in self.rows])
        assert history["loss"] == [2.0, 1.0]
        assert history[-1]["val_loss"] == 2.5
        assert [row["epoch"] for row in history[:1]] == [1]
        assert history.names == ["epoch", "loss", "val_loss", "lr"]
        with pytest.raises(KeyError, match="'acc'; there are epoch, loss"):
            history["acc"]

    def test_is_printed_as_a_table(self):
        rows = [{"epoch": 1, "loss": 1 / 3}, {"epoch": 2, "loss": 0.25, "samples_per_second": 12345.6}]
        expected = [
            "epoch    loss  samples_per_second",
            "    1  0.3333",
            "    2    0.25               12346",
            "stopped: SIGINT",
        ]
        assert [line.rstrip() for line in str(History(rows, "SIGINT")).splitlines()] == expected
        assert str(History([{"loss": float("nan")}])).split() == ["loss", "nan"]
        assert str(History()) == "no epoch is finished"

    def test_plot(self, tmp_path):
        pytest.importorskip("matplotlib")
        figure = History([dict(row) for row in self.rows]).plot(tmp_path / "run.png")
        assert [axis.get_title() for axis in figure.axes] == ["loss"]
        assert [line.get_label() for line in figure.axes[0].lines] == ["training", "validation"]
        assert (tmp_path / "run.png").stat().st_size > 1000
        with pytest.raises(TrainingError, match="no epoch is finished"):
            History().plot()
