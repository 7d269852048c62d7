"""How the optimizers of a transaction follow it: what they held before, and where that went."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from modsurg.surgery.journal import Journal
from modsurg.surgery.optimizers import follow, gather
from modsurg.surgery.remapping import Positions
from modsurg.surgery.steps import Step
from modsurg.tree.walk import walk


class Following:
    """Optimizers that follow one transaction, checked before it begins.

    Raises:
        OptimizerError: An optimizer or scheduler can't follow.
    """

    def __init__(
        self,
        root: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        scheduler: LRScheduler | Sequence[LRScheduler] | None,
    ) -> None:
        self._root = root
        self._optimizers = gather(optimizer, scheduler)
        self._named = list(_named(root)) if self._optimizers else []
        self._held = self._numbers()

    def follow(self, steps: Sequence[Step], journal: Journal) -> list[str]:
        """Let every optimizer follow what the steps did; see `optimizers.follow`.

        Returns:
            Notes for the report.
        """
        if not self._optimizers:
            return []
        replaced = [each for step in steps for each in step.replaced]
        resized = [each for step in steps for each in step.resized]
        return follow(self._optimizers, self._named, list(_named(self._root)), replaced, resized, journal)

    def positions(self) -> list[Positions]:
        """The parameters of each optimizer before and now."""
        return [Positions(before, after) for before, after in zip(self._held, self._numbers(), strict=True)]

    def _numbers(self) -> list[list[list[int]]]:
        return [[[id(p) for p in group["params"]] for group in each.param_groups] for each in self._optimizers]


def _named(root: nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for path, module in walk(root).modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{path}.{name}" if path else name), parameter
