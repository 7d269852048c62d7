"""Means of the loss and the metrics over samples."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch

from modsurg.errors import BatchError, TrainingError, warn
from modsurg.training.batches import describe, fields
from modsurg.training.distributed import gathered, is_peer_lost, summed
from modsurg.training.error_messages import EXPECTED, out_of_memory

_UNREAD = 4096


@runtime_checkable
class MetricObject(Protocol):
    """A metric with a state, as those of torchmetrics and torcheval are."""

    def update(self, output: Any, target: Any, /) -> object:
        """Take in a batch."""

    def compute(self) -> Any:
        """Give the value, or a dict of values, over all batches since `reset`."""

    def reset(self) -> object:
        """Forget all batches."""


Metric = Callable[[Any, Any], Any] | MetricObject


def is_object(metric: object) -> TypeGuard[MetricObject]:
    """Whether a metric has `update`, `compute` and `reset`.

    Example:
        >>> is_object(torch.nn.L1Loss())
        False
    """
    return isinstance(metric, MetricObject) and not isinstance(metric, type)


@dataclass
class _Batch:
    """A batch whose step is not made yet."""

    values: list[tuple[str, torch.Tensor]]
    samples: float
    output: Any
    target: Any
    where: str | object


class Meter:
    """Sums of the loss and the metrics over samples.

    The values of a window count when `keep` says that its step was made. They stay on the device, unread, until
    somebody asks for a mean or a few thousand have gathered. They are added one by one in double precision, so that it
    does not matter to the sum when that was.

    Attributes:
        sums: Of each value times its samples, as far as they are read.
        seen: How many samples gave each value.
        objects: The metrics with a state of their own, which are reset here.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.functions: dict[str, Callable[[Any, Any], Any]] = {}
        self.objects: dict[str, MetricObject] = {}
        for name, metric in metrics.items():
            if isinstance(metric, MetricObject):
                self.objects[name] = metric
            else:
                self.functions[name] = metric
        self.sums = dict.fromkeys(("loss", *self.functions), 0.0)
        self.seen: dict[str, float] = dict.fromkeys(self.sums, 0)
        self._unread: dict[str, list[tuple[torch.Tensor, float]]] = {name: [] for name in self.sums}
        self._waiting: list[_Batch] = []
        self._updated = False
        for metric in self.objects.values():
            metric.reset()

    @property
    def samples(self) -> float:
        """How many gave a loss."""
        return self.seen["loss"]

    def add(self, loss: torch.Tensor, samples: float, output: Any, target: Any, where: object) -> None:
        """Add a batch: its mean loss, and each metric of `(output, target)` if there is an output.

        Raises:
            BatchError: A metric can't take the batch `where`, or gives something else than a number.
        """
        batch = _Batch([("loss", loss.detach())], samples, None, None, where)
        if output is not None and (self.functions or self.objects):
            output = output.detach() if isinstance(output, torch.Tensor) else output
            lengths = {
                samples,
                *(len(part) for part in (output, target) if isinstance(part, torch.Tensor) and part.ndim),
            }
            with torch.no_grad():
                for name, metric in self.functions.items():
                    value = _call_metric(name, metric, output, target, where)
                    batch.values.append((name, _mean_value(value, samples, lengths, target, f"{where}: metric {name}")))
            if self.objects:
                batch.output, batch.target, batch.where = output, target, str(where)
        self._waiting.append(batch)

    def keep(self) -> None:
        """Count the batches that were added."""
        for batch in self._waiting:
            for name, value in batch.values:
                unread = self._unread[name]
                unread.append((value, batch.samples))
                self.seen[name] += batch.samples
                if len(unread) == _UNREAD:
                    self.read()
            if batch.output is not None:
                self._updated = True
                with torch.no_grad():
                    for name, metric in self.objects.items():
                        _call_metric(name, metric.update, batch.output, batch.target, batch.where)
        self._waiting.clear()

    def drop(self) -> None:
        """Forget the batches that were added since `keep`."""
        self._waiting.clear()

    def read(self) -> None:
        """Bring `sums` up to date. This waits for the device."""
        for name, unread in self._unread.items():
            if unread:
                together = len({value.device for value, _ in unread}) == 1
                values = torch.stack([value if together else value.cpu() for value, _ in unread]).tolist()
                for value, (_, samples) in zip(values, unread, strict=True):
                    self.sums[name] += value * samples if samples else 0.0  # a mean over nothing is NaN
                unread.clear()

    def means(self, everywhere: torch.device | None = None) -> dict[str, float]:
        """Give the mean of the loss and of each metric function. This waits for the device.

        Args:
            everywhere: The device of this process, for the means over all processes.
        """
        self.read()
        sums, seen = self.sums, self.seen
        if everywhere is not None:
            sums, seen = (
                summed(sums, everywhere),
                summed({name: float(value) for name, value in seen.items()}, everywhere),
            )
        return {name: total / seen[name] for name, total in sums.items() if seen[name]}

    def results(self, everywhere: torch.device) -> dict[str, float]:
        """Give every value over all processes: the means, and what the metrics with a state compute.

        Raises:
            TrainingError: A metric computes something else than numbers, or two of one name.
        """
        values = self.means(everywhere)
        if self.objects and any(gathered(self._updated)):
            for name, metric in self.objects.items():
                for column, value in _computed_values(name, metric).items():
                    if column in values:
                        text = f"metric {name}: compute() gave a second value {column!r}: each needs a name of its own"
                        raise TrainingError(f"{text}. Try: metrics={{...}} under other names, or another prefix.")
                    values[column] = _common_value(name, value)
        return values

    def state(self) -> dict[str, Any]:
        """Give everything that was kept, as a file can hold it: sums, samples, and the states of the objects."""
        self.read()
        objects = {name: _object_state(metric) for name, metric in self.objects.items()} if self._updated else {}
        return {"sums": self.sums, "seen": self.seen, "objects": objects}

    def load(self, state: Mapping[str, Any], where: object) -> None:
        """Go on from what `state` gave."""
        self.sums, self.seen = state["sums"], state["seen"]
        for name, metric in self.objects.items():
            kept = state.get("objects", {}).get(name)
            if kept is not None:
                self._updated = True
                _load_object_state(metric, kept)
            elif self.seen["loss"]:
                warn(f"{where}: the state of metric {name} is not in the file: its value is of the batches to come.")


