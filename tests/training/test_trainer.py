"""The trainer as a user meets it: fit, evaluate, predict, and a run that goes on."""

import ctypes
import gc
import math
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from modsurg import Trainer
from modsurg.errors import BatchError, DeviceError, ModsurgWarning, NonFiniteError, TrainingError
from modsurg.training.error_messages import check_labels
from modsurg.training.nan_checks import LossCheck


def data(n=50, features=6, classes=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, features, generator=generator)
    return TensorDataset(x, x[:, :classes].argmax(1))


def network(classes=3):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, classes))


def accuracy(output, target):
    return (output.argmax(1) == target).float().mean()


def make(model=None, **options):
    model = model or network()
    optimizer = options.pop("optimizer", None) or torch.optim.Adam(model.parameters(), lr=0.01)
    loss = options.pop("loss", nn.CrossEntropyLoss())
    return Trainer(model, optimizer, loss, **{"progress": False, **options})


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class TestFit:
    def test_is_a_plain_loop_bit_for_bit(self):
        mine, plain = network(), network()
        torch.manual_seed(5)
        make(mine).fit(DataLoader(data(), batch_size=8, shuffle=True), epochs=3)
        torch.manual_seed(5)
        optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
        loader = DataLoader(data(), batch_size=8, shuffle=True)
        for _ in range(3):
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(plain(x), y).backward()
                optimizer.step()
        assert same(mine, plain)

    def test_gradients_left_behind_are_not_taken_up(self):
        clean, used = network(), network()
        used(torch.ones(1, 6)).sum().backward()
        for model in (clean, used):
            torch.manual_seed(5)
            make(model).fit(DataLoader(data(), batch_size=8), epochs=1)
        assert same(clean, used)

    def test_history_has_a_row_an_epoch_with_means_over_samples(self):
        model = network()
        trainer = make(model, metrics=[accuracy], optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
        model.eval()
        loader = DataLoader(data(20), batch_size=8)
        history = trainer.fit(loader, loader, epochs=2)
        x, y = data(20).tensors
        assert [row["epoch"] for row in history] == [1, 2]
        assert history[-1]["step"] == 6
        model.eval()
        assert history[0]["val_loss"] == pytest.approx(float(nn.functional.cross_entropy(model(x), y)))
        assert history[0]["val_accuracy"] == pytest.approx(float(accuracy(model(x), y)))
        assert history["samples_per_second"][0] > 0

    def test_a_metric_may_give_a_value_for_each_sample(self):
        trainer = make(metrics={"right": lambda output, target: output.argmax(1) == target, "mean": accuracy})
        result = trainer.evaluate(DataLoader(data(20), batch_size=8))
        assert result["right"] == pytest.approx(result["mean"])

    def test_a_metric_that_is_a_module_is_on_the_device_too(self):
        class Scaled(nn.L1Loss):
            def to(self, device):
                moved.append(device)

        moved = []
        make(metrics=[Scaled()])
        assert moved == [make().runtime.device]

    def test_a_second_fit_goes_on_counting(self):
        trainer = make()
        loader = DataLoader(data(), batch_size=25)
        trainer.fit(loader, epochs=2)
        assert [row["epoch"] for row in trainer.fit(loader, epochs=1)] == [1, 2, 3]
        assert trainer.step == 6

    def test_functions_are_called_after_each_step_and_each_epoch(self):
        steps, epochs = [], []
        make(accumulate=2).fit(
            DataLoader(data(), batch_size=10),
            epochs=2,
            on_step=lambda trainer: steps.append(trainer.step),
            on_epoch=lambda trainer: epochs.append(trainer.history[-1]["epoch"]),
        )
        assert epochs == [1, 2]
        assert steps == [1, 2, 3, 4, 5, 6]  # those of the last windows too

    def test_a_model_in_evaluation_mode_trains_in_training_mode_and_frozen_parts_stay(self):
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        model[1].eval()
        make(model).fit(DataLoader(data(), batch_size=10), DataLoader(data(), batch_size=10))
        assert [module.training for module in model] == [True, False, True]
        model.eval()
        make(model).fit(DataLoader(data(), batch_size=10))
        assert model[1].training


class TestOptions:
    def test_the_last_window_is_averaged_over_what_it_holds(self):
        x, y = data(10).tensors
        mine = network().eval()
        trainer = make(mine, optimizer=torch.optim.SGD(mine.parameters(), lr=0.5), accumulate=4)
        mine[2].p = 0.0
        trainer.fit(DataLoader(data(10), batch_size=2))
        plain = network().eval()
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
        for part in (slice(0, 8), slice(8, 10)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(x[part]), y[part]).backward()
            optimizer.step()
        assert trainer.step == 2
        for mine_p, plain_p in zip(mine.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine_p, plain_p, rtol=1e-5, atol=1e-6)

    def test_uneven_batches_of_a_window_count_by_their_samples(self):
        x, y = data(10).tensors
        batches = [(x[:6], y[:6]), (x[6:], y[6:])]
        mine, plain = network(), network()
        mine[2].p = plain[2].p = 0.0
        make(mine, optimizer=torch.optim.SGD(mine.parameters(), lr=0.5), accumulate=2).fit(batches)
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
        torch.testing.assert_close(mine[0].weight, plain[0].weight)

    def test_clip_norm_limits_the_step(self):
        model = network()
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        make(model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), clip_norm=0.01).fit([data().tensors])
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert float((after - before).norm()) == pytest.approx(0.01, rel=1e-3)

    def test_average_follows_and_is_what_is_validated(self):
        model = network()
        average = torch.optim.swa_utils.AveragedModel(model)
        trainer = make(model, average=average)
        loader = DataLoader(data(), batch_size=10)
        history = trainer.fit(loader, loader)
        assert int(average.n_averaged) == 5
        assert history[-1]["val_loss"] == pytest.approx(trainer.evaluate(loader, average)["loss"])
        assert history[-1]["val_loss"] != pytest.approx(trainer.evaluate(loader)["loss"])

    def test_bf16_trains_by_autocast(self):
        seen = []
        model = network()
        model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        history = make(model, precision="bf16").fit(DataLoader(data(), batch_size=10), epochs=2)
        assert set(seen) == {torch.bfloat16}
        assert model[0].weight.dtype == torch.float32
        assert history["loss"][1] < history["loss"][0]

    def test_a_forward_pass_within_autocast_leaves_it_off(self):
        trainer = make(precision="bf16")
        for epoch in trainer.epochs(DataLoader(data(), batch_size=25)):
            for batch in epoch:
                with trainer.autocast:
                    loss, *_ = epoch.forward(batch)
                assert not torch.is_autocast_enabled("cpu")
                epoch.step(loss)

    def test_channels_last_changes_the_result_by_rounding_only(self):
        def run(**options):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
            make(model, **options).fit([(torch.ones(2, 3, 8, 8), torch.tensor([0, 1]))], epochs=2)
            return model

        fast, plain = run(), run(channels_last=False)
        assert fast[0].weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(fast[0].weight, plain[0].weight.contiguous())

    def test_patience_stops_a_run_that_does_not_get_better(self):
        model = network()
        trainer = make(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
        model[2].p = 0.0
        history = trainer.fit(DataLoader(data(), batch_size=10), DataLoader(data(), batch_size=10), 9, patience=2)
        assert len(history) == 3
        assert history.stopped == "val_loss did not get better for 2 epochs"

    def test_a_seed_makes_runs_equal(self):
        def run():
            model = network()
            torch.seed()
            return make(model, seed=4).fit(DataLoader(data(), batch_size=10, shuffle=True))["loss"]

        assert run() == run()

    def test_thaw_unfreezes_by_schedule(self):
        model = network()
        for parameter in model[0].parameters():
            parameter.requires_grad = False
        seen = []
        make(model).fit(
            DataLoader(data(), batch_size=25),
            epochs=3,
            thaw={2: "0"},
            on_epoch=lambda trainer: seen.append(model[0].weight.requires_grad),
        )
        assert seen == [False, False, True]


class TestBatches:
    def test_a_mapping_gives_the_model_the_fields_that_it_names(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(6, 3)

            def forward(self, x, scale):
                return self.layer(x) * scale

        x, y = data().tensors
        loss = make(Model(), loss=lambda output, batch: nn.functional.cross_entropy(output, batch["y"])).fit(
            [{"x": x, "scale": torch.tensor(2.0), "y": y}], epochs=2
        )["loss"]
        assert loss[1] < loss[0]

    def test_a_lone_tensor_is_its_own_target(self):
        model = nn.Linear(6, 6)
        make(model, loss=nn.MSELoss()).fit(DataLoader(TensorDataset(data().tensors[0]), batch_size=10))
        make(model, loss=nn.MSELoss()).fit([data().tensors[0]])

    def test_own_loop_body(self):
        trainer = make()
        rows = []
        for epoch in trainer.epochs(DataLoader(data(), batch_size=10), epochs=2):
            for x, y in epoch:
                epoch.step(trainer.loss(trainer.model(x), y))
            rows.append(epoch.row["loss"])
        assert rows == trainer.history["loss"]
        assert trainer.step == 10

    def test_metrics_are_of_the_samples_that_gave_one(self):
        trainer = make(metrics={"one": lambda output, target: 1.0, "array": lambda o, t: (t == t).numpy()})
        for epoch in trainer.epochs(DataLoader(data(), batch_size=10)):
            for x, y in epoch:
                output = trainer.model(x)
                epoch.step(trainer.loss(output, y), *[output, y][: 2 * (epoch.batch % 2)])
        assert (trainer.history["one"], trainer.history["array"]) == ([1.0], [1.0])

    def test_a_body_that_leaves_early_shortens_the_epoch(self):
        trainer = make()
        for epoch in trainer.epochs(DataLoader(data(), batch_size=10), epochs=2):
            for x, y in epoch:
                epoch.step(trainer.loss(trainer.model(x), y))
                if epoch.batch == 2:
                    break
        assert (trainer.step, len(trainer.history)) == (4, 2)


class TestRefusals:
    @pytest.mark.parametrize(
        ("loader", "message"),
        [
            ([], "train_loader is empty: it must give at least one batch"),
            (DataLoader(data(3), batch_size=8, drop_last=True), r"drop_last=True, and 3 samples make no batch of 8"),
            (iter([data().tensors]), r"an iterator, which lasts for one epoch: .* list\(train_loader\)"),
            (data(), r"DataLoader\(train_loader, batch_size=64\)"),
            (3, "train_loader is a int, which gives no batches"),
        ],
    )
    def test_a_loader_that_cannot_work_is_refused_before_anything(self, loader, message):
        with pytest.raises(BatchError, match=message):
            make().fit(loader)

    def test_a_generator_that_gives_nothing(self):
        class Nothing:
            def __iter__(self):
                return iter(())

        with pytest.raises(BatchError, match="epoch 1: the train loader gave no batch"):
            make().fit(Nothing())

    def test_an_empty_batch(self):
        x, y = data().tensors
        with pytest.raises(BatchError, match=r"epoch 1, batch 2 .*float32\[0, 6\].*holds no sample"):
            make().fit([(x, y), (x[:0], y[:0])])

    def test_a_last_batch_of_one(self):
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        message = r"batch 3 .*BatchNorm can't train on \(float32\[1, 6\], int64\[1\]\), .*drop_last=True\) leaves"
        with pytest.raises(BatchError, match=message):
            make(model).fit(DataLoader(data(17), batch_size=8))

    def test_a_loss_that_is_no_scalar(self):
        with pytest.raises(BatchError, match=r'epoch 1, batch 1 .*shape \(50,\), not \(\): reduction="mean"'):
            make(loss=nn.CrossEntropyLoss(reduction="none")).fit([data().tensors])
        with pytest.raises(BatchError, match="the loss is a float, not a tensor"):
            make(loss=lambda output, target: 0.5).fit([data().tensors])

    @pytest.mark.parametrize(("shift", "fix"), [(1, "subtract 1"), (7, "give the last layer 10 outputs")])
    def test_a_label_out_of_range(self, shift, fix):
        x, y = data().tensors
        with pytest.raises(BatchError, match=rf"epoch 1, batch 2 .*labels go from {shift} .*3 outputs .*{fix}"):
            make().fit([(x, y), (x, y + shift)])

    def test_labels_are_looked_at_before_an_accelerator_sees_them(self):
        scores, loss = torch.zeros(2, 3), nn.CrossEntropyLoss(ignore_index=-100)
        check_labels("here", loss, scores, torch.tensor([2, -100]))
        check_labels("here", nn.MSELoss(), scores, torch.tensor([7, 7]))
        with pytest.raises(BatchError, match=r"here: labels go from -1 to 0, .*ignore_index=-1\) leaves -1 out"):
            check_labels("here", loss, scores, torch.tensor([0, -1]))

    def test_a_batch_of_the_wrong_shape(self):
        x, y = data().tensors
        with pytest.raises(BatchError, match=r"batch 2 .*Sequential and the loss can't take \(float32\[50, 5\], int64"):
            make().fit([(x, y), (x[:, :5], y)])

    @pytest.mark.parametrize(
        ("inputs", "target", "loss", "fix"),
        [
            (torch.ones(4, 3, 2, 2).double(), torch.ones(4).long(), nn.CrossEntropyLoss(), r"inputs.float\(\)"),
            (torch.ones(4, 12).byte(), torch.ones(4).long(), nn.CrossEntropyLoss(), r"inputs.float\(\)"),
            (torch.ones(4, 12), torch.ones(4), nn.CrossEntropyLoss(), r"target.long\(\)"),
            (torch.ones(4, 12), torch.ones(4, 1).long(), nn.CrossEntropyLoss(), r"target.squeeze\(1\)"),
            (torch.ones(4, 12), torch.ones(4, 2).long(), nn.BCEWithLogitsLoss(), r"target.float\(\)"),
            (torch.ones(4, 12), torch.ones(4).long().numpy(), nn.CrossEntropyLoss(), r"torch.as_tensor\(array\)"),
        ],
    )
    def test_a_batch_of_another_dtype_says_what_to_write(self, inputs, target, loss, fix):
        body = [nn.Conv2d(3, 3, 1)] if inputs.ndim > 2 else []
        model = nn.Sequential(*body, nn.Flatten(), nn.Linear(12, 2))
        trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), loss, device="cpu", progress=False)
        with pytest.raises(BatchError, match=rf"Sequential and the loss can't take .*\. .*: {fix}\.$"):
            trainer.fit([(inputs, target)])
        if isinstance(target, torch.Tensor):
            mended = target.squeeze(1) if "squeeze" in fix else target.float() if target.ndim > 1 else target.long()
            trainer.fit([(inputs.float(), mended)])

    def test_an_error_of_the_model_itself_stays_what_it_is(self):
        class OwnError(ValueError):
            pass

        def loss(output, target):
            raise OwnError("mine")

        with pytest.raises(OwnError, match="mine"):
            make(loss=loss).fit([data().tensors])

    def test_everything_frozen(self):
        model = network()
        trainer = make(model)
        model.requires_grad_(False)
        with pytest.raises(TrainingError, match=r"backward failed.*Every parameter is frozen: modsurg.unfreeze"):
            trainer.fit([data().tensors])

    def test_a_model_without_values(self):
        with torch.device("meta"):
            model = nn.Linear(2, 2)
        with pytest.raises(DeviceError, match=r"weight and 1 more of the model has no values \(meta\): load_state"):
            make(model)

    def test_parameters_in_no_optimizer_are_named(self):
        model = network()
        trainer = make(model, optimizer=torch.optim.SGD(model[0].parameters(), lr=0.1))
        with pytest.warns(ModsurgWarning, match=r"3.weight, 3.bias are in no optimizer .*modsurg.sync"):
            trainer.fit([data().tensors])

    def test_an_optimizer_of_another_model(self):
        trainer = make(optimizer=torch.optim.SGD(network().parameters(), lr=0.1))
        with (
            pytest.raises(TrainingError, match=r"holds no parameter of this model: make it from model.parameters\(\)"),
            pytest.warns(ModsurgWarning, match="in no optimizer"),
        ):
            trainer.fit([data().tensors])

    def test_a_schedule_that_is_too_short(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=7)
        trainer = make(model, optimizer=optimizer, scheduler=scheduler)
        with pytest.raises(TrainingError, match=r"OneCycleLR has 7 steps, 0 of them done, and 10 .*total_steps=10"):
            trainer.fit(DataLoader(data(), batch_size=10), epochs=2)

    def test_numbers_that_make_no_sense(self):
        with pytest.raises(TrainingError, match="accumulate=0"):
            make(accumulate=0)
        with pytest.raises(TrainingError, match="epochs=0: train for at least one epoch"):
            make().fit([data().tensors], epochs=0)
        with pytest.raises(TrainingError, match="best='val_loss' is not measured; there are loss"):
            make(best="val_loss").fit([data().tensors])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"metrics": "accuracy"}, r'metric accuracy is a str: metrics=\{"accuracy": lambda output, target: '),
            ({"metrics": {"accuracy": "accuracy"}}, "metric accuracy is a str"),
            ({"metrics": [nn.L1Loss]}, "metric l1loss is the class L1Loss, not made yet"),
            ({"scheduler": torch.optim.lr_scheduler.StepLR}, "scheduler is the class StepLR, not made yet"),
            ({"strategy": "dp"}, 'strategy=\'dp\': one of "ddp", "fsdp"'),
            ({"seed": "a"}, "seed='a': a whole number, seed=0"),
            ({"clip_norm": "1"}, "clip_norm='1': a norm is greater than 0"),
        ],
    )
    def test_options_of_the_wrong_kind(self, options, message):
        with pytest.raises(TrainingError, match=message):
            make(**options)

    def test_a_mapping_with_parts_that_model_or_loss_do_not_know(self):
        class Model(nn.Linear):
            def forward(self, x):
                return super().forward(x)

        for name, message in (
            ("x", r"whole batch: loss=lambda output, batch"),
            (
                "image",
                r"batch 1 \(step 1\): forward of Model takes x, and the batch has image, y: call them alike; .*"
                r'collate_fn=lambda samples: .*collate\(\[\(s\["image"\], s\["y"\]\) for s in samples\]\)\)\.$',
            ),
        ):
            with pytest.raises(BatchError, match=message):
                make(Model(6, 3)).fit([{name: torch.ones(2, 6), "y": torch.tensor([0, 1])}])

    def test_a_metric_of_the_wrong_shape(self):
        with pytest.raises(TrainingError, match=r"metric wrong gave shape \(3,\)"):
            make(metrics={"wrong": lambda output, target: output[0]}).fit([data().tensors])

    def test_a_metric_that_takes_a_dict_for_its_target(self):
        class Model(nn.Linear):
            def forward(self, x):
                return super().forward(x)

        x, y = data().tensors
        batches = [{"x": x, "label": y}]
        metrics = {
            "equal": (lambda output, target: output.argmax(1) == target, "gave False, one word for the whole batch"),
            "cut": (lambda output, target: target[:, None], r"can't take output float32\[50, 3\] and target dict\(x="),
            "shape": (lambda output, target: target.shape, "can't take output .* AttributeError"),
        }
        for name, (metric, message) in metrics.items():
            trainer = make(
                Model(6, 3), loss=lambda o, b: nn.functional.cross_entropy(o, b["label"]), metrics={name: metric}
            )
            whole = (
                r'\. A metric gets the whole batch: metrics=\{"accuracy": lambda output, batch: output.argmax\(1\) =='
            )
            with pytest.raises(BatchError, match=rf"epoch 1, batch 1 \(step 1\): metric {name} {message}.*{whole}"):
                trainer.fit(batches)
            with pytest.raises(BatchError, match=f"evaluation, batch 1: metric {name} {message}"):
                trainer.evaluate(batches)
        with pytest.raises(BatchError, match=r"gave True, one word .* Compare tensors, or return float"):
            make(metrics={"yes": lambda output, target: True}).fit([data().tensors])

    def test_a_word_is_a_value_for_one_sample(self):
        x, y = data().tensors
        one = make(metrics={"right": lambda output, target: output.argmax().item() == target.item()})
        history = one.fit([(x[:1], y[:1]), (x[1:2], y[1:2])])
        assert history[0]["right"] in (0, 0.5, 1)

    def test_a_metric_that_is_no_number(self):
        with pytest.raises(TrainingError, match="metric wrong gave a NoneType: give one number"):
            make(metrics={"wrong": lambda output, target: None}).fit([data().tensors])

    def test_a_body_that_makes_no_step(self):
        with pytest.raises(TrainingError, match=r"epoch 1: no loss: epoch.step\(loss, output, target\) gives it"):
            for epoch in make().epochs([data().tensors]):
                list(epoch)

    def test_a_step_without_a_batch_and_a_second_pass(self):
        trainer = make()
        batches = [(torch.ones(2, 6), torch.tensor([0, 1]))]
        for epoch in trainer.epochs(batches):
            with pytest.raises(TrainingError, match="gave no batch for this step: for inputs, target in epoch: "):
                epoch.step(trainer.loss(trainer.model(batches[0][0]), batches[0][1]))
            for x, y in epoch:
                epoch.step(trainer.loss(trainer.model(x), y))
            with pytest.raises(TrainingError, match="epoch 1 is over: go through its batches once"):
                list(epoch)
        assert trainer.step == 1

    def test_evaluation_and_prediction_name_their_batch(self):
        x, y = data().tensors
        with pytest.raises(
            BatchError, match=r"evaluation, batch 2: labels go from 9 .*3 outputs are the classes 0 to 2"
        ):
            make().evaluate([(x, y), (x, y + 9)])
        with pytest.raises(BatchError, match=r"evaluation, batch 1: the loss has shape \(50,\)"):
            make(loss=nn.CrossEntropyLoss(reduction="none")).evaluate([(x, y)])
        with pytest.raises(BatchError, match=r"prediction, batch 2: Sequential .*can't take \(float32\[50, 2\], int64"):
            make().predict([(x, y), (x[:, :2], y)])
        with pytest.raises(BatchError, match="a dataset, which gives no batches"):
            make().predict(data())


