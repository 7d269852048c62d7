"""A model measured and used, without changing it."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modsurg.checkpoints.rng import random_states, set_random_states
from modsurg.errors import BatchError
from modsurg.training.batches import fields, move, part, predict_batch
from modsurg.training.data import generators
from modsurg.training.distributed import share_of
from modsurg.training.error_messages import EXPECTED, check_scalar, explain, measured
from modsurg.training.logs import Board
from modsurg.training.metrics import Meter, Metric, is_object
from modsurg.training.samples import count_samples
from modsurg.training.validation import check_loader

if TYPE_CHECKING:
    from modsurg.training.trainer import Trainer


def evaluate(trainer: "Trainer", loader: Iterable[Any], model: nn.Module) -> dict[str, float]:
    """See `Trainer.evaluate`."""
    check_loader(loader, "loader")
    meter = Meter(_metrics(trainer))
    dealt = trainer.world > 1 and not trainer.sharded
    runner = _runner(trainer, model)
    with evaluating(model):
        for number, taken in enumerate(share_of(loader) if dealt else loader, 1):
            batch = move(taken, trainer.place)
            where = f"evaluation, batch {number}"
            loss, output, target = measured(trainer, runner, batch, where, look=number == 1)
            check_scalar(loss, where)
            try:
                weight = count_samples(batch, output, trainer.samples)
            except BatchError as error:
                raise BatchError(f"{where}: {error}") from error.__cause__
            meter.add(loss, weight, output, target, where)
            meter.keep()
    if meter.samples == 0 and not dealt:
        raise BatchError("evaluation: the loader gave no batch; it must give at least one.")
    return meter.results(trainer.place)


def predict(trainer: "Trainer", loader: Any, model: nn.Module) -> Any:
    """See `Trainer.predict`."""
    batches = [loader] if isinstance(loader, torch.Tensor) else loader
    check_loader(batches, "loader", again=False)
    outputs = []
    with evaluating(model), trainer.autocast:
        for number, taken in enumerate(batches, 1):
            batch = move(taken, trainer.place)
            try:
                runner = _runner(trainer, model)
                output = predict_batch(runner, trainer.signature, batch, has_targets=trainer.has_targets)
            except BatchError as error:
                raise BatchError(f"prediction, batch {number}: {error}") from None
            except EXPECTED as error:
                raise explain(error, trainer, f"prediction, batch {number}", batch) from error
            outputs.append(move(output, torch.device("cpu")))
    shapes = {output.shape[1:] if isinstance(output, torch.Tensor) and output.ndim else None for output in outputs}
    return torch.cat(outputs) if len(shapes) == 1 and None not in shapes else outputs


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In the block: evaluation mode and no gradients. Afterwards each module has the mode that it had."""
    mode, modes = model.training, [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(mode)
        for module, training in modes:
            module.training = training


def draw(trainer: "Trainer", board: Board, loader: Iterable[Any]) -> None:
    """Show a batch of pictures with predictions on TensorBoard, and after the first epoch the graph.

    The run does not feel it: nothing of the model changes, the random states are as they were, and a loader that keeps
    a position of its own is left alone.
    """
    if hasattr(loader, "state_dict"):
        return
    states, own = random_states(), [(generator, generator.get_state()) for generator in generators(loader)]
    batch = next(iter(loader), None)
    set_random_states(states)
    for generator, state in own:
        generator.set_state(state)
    pair = _pair(trainer, batch)
    if pair is None:
        return
    batch = move(part(pair, 16), trainer.place)
    if trainer.epoch == 1:
        board.graph(trainer.model, batch[0][:1])
    with evaluating(trainer.model), trainer.autocast:
        output = trainer.model(batch[0])
    names = getattr(getattr(loader, "dataset", None), "classes", ())
    board.pictures(batch[0], output, batch[1], names, trainer.step)


def _pair(trainer: "Trainer", batch: Any) -> tuple[torch.Tensor, Any] | None:
    """The one tensor that the model gets and its target; of named parts, the one that can be class numbers."""
    if isinstance(batch, tuple | list):
        return (batch[0], batch[1]) if len(batch) == 2 and isinstance(batch[0], torch.Tensor) else None
    named = {name: value for name, value in (fields(batch) or {}).items() if isinstance(value, torch.Tensor)}
    inputs = [value for name, value in named.items() if trainer.signature.names == frozenset({name})]
    targets = [value for value in named.values() if value.ndim == 1 and not value.is_floating_point()]
    return (inputs[0], targets[0]) if len(inputs) == len(targets) == 1 else None


def _metrics(trainer: "Trainer") -> dict[str, Metric]:
    """The trainer's metrics; while an epoch is under way, copies of those whose state belongs to it."""
    epoch = trainer.running.epoch if trainer.running is not None else None
    if epoch is None or epoch.closed:
        return trainer.named_metrics
    return {name: copy.deepcopy(one) if is_object(one) else one for name, one in trainer.named_metrics.items()}


def _runner(trainer: "Trainer", model: nn.Module) -> Callable[..., Any]:
    return trainer.runner if model is trainer.model and trainer.world == 1 else model
