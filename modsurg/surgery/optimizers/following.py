"""How the optimizers of a transaction follow it: what they held before, and where that went."""

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from modsurg.surgery.changes import Step
from modsurg.surgery.journal import Journal
from modsurg.surgery.key_mapping import Positions
from modsurg.surgery.optimizers.sync import Moved, follow, gather, named_parameters


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
        self._named = named_parameters(root) if self._optimizers else []
        self._held = self._numbers()

    def follow(self, steps: Sequence[Step], journal: Journal) -> list[str]:
        """Let every optimizer follow what the steps did; see `optimizers.follow`.

        Returns:
            Notes for the report.
        """
        if not self._optimizers:
            return []
        moved = Moved(
            before=self._named,
            after=named_parameters(self._root),
            replaced=[each for step in steps for each in step.replaced],
            resized=[each for step in steps for each in step.resized],
            thawed=set().union(*(step.thawed for step in steps)),
            restart=any(step.frozen for step in steps),
        )
        return [str(each) for each in follow(self._optimizers, moved, journal) if each.changed]

    def positions(self) -> list[Positions]:
        """The parameters of each optimizer before and now."""
        return [Positions(before, after) for before, after in zip(self._held, self._numbers(), strict=True)]

    def _numbers(self) -> list[list[list[int]]]:
        return [[[id(p) for p in group["params"]] for group in each.param_groups] for each in self._optimizers]