def metric_columns(metrics: Mapping[str, Metric]) -> tuple[list[str], bool]:
    """Name the columns that metrics give, and say whether there may be others: a metric object may give a dict."""
    names: list[str] = []
    for name, metric in metrics.items():
        keys = getattr(metric, "keys", None) if is_object(metric) else None
        names += map(str, keys()) if callable(keys) else [name]
    return names, any(is_object(metric) for metric in metrics.values())


def _call_metric(name: str, function: Callable[[Any, Any], Any], output: Any, target: Any, where: object) -> Any:
    try:
        return function(output, target)
    except EXPECTED as error:
        if is_peer_lost(error) or out_of_memory(error):
            raise
        kinds = f"output {describe(output)} and target {describe(target)}"
        raise BatchError(f"{where}: metric {name} can't take {kinds}: {error!r:.200}.{_whole_batch(target)}") from error


def _whole_batch(target: Any) -> str:
    """What to say of a target that is a batch with named parts."""
    if fields(target) is None:
        return ""
    fix = 'metrics={"accuracy": lambda output, batch: output.argmax(1) == batch["label"]}'
    return f" A metric gets the whole batch: {fix}."


def _mean_value(value: Any, samples: float, lengths: set[float], target: Any, where: str) -> torch.Tensor:
    if isinstance(value, bool) and samples > 1:
        fix = _whole_batch(target) or " Compare tensors, or return float(...)."
        raise BatchError(f"{where} gave {value}, one word for the whole batch.{fix}")
    try:
        numbers = torch.as_tensor(value, dtype=None if isinstance(value, torch.Tensor) else torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(value).__name__
        raise BatchError(f"{where} gave a {kind}: give one number, or one for each sample.") from error
    if numbers.ndim == 0:
        return numbers
    if numbers.shape[0] not in lengths or numbers.numel() != numbers.shape[0]:
        shape = tuple(numbers.shape)
        raise BatchError(f"{where} gave shape {shape}: give one number, or one for each sample.")
    return numbers.double().mean() if numbers.device.type != "mps" else numbers.float().mean()


def _computed_values(name: str, metric: MetricObject) -> dict[str, float]:
    value = metric.compute()
    values = {str(key): each for key, each in value.items()} if isinstance(value, Mapping) else {name: value}
    numbers = {}
    for column, each in values.items():
        try:
            numbers[column] = float(each)
        except (TypeError, ValueError, RuntimeError):
            given = describe(each) if isinstance(each, torch.Tensor) else f"a {type(each).__name__}"
            text = f"metric {name}: compute() gave {given}"
            raise TrainingError(f"{text}{'' if column == name else f' for {column}'}: it must be a number.") from None
    return numbers


def _common_value(name: str, value: float) -> float:
    values = gathered(value)
    if any(other != value and other == other for other in values):
        text = f"metric {name} computes another value in each process"
        warn(f"{text}, shown is their mean; its compute() has to join their states, as those of torchmetrics do.")
    return float(sum(values) / len(values))


def _object_state(metric: Any) -> Any:
    """What a file can hold of a metric's state; None if it can't."""
    if callable(getattr(metric, "persistent", None)):  # torchmetrics keeps a state only if it is told to
        metric = copy.deepcopy(metric)
        metric.persistent(True)
        if callable(getattr(metric, "values", None)):
            list(metric.values())  # brings the members of a collection up to date
    state = metric.state_dict() if hasattr(metric, "state_dict") else vars(metric)
    return dict(state) if _is_plain(dict(state)) else None


def _load_object_state(metric: Any, state: Any) -> None:
    if hasattr(metric, "load_state_dict"):
        metric.load_state_dict(state)
    else:
        vars(metric).update(state)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    return value is None or isinstance(value, torch.Tensor | str | bool | int | float)