class TestNonFinite:
    def test_the_step_is_named_and_the_weights_before_it_stay(self):
        x, y = data().tensors
        good, bad = (x, y), (x * math.nan, y)
        mine, plain = network(), network()
        torch.manual_seed(0)
        with pytest.raises(NonFiniteError, match=r"epoch 1, batch 3 \(step 3\): the loss is nan; .*after step 2"):
            make(mine).fit([good, good, bad])
        torch.manual_seed(0)
        make(plain).fit([good, good])
        assert same(mine, plain)

    def test_on_a_device_the_flag_is_read_later_and_names_the_step(self, monkeypatch, tmp_path):
        class OnDevice(LossCheck):
            def __init__(self, device):
                super().__init__(device)
                self.immediate = False

        x, y = data().tensors
        monkeypatch.setattr("modsurg.training.loop.LossCheck", OnDevice)
        trainer = make(checkpoint_dir=tmp_path)
        trainer.fit([(x, y)])
        kept = (tmp_path / "last.safetensors").read_bytes()
        with pytest.raises(
            NonFiniteError, match="step 3: the loss is not finite; .*the last checkpoint is from before"
        ):
            trainer.fit([(x, y), (x * math.inf, y), (x, y)])
        assert (tmp_path / "last.safetensors").read_bytes() == kept

    def test_no_tensor_is_read_while_nothing_is_shown(self, monkeypatch):
        read = []
        for name in ("item", "tolist", "__float__", "__bool__"):
            method = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, lambda self, m=method, n=name: read.append(n) or m(self))
        model = network()
        trainer = make(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), metrics=[accuracy], clip_norm=1.0)
        trainer.display.next_look = math.inf
        at_last = []
        trainer.fit([data().tensors] * 20, on_step=lambda trainer: at_last.append(list(read)))
        assert at_last == [[]] * 20

    def test_weights_that_a_gradient_spoilt_are_not_kept(self, tmp_path):
        model = nn.Linear(6, 3)
        trainer = make(model, checkpoint_dir=tmp_path, loss=lambda o, t: (o * 0).sum().sqrt() + o.sum() * 0)
        with pytest.raises(NonFiniteError, match="after step 1 the weights are not finite: weight, by a gradient"):
            trainer.fit([data().tensors])
        assert not list(tmp_path.iterdir())


