"""A run that is stopped and goes on, in this process and in a new one, and edits on the way."""

import gc
import os
import re
import signal
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from kept_run import build, run
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from modsurg import Trainer, freeze, load_checkpoint, load_state
from modsurg.checkpoints.run_file import read_run
from modsurg.errors import LoadError, ModsurgWarning, TrainingError, TrustError
from modsurg.training import checkpointing as keeping
from modsurg.training.sharding import free_name, point


def weights(trainer):
    return [value.clone() for value in trainer.model.state_dict().values()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def timeless(history):
    return [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_second")} for row in history]


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_stopped_run_ends_as_if_it_had_not_been(tmp_path, stop):
    whole, loader = build(None)
    expected = run(whole, loader)
    first, loader = build(tmp_path)
    history = run(first, loader, on_step=lambda trainer: trainer.stop() if trainer.step == stop else None)
    assert (history.stopped, first.step) == ("trainer.stop()", stop)
    second, loader = build(tmp_path, seed=9)
    assert timeless(run(second, loader, resume=True)) == timeless(expected)
    assert equal(whole, second)
    assert second.optimizer.state_dict()["param_groups"] == whole.optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("stop", ["epoch 1", 3])
def test_loaders_that_draw_from_a_generator_of_their_own_go_on(tmp_path, stop):
    def start(directory, stop=None):
        trainer, loader = build(directory)
        train, validation = (
            DataLoader(loader.dataset, 4, sampler=RandomSampler(range(30), num_samples=n, generator=generator))
            for n, generator in ((30, torch.Generator().manual_seed(3)), (8, torch.Generator().manual_seed(4)))
        )
        options = {
            "on_step": lambda trainer: trainer.stop() if trainer.step == stop else None,
            "on_epoch": lambda trainer: trainer.stop() if f"epoch {trainer.epoch}" == stop else None,
        }
        trainer.fit(train, validation, 3, resume=True, **options)
        return trainer

    whole = start(tmp_path / "whole")
    start(tmp_path / "stopped", stop)
    again = start(tmp_path / "stopped")
    assert timeless(again.history) == timeless(whole.history)
    assert equal(again, whole)


def test_what_on_epoch_raises_costs_no_epoch(tmp_path):
    trainer, loader = build(tmp_path)

    def on_epoch(trainer):
        raise ZeroDivisionError("in the user's own code")

    with pytest.raises(ZeroDivisionError, match="own code"):
        trainer.fit(loader, epochs=2, on_epoch=on_epoch)
    assert read_run(tmp_path / "last.safetensors").states["trainer"]["position"]["epoch"] == 1
    assert (tmp_path / "best.safetensors").exists()


@pytest.mark.parametrize(("workers", "how"), [(0, "SIGKILL"), (2, "SIGTERM"), (0, "SIGINT")])
def test_a_run_that_is_killed_or_told_to_end_goes_on_in_a_new_process(tmp_path, workers, how):
    script = Path(__file__).with_name("kept_run.py")

    def start(*arguments):
        command = [sys.executable, str(script), str(tmp_path), str(workers), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    first = start("new", how)
    if how == "SIGKILL":
        assert first.returncode == -signal.SIGKILL
    else:
        assert (first.returncode, first.stdout) == (0, f"{how} 6\n")
    second = start("resume", "on")
    assert (second.returncode, second.stdout) == (0, " 12\n"), second.stderr
    whole, loader = build(None, workers)
    run(whole, loader)
    trainer, _ = build(tmp_path)
    load_state(trainer.model, read_run(tmp_path / "last.safetensors").states["model"])
    assert equal(whole, trainer)


def test_a_file_that_was_saved_by_hand_within_an_epoch_goes_on(tmp_path):
    whole, loader = build(None)
    run(whole, loader, on_step=lambda t: t.save(tmp_path / "own.safetensors") if t.step == 6 else None)
    again, loader = build(None, seed=8)
    run(again, loader, resume=tmp_path / "own.safetensors")
    assert equal(whole, again)


def test_a_file_that_was_saved_by_hand_after_a_stopped_fit_goes_on(tmp_path):
    whole, loader = build(None)
    run(whole, loader)
    first, loader = build(None)
    run(first, loader, on_step=lambda t: t.stop() if t.step == 6 else None)
    first.save(tmp_path / "own.safetensors")
    again, loader = build(None, seed=8)
    run(again, loader, resume=tmp_path / "own.safetensors")
    assert equal(whole, again)


@pytest.mark.parametrize("batch", [11, 12])
def test_a_file_that_was_saved_after_an_error_leaves_no_batch_out(tmp_path, batch):
    """Epoch 2 begins again after an error between the batches of a step, and goes on after one between two steps."""
    trainer, loader = build(None)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        for epoch in trainer.epochs(loader, epochs=3):
            for x, y in epoch:
                epoch.step(trainer.loss(trainer.model(x), y))
                1 / (trainer.epoch * 8 + epoch.batch - batch)
    trainer.save(tmp_path / "own.safetensors")
    own = read_run(tmp_path / "own.safetensors").states["trainer"]
    assert (own["position"]["epoch"], own["position"]["batch"]) == (1, 0 if batch == 11 else 4)
    assert (own["ranks"][0]["left"] is None) == (batch == 11)


class Numbers:
    """Six batches, and a state that is after the last batch that was given."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 6:
            self.at += 1
            yield torch.ones(1, 1), torch.full((1, 1), float(self.at))
        self.at = 0


class StatefulNumbers(Numbers):
    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("kind", [Numbers, StatefulNumbers])
@pytest.mark.parametrize(("leave", "kept"), [(1, 0), (3, 2), (4, 4)])
def test_a_body_that_leaves_between_the_batches_of_a_step_sees_them_again(tmp_path, leave, kept, kind):
    def start(directory=None):
        torch.manual_seed(0)
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        options = {"metrics": {"number": lambda output, target: target}, "accumulate": 2, "progress": False}
        return Trainer(model, optimizer, nn.MSELoss(), checkpoint_dir=directory, **options)

    whole, first, second = start(), start(tmp_path), start(tmp_path)
    for epoch in first.epochs(kind()):
        for x, y in epoch:
            output = first.model(x)
            epoch.step(first.loss(output, y), output, y)
            if epoch.batch == leave:
                first.stop()
                break
    assert read_run(tmp_path / "last.safetensors").states["trainer"]["position"]["batch"] == kept
    assert timeless(second.fit(kind(), resume=True)) == timeless(whole.fit(kind()))
    assert equal(whole, second)


def test_a_run_that_is_through_lets_its_loader_go():
    trainer, loader = build(None)
    trainer.fit(loader)
    gone = weakref.ref(loader)
    del loader
    gc.collect()
    assert gone() is None


def test_between_the_batches_of_a_step_nothing_can_be_saved(tmp_path):
    trainer, loader = build(None)
    for epoch in trainer.epochs(loader):
        for x, y in epoch:
            epoch.step(trainer.loss(trainer.model(x), y))
            if epoch.batch == 1:
                with pytest.raises(TrainingError, match=r"epoch 1, batch 1 \(step 1\): 1 gradient waits.*from on_step"):
                    trainer.save(tmp_path / "own.safetensors")


def test_last_best_and_the_latest_are_kept(tmp_path):
    trainer, loader = build(tmp_path, keep=2)
    trainer.fit(loader, epochs=3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best.safetensors", "last.safetensors", "step-00000008.safetensors", "step-00000012.safetensors"]
    assert read_run(tmp_path / "last.safetensors").step == 12


def test_a_kill_between_best_and_last_leaves_no_best_that_is_older(tmp_path, monkeypatch):
    trainer, loader = build(tmp_path)
    monkeypatch.setattr(keeping, "_link", lambda *files: 1 / 0)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        trainer.fit(loader, epochs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]


def test_what_is_not_the_best_is_not_made_so_when_a_run_begins_where_it_ended(tmp_path):
    model = nn.Linear(6, 3)
    worse = torch.optim.SGD(model.parameters(), lr=0.5, maximize=True)
    trainer = Trainer(model, worse, nn.CrossEntropyLoss(), checkpoint_dir=tmp_path, progress=False)
    batches = [(torch.ones(2, 6), torch.tensor([0, 1]))]
    trainer.fit(batches, epochs=2)
    for _ in trainer.epochs(batches):
        trainer.stop()
    trainer.fit(batches, epochs=3, resume=True)
    assert read_run(tmp_path / "best.safetensors").step == 1


def test_best_is_no_link_to_the_file_that_last_is_a_link_to(tmp_path):
    model = nn.Linear(6, 3)
    worse = torch.optim.SGD(model.parameters(), lr=0.5, maximize=True)
    (tmp_path / "run").mkdir()
    last = tmp_path / "run" / "last.safetensors"
    last.symlink_to(tmp_path / "elsewhere.safetensors")
    trainer = Trainer(model, worse, nn.CrossEntropyLoss(), checkpoint_dir=last.parent, progress=False)
    trainer.fit([(torch.ones(2, 6), torch.tensor([0, 1]))], epochs=3)
    assert (read_run(last.with_name("best.safetensors")).step, read_run(last).step) == (1, 3)


def test_a_run_that_is_stopped_before_its_first_batch_goes_on_from_where_it_was(tmp_path):
    whole, loader = build(None)
    run(whole, loader)
    first, loader = build(tmp_path)
    run(first, loader, on_step=lambda t: t.stop() if t.step == 6 else None)
    second, loader = build(tmp_path, seed=7)
    for _ in second.epochs(loader, epochs=3, resume=True):
        second.stop()
    third, loader = build(tmp_path, seed=8)
    run(third, loader, resume=True)
    assert equal(whole, third)


def test_the_latest_sharded_are_kept_beside_those_of_a_longer_run(tmp_path):
    for time, name in enumerate(["sharded-00000008", "sharded-00000009", "sharded-00000001", "sharded-00000002"]):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time, time))
    point(tmp_path, "sharded-00000002", ["last"], keep=1)
    assert sorted(path.name for path in tmp_path.glob("sharded-*")) == ["sharded-00000001", "sharded-00000002"]


def test_a_sharded_run_never_writes_where_the_last_one_is(tmp_path):
    assert free_name(tmp_path, 8) == "sharded-00000008"
    (tmp_path / "sharded-00000008").mkdir()
    assert free_name(tmp_path, 8) == "sharded-00000008-1"


def test_the_latest_are_kept_beside_those_of_a_longer_run(tmp_path):
    for epochs in (3, 1):
        trainer, loader = build(tmp_path, keep=1)
        trainer.fit(loader, epochs=epochs)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000004.safetensors"]


def test_best_does_not_change_when_training_goes_on(tmp_path):
    model = nn.Linear(6, 3)
    worse = torch.optim.SGD(model.parameters(), lr=0.5, maximize=True)
    trainer = Trainer(model, worse, nn.CrossEntropyLoss(), checkpoint_dir=tmp_path, progress=False)
    batch = (torch.ones(2, 6), torch.tensor([0, 1]))
    trainer.fit([batch])
    kept = (tmp_path / "best.safetensors").read_bytes()
    trainer.fit([batch], epochs=2)
    assert (tmp_path / "best.safetensors").read_bytes() == kept
    assert (tmp_path / "last.safetensors").read_bytes() != kept


def test_a_record_of_another_value_is_none(tmp_path):
    trainer, loader = build(tmp_path)
    trainer.fit(loader, loader)
    trainer.fit(loader)
    assert read_run(tmp_path / "best.safetensors").states["trainer"]["position"]["epoch"] == 2
    assert trainer.state.progress.record == trainer.history[-1]["loss"]


def test_where_best_is_higher(tmp_path):
    trainer, loader = build(tmp_path, best="val_accuracy")
    history = trainer.fit(loader, loader, epochs=3)
    best = read_run(tmp_path / "best.safetensors").states["trainer"]["history"][-1]["val_accuracy"]
    assert best == max(history["val_accuracy"])


def test_epochs_of_a_run_that_goes_on_are_those_of_all_its_fits(tmp_path, capsys):
    first, loader = build(tmp_path)
    first.fit(loader)
    first.fit(loader, on_step=lambda t: t.stop() if t.step == 6 else None)
    again, loader = build(tmp_path)
    assert len(again.fit(loader, epochs=3, resume=True)) == 3
    over, loader = build(tmp_path)
    over.display.on = True
    assert len(over.fit(loader, epochs=2, resume=True)) == 3
    file = tmp_path / "last.safetensors"
    told = f"nothing to do: {file} has 3 finished epochs, step 12, and epochs=2 counts them all\n"
    assert capsys.readouterr().out == told


def test_what_is_skipped_takes_no_time_of_the_epoch(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    class Slow:
        def __iter__(self):
            for _ in range(4):
                clock[0] += 1
                yield torch.ones(2, 6), torch.tensor([0, 1])

    first, _ = build(tmp_path)
    first.fit(Slow(), on_step=lambda t: t.stop())
    again, _ = build(tmp_path)
    row = again.fit(Slow(), resume=True)[-1]
    assert (row["seconds"], row["samples_per_second"]) == (2, 2)


@pytest.mark.parametrize("how", ["Ctrl-C", "trainer.stop()"])
def test_a_stop_says_how_to_go_on(tmp_path, capsys, how):
    trainer, loader = build(tmp_path)
    trainer.display.on = True
    trainer.fit(loader, on_step=lambda t: signal.raise_signal(signal.SIGINT) if how == "Ctrl-C" else t.stop())
    told = f"stopped at step 1 ({how}); {tmp_path / 'last.safetensors'} goes on with fit(..., resume=True)\n"
    assert capsys.readouterr().out == told
    trainer, loader = build(None)
    trainer.display.on = True
    trainer.fit(loader, on_step=lambda t: t.stop())
    assert (
        capsys.readouterr().out
        == "stopped at step 1 (trainer.stop()); it is in no file, as there is no checkpoint_dir\n"
    )


def test_a_second_ctrl_c_has_a_short_traceback(tmp_path):
    class Twice(nn.Module):
        def forward(self, x):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    trainer, loader = build(tmp_path)
    trainer.model[2] = Twice()
    with pytest.raises(KeyboardInterrupt, match="the second Ctrl-C") as caught:
        trainer.fit(loader)
    assert [entry.name for entry in caught.traceback][1:] == ["fit"]
    assert caught.value.__suppress_context__


def test_resume_begins_anew_where_there_is_nothing_and_refuses_a_name_that_is_not_there(tmp_path):
    trainer, loader = build(tmp_path)
    assert len(run(trainer, loader, resume=True)) == 3
    with pytest.raises(TrainingError, match=r"nothing.safetensors': the file does not exist. resume=True begins"):
        run(trainer, loader, resume=tmp_path / "nothing.safetensors")
    with pytest.raises(TrainingError, match=r"does not hold a run: name a file, resume='.*last.safetensors'"):
        run(trainer, loader, resume=tmp_path)
    trainer, loader = build(None)
    with pytest.raises(TrainingError, match=r"resume=True needs Trainer\(..., checkpoint_dir=...\)"):
        run(trainer, loader, resume=True)


def test_what_the_run_did_not_have_is_named_with_the_way_out(tmp_path):
    trainer, loader = build(tmp_path)
    trainer.scheduler = None
    trainer.fit(loader)
    again, loader = build(tmp_path)
    before = weights(again)
    again.average = torch.optim.swa_utils.AveragedModel(again.model)
    fix = re.escape(f"load_checkpoint('{tmp_path}/last.safetensors', model=model, optimizer=optimizer), and fit")
    with pytest.raises(LoadError, match=f"a run without average, scheduler_step; nothing was loaded. .*: {fix}"):
        again.fit(loader, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(again), before, strict=True))
    load_checkpoint(tmp_path / "last.safetensors", model=again.model, optimizer=again.optimizer)
    again.fit(loader)


def test_loaders_of_other_generators_than_those_of_the_epoch(tmp_path):
    trainer, loader = build(tmp_path)
    drawn = DataLoader(loader.dataset, 4, shuffle=True, generator=torch.Generator())
    trainer.fit(drawn, on_step=lambda trainer: trainer.stop() if trainer.step == 2 else None)
    again, loader = build(tmp_path)
    before = weights(again)
    with pytest.raises(TrainingError, match=r"drew from 1 generator of their own, and these from 0: .*generator=...\)"):
        again.fit(loader, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(again), before, strict=True))


def test_a_directory_that_cannot_be_written_to_is_seen_before_the_first_step(tmp_path, monkeypatch):
    trainer, loader = build(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(
        TrainingError, match=re.escape(f"checkpoint_dir='{tmp_path}' can't be written to: name another")
    ):
        trainer.fit(loader)
    assert trainer.step == 0


def test_a_file_of_another_model_changes_nothing(tmp_path):
    first, loader = build(tmp_path)
    run(first, loader)
    model = nn.Linear(6, 3)
    before = model.weight.clone()
    other = Trainer(model, torch.optim.SGD(model.parameters()), nn.CrossEntropyLoss(), progress=False)
    with pytest.raises(LoadError, match="does not match; nothing was loaded"):
        other.fit(loader, resume=tmp_path / "last.safetensors")
    assert torch.equal(model.weight, before)
    assert other.step == 0


def test_a_loader_with_a_state_of_its_own_is_asked(tmp_path):
    class Counting:
        def __init__(self):
            self.at = 0
            self.given = []

        def __len__(self):
            return 6

        def __iter__(self):
            while self.at < 6:
                self.at += 1
                self.given.append(self.at)
                yield torch.full((2, 6), float(self.at)), torch.tensor([0, 1])
            self.at = 0

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, state):
            self.at = state["at"]

    def go(resume, stop):
        model = nn.Linear(6, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), checkpoint_dir=tmp_path, progress=False)
        loader = Counting()
        trainer.fit(loader, resume=resume, on_step=lambda t: t.stop() if t.step == stop else None)
        return loader.given

    assert (go(False, 4), go(True, None)) == ([1, 2, 3, 4], [5, 6])


class Gate(nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


class TestEdits:
    def edited(self, trainer):
        with trainer.edit() as e:
            e.insert_after("0", nn.LayerNorm(8))
            e.replace(nn.ReLU, nn.GELU)
        return e.report

    def test_the_optimizer_trains_what_is_new_and_the_average_follows(self):
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        average = torch.optim.swa_utils.AveragedModel(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), average=average, progress=False)
        batches = [(torch.randn(8, 6), torch.randint(3, (8,)))] * 3
        trainer.fit(batches)
        averaged = average.module[2].weight.clone()
        assert not torch.equal(averaged, model[2].weight)
        self.edited(trainer)
        assert torch.equal(average.module[3].weight, averaged)
        trainer.fit(batches)
        assert not torch.equal(model[1].weight, torch.ones(8))
        assert not torch.equal(average.module[1].weight, torch.ones(8))

    def test_between_two_steps_of_a_loop(self):
        trainer, loader = build(None)
        for epoch in trainer.epochs(loader, epochs=3):
            for x, y in epoch:
                epoch.step(trainer.loss(trainer.model(x), y))
                if epoch.number == 2 and epoch.batch == 2:
                    self.edited(trainer)
        assert trainer.step == 12
        assert isinstance(trainer.model[1], nn.LayerNorm)

    def test_a_fresh_model_resumes_from_a_file_after_the_edit(self, tmp_path):
        whole, loader = build(tmp_path)
        whole.fit(loader, epochs=1)
        self.edited(whole)
        whole.fit(loader, epochs=1, on_step=lambda t: t.stop() if t.step == 6 else None)
        again, loader = build(tmp_path)
        again.fit(loader, epochs=2, resume=True)
        assert [type(module) for module in again.model] == [type(module) for module in whole.model]
        assert (again.step, len(again.history)) == (8, 2)

    def test_an_edited_model_resumes_from_a_file_before_the_edit(self, tmp_path):
        first, loader = build(tmp_path)
        first.fit(loader, epochs=1)
        again, loader = build(tmp_path)
        self.edited(again)
        again.fit(loader, epochs=2, resume=True, on_step=lambda t: t.stop() if t.step == 5 else None)
        assert again.step == 5
        assert isinstance(again.model[1], nn.LayerNorm)
        moments = again.optimizer.state[again.model[0].weight]
        assert int(moments["step"]) == 5
        assert int(again.optimizer.state[again.model[1].weight]["step"]) == 1

    @pytest.mark.parametrize("save_every", [None, 1])
    @pytest.mark.parametrize("kill", [4, 5, 7, 8, 9, "epoch 1", "epoch 2"])
    def test_in_on_step_and_on_epoch_outlive_a_kill_at_any_moment(self, tmp_path, kill, save_every):
        def start(directory, kill=None, **options):
            def die(moment):
                if moment == kill:
                    raise KeyboardInterrupt(f"at {moment}")

            def on_step(trainer):
                if trainer.step in (4, 7):
                    self.grown(trainer)
                die(trainer.step)

            def on_epoch(trainer):
                if trainer.epoch == 1:
                    self.grown(trainer)
                else:
                    freeze(trainer.model, "0")
                die(f"epoch {trainer.epoch}")

            trainer, loader = build(directory, seed=options.pop("seed", 0), save_every=save_every)
            trainer.fit(loader, epochs=3, on_step=on_step, on_epoch=on_epoch, **options)
            return trainer

        whole = start(None)
        with pytest.raises(KeyboardInterrupt, match=f"at {kill}"):
            start(tmp_path, kill)
        again = start(tmp_path, resume=True, seed=7 if (tmp_path / "last.safetensors").exists() else 0)
        assert timeless(again.history) == timeless(whole.history)
        assert equal(again, whole)
        assert len(again.model) == 8
        assert not again.model[0].weight.requires_grad

    def grown(self, trainer):
        with trainer.edit() as e:
            e.insert_before("0", nn.Linear(6, 6))

    def test_best_is_what_was_measured_and_not_what_on_epoch_made_of_it(self, tmp_path):
        trainer, loader = build(tmp_path)
        seen = []

        def on_epoch(trainer):
            seen.append(trainer.model[0].weight.clone())
            self.edited(trainer)

        trainer.fit(loader, on_epoch=on_epoch)
        again, _ = build(tmp_path)
        again.fit(loader, resume=True)
        best, last = (read_run(tmp_path / f"{name}.safetensors").states for name in ("best", "last"))
        assert torch.equal(best["model"]["0.weight"], seen[0])
        assert (len(best["trainer"]["recipes"]), len(last["trainer"]["recipes"])) == (0, 1)

    def test_in_the_body_of_a_loop_that_is_left(self, tmp_path):
        trainer, loader = build(tmp_path)
        for epoch in trainer.epochs(loader, epochs=3):
            for x, y in epoch:
                epoch.step(trainer.loss(trainer.model(x), y))
            self.edited(trainer)
            break
        own = read_run(tmp_path / "last.safetensors").states["trainer"]
        assert (own["position"]["epoch"], len(own["recipes"])) == (1, 1)

    def test_a_class_that_is_not_trusted_is_named_with_the_file_and_the_option(self, tmp_path):
        trainer, loader = build(tmp_path)
        with trainer.edit() as e:
            e.insert_after("0", Gate())
        trainer.fit(loader)
        again, loader = build(tmp_path)
        file = re.escape(str(tmp_path / "last.safetensors"))
        with pytest.raises(TrustError, match=rf"(?s){file} has an edit to make again: .*Trainer\(..., trust=\(.*\)\)"):
            again.fit(loader, resume=True)
        again, loader = build(tmp_path, trust=(Gate,))
        assert len(again.fit(loader, epochs=2, resume=True)) == 2

    @pytest.mark.parametrize("stop", [None, 9])
    def test_a_script_that_edits_again_when_it_is_started_again_is_told(self, tmp_path, stop):
        def script(stop=None):
            trainer, loader = build(tmp_path)
            trainer.scheduler = None
            trainer.fit(loader, epochs=2, resume=True)
            self.grown(trainer)
            trainer.fit(loader, epochs=4, resume=True, on_step=lambda t: t.stop() if t.step == stop else None)
            return trainer

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            script(stop)
        with pytest.warns(ModsurgWarning, match="has it twice: if not trainer.reports:") as told:
            assert len(script().model) == 7
        assert [Path(one.filename).name for one in told] == ["test_checkpointing.py"]

    def test_an_edit_that_cannot_be_recorded_says_so(self, tmp_path):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.function = lambda x: x

            def forward(self, x):
                return self.function(x)

        trainer, loader = build(tmp_path)
        with (
            pytest.warns(ModsurgWarning, match="resumed from here on has to make this edit itself"),
            trainer.edit() as e,
        ):
            e.replace("2", Odd())
        trainer.fit(loader)
        again, loader = build(tmp_path)
        with pytest.raises(TrainingError, match="can't be recorded: make that edit before"):
            again.fit(loader, resume=True)


def test_what_was_thawed_is_thawed_after_resuming(tmp_path):
    def start():
        trainer, loader = build(tmp_path)
        trainer.model[0].requires_grad_(False)
        return trainer, loader

    first, loader = start()
    first.fit(loader, epochs=3, thaw={1: "0"}, on_step=lambda t: t.stop() if t.step == 6 else None)
    second, loader = start()
    second.fit(loader, epochs=3, thaw={1: "0"}, resume=True, on_step=lambda t: t.stop() if t.step == 7 else None)
    assert second.model[0].weight.requires_grad


def test_what_was_frozen_after_it_was_thawed_is_frozen_after_resuming(tmp_path):
    first, loader = build(tmp_path)
    first.fit(loader, thaw={0: "0"}, on_step=lambda t: (freeze(t.model, "0"), t.stop()))
    second, loader = build(tmp_path)
    second.fit(loader, thaw={0: "0"}, resume=True, on_step=lambda t: t.stop())
    assert not second.model[0].weight.requires_grad


class TestOtherOptions:
    def start(self, directory, batches=6, lr=0.01, **options):
        torch.manual_seed(0)
        model = nn.Linear(8, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        options = {"checkpoint_dir": directory, "progress": False, **options}
        trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), **options)
        return trainer, [(torch.randn(4, 8), torch.randint(3, (4,))) for _ in range(batches)]

    @pytest.mark.parametrize("stop", [10, None], ids=["within an epoch", "between epochs"])
    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"batches": 3}, "batches in an epoch 6, here 3"),
            ({"batches": 20}, "batches in an epoch 6, here 20"),
            ({"accumulate": 2}, "accumulate 1, here 2"),
            ({"clip_norm": 1.0}, "clip_norm None, here 1.0"),
            ({"precision": "bf16"}, "precision fp32, here bf16"),
            ({"lr": 0.5}, "lr 0.01, here 0.5 .the file's is used."),
            ({"accumulate": 2, "clip_norm": 1}, "accumulate 1, here 2; clip_norm None, here 1.0"),
        ],
    )
    def test_they_are_named_in_one_line(self, tmp_path, change, told, stop):
        first, batches = self.start(tmp_path)
        first.fit(batches, epochs=2, on_step=lambda t: t.stop() if t.step == stop else None)
        again, batches = self.start(tmp_path, **change)
        file = re.escape(str(tmp_path / "last.safetensors"))
        with pytest.warns(ModsurgWarning, match=f"^{file} was written with {told}.$") as caught:
            again.fit(batches, epochs=3, resume=True)
        assert len(caught) == 1

    def test_the_same_options_are_not(self, tmp_path):
        first, batches = self.start(tmp_path, clip_norm=torch.tensor(1.0))
        first.fit(batches, on_epoch=lambda t: t.optimizer.param_groups[0].update(lr=0.001))
        again, batches = self.start(tmp_path, clip_norm=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again.fit(batches, epochs=2, resume=True)
        assert again.history["lr"] == [0.01, 0.001]

    def test_nothing_to_resume_is_one_line(self, tmp_path, capsys):
        trainer, batches = self.start(tmp_path, progress=True)
        trainer.fit(batches, resume=True)
        first, *rest = capsys.readouterr().out.splitlines()
        assert first == f"no last.safetensors in {tmp_path} yet: the run begins with its first step"
        assert len(rest) == 1
