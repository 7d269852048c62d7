"""The forward pass, and a model measured and used without changing it."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from modsurg.errors import BatchError
from modsurg.training.batches import forward, move, predict_batch
from modsurg.training.distributed_data import split_validation
from modsurg.training.error_messages import EXPECTED, check_labels, check_scalar, explain_forward
from modsurg.training.loader_checks import check_loader
from modsurg.training.metrics import Meter, Metric
from modsurg.training.samples import Samples, count_samples
from modsurg.training.state import Runtime, TrainingState


def compute_loss(
    state: TrainingState, runtime: Runtime, model: Any, batch: Any, where: object, *, first: bool
) -> tuple[torch.Tensor, Any, Any]:
    """Give loss, output and target of a batch on the device, in the run's precision; `where` names it in messages.

    The class numbers of a first batch are looked at before an accelerator does, which would go down over them.

    Raises:
        BatchError: Model or loss can't take the batch.
    """
    output = None
    try:
        with runtime.autocast():
            output, target = forward(model, runtime.signature.names, batch)
            if first and runtime.device.type != "cpu":
                check_labels(where, state.loss, output, target)
            loss = state.loss(output, target)
    except EXPECTED as error:
        raise explain_forward(error, state, runtime, where, batch, output) from error
    if first and isinstance(batch, tuple | list) and len(batch) > 1:
        runtime.has_targets = True
    return loss, output, target


def evaluate(
    state: TrainingState,
    runtime: Runtime,
    loader: Iterable[Any],
    model: nn.Module,
    metrics: Mapping[str, Metric],
    samples: Samples | None,
) -> dict[str, float]:
    """Give the means of the loss and the metrics over a loader; see `Trainer.evaluate`."""
    check_loader(loader, "loader")
    meter = Meter(metrics)
    split = runtime.world > 1 and not runtime.sharded
    runner, number = runtime.runner_of(model, state.model), 0
    with evaluating(model):
        for number, given in enumerate(split_validation(loader) if split else loader, 1):
            batch = move(given, runtime.device)
            where = f"evaluation, batch {number}"
            loss, output, target = compute_loss(state, runtime, runner, batch, where, first=number == 1)
            check_scalar(loss, where)
            meter.add(loss, count_samples(batch, output, samples, where), output, target, where)
            meter.keep()
    if number == 0 and not split:
        raise BatchError("evaluation: the loader gave no batch; it must give at least one.")
    return meter.results(runtime.device)


def predict(state: TrainingState, runtime: Runtime, loader: Any, model: nn.Module) -> Any:
    """Give the outputs for a loader; see `Trainer.predict`."""
    batches = [loader] if isinstance(loader, torch.Tensor) else loader
    check_loader(batches, "loader", again=False)
    runner, outputs = runtime.runner_of(model, state.model), []
    with evaluating(model), runtime.autocast():
        for number, given in enumerate(batches, 1):
            batch, where = move(given, runtime.device), f"prediction, batch {number}"
            try:
                output = predict_batch(runner, runtime.signature, batch, has_targets=runtime.has_targets, where=where)
            except EXPECTED as error:
                raise explain_forward(error, state, runtime, where, batch) from error
            outputs.append(move(output, torch.device("cpu")))
    shapes = {output.shape[1:] if isinstance(output, torch.Tensor) and output.ndim else None for output in outputs}
    return torch.cat(outputs) if len(shapes) == 1 and None not in shapes else outputs


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode and without gradients; afterwards each module has the mode that it had."""
    mode, modes = model.training, [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(mode)
        for module, training in modes:
            module.training = training