class TestMemory:
    def test_what_to_do_is_said(self):
        def full(output, target):
            raise torch.OutOfMemoryError("CUDA out of memory")

        fix = r"batch 1.*: out of memory in \(float32\[50, 6\], int64\[50\]\). Try: a smaller batch_size"
        with pytest.raises(TrainingError, match=rf"{fix}, with accumulate=2 for the same step\. \(CUDA"):
            make(loss=full).fit([data().tensors])
        with pytest.raises(TrainingError, match=rf"evaluation, {fix}\. \(CUDA"):
            make(loss=full).evaluate([data().tensors])


class TestPredict:
    def test_another_model_may_be_any(self):
        x, y = data().tensors
        trainer, other = make(), torch.compile(nn.Linear(6, 3), backend="eager")
        assert trainer.predict(x, other).shape == (50, 3)
        assert trainer.evaluate([(x, y)], other) != trainer.evaluate([(x, y)])

    def test_outputs_of_unlike_lengths_stay_a_list(self):
        outputs = make(nn.PReLU()).predict([torch.ones(2, 3), torch.ones(2, 5)])
        assert [tuple(output.shape) for output in outputs] == [(2, 3), (2, 5)]

    def test_joins_the_batches_and_leaves_the_mode(self):
        model = network()
        trainer = make(model)
        expected = model.eval()(data().tensors[0])
        model.train()
        assert torch.equal(trainer.predict(DataLoader(data(), batch_size=50)), expected)
        assert torch.equal(trainer.predict(data().tensors[0]), expected)
        assert model.training
        assert model[2].training

    def test_a_pair_is_never_cut_in_silence(self):
        class Masked(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 2)

            def forward(self, x, mask=None):
                return self.layer(x if mask is None else x * mask)

        class NeedsMask(Masked):
            def forward(self, x, mask):
                return super().forward(x, mask)

        class Free(Masked):
            def forward(self, *tensors):
                return super().forward(*tensors)

        x, mask = torch.randn(8, 4), torch.zeros(8, 4)
        needs = NeedsMask()
        trainer = make(needs, loss=nn.MSELoss())
        assert torch.equal(trainer.predict([(x, mask)]), needs(x, mask))
        assert torch.equal(trainer.predict([((x, mask), torch.zeros(8))]), needs(x, mask))
        for kind in (Masked, Free):
            model = kind()
            trainer = make(model, loss=nn.MSELoss())
            with pytest.raises(BatchError, match=r"prediction, batch 1: .*may be a target or an input.*\(\(a, b\),\)"):
                trainer.predict([[x, mask]])
            assert torch.equal(trainer.predict([((x, mask),)]), model(x, mask))
            assert torch.equal(trainer.predict([(x,)]), model(x))
            trainer.evaluate([(x, torch.zeros(8, 2))])  # so that the last of a pair is known to be a target
            assert torch.equal(trainer.predict([(x, mask)]), model(x))
        model = Masked()
        assert torch.equal(make(model).predict([{"x": x, "mask": mask}]), model(x, mask))
        three = NeedsMask()
        assert torch.equal(make(three).predict([(x, mask, torch.zeros(8))]), three(x, mask))

    def test_an_input_that_was_taken_for_a_target_is_named(self):
        with pytest.raises(BatchError, match=r"Of a tuple the last is the target; .*: \(\(a, b\), target\)"):
            make(nn.Bilinear(4, 4, 2)).fit([(torch.ones(2, 4), torch.ones(2, 4))])


class TestLossErrors:
    @pytest.mark.parametrize("error", [KeyError("loss"), AttributeError("no items"), IndexError("5"), AssertionError()])
    def test_a_loss_that_fails_names_the_batch(self, error):
        def loss(output, target):
            raise error

        named = rf"batch 1.*: Sequential and the loss can't take \(float32\[50, 6\], .*{type(error).__name__}"
        trainer = make(loss=loss)
        for call in (trainer.fit, trainer.evaluate):
            with pytest.raises(BatchError, match=named):
                call([data().tensors])

    def test_a_model_that_gives_something_else_in_evaluation(self):
        class Detector(nn.Linear):
            def forward(self, x):
                output = super().forward(x)
                return {"a": output.mean()} if self.training else [output]

        trainer = make(Detector(4, 2), loss=lambda output, batch: sum(output.values()))
        batches = [{"x": torch.ones(4, 4), "y": torch.zeros(4)}]
        made = r"of which Detector makes \(float32\[4, 2\]\): AttributeError"
        with pytest.raises(BatchError, match=rf"evaluation, batch 1: .*{made}"):
            trainer.fit(batches, batches)


def test_the_process_is_left_as_it_was(monkeypatch):
    def state():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        modes = torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype()
        return handlers, modes, gc.isenabled(), gc.get_freeze_count(), gc.get_threshold()

    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("asks the C library for something"))
    before = state()
    make().fit(DataLoader(data(), batch_size=8), DataLoader(data(), batch_size=8))
    assert state() == before
