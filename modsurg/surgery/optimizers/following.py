"""How the optimizers of a transaction follow it: what they held before, and where that went."""

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from modsurg.surgery.changes import Change, Frozen
from modsurg.surgery.journal import Journal
from modsurg.surgery.key_mapping import Positions
from modsurg.surgery.optimizers.sync import Moved, follow, gather, named_parameters
from modsurg.surgery.resize.resize import Resized


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

    def follow(self, changes: Sequence[Change], journal: Journal) -> list[str]:
        """Let every optimizer follow the changes; see `sync.follow`.

        Returns:
            Notes for the report.
        """
        if not self._optimizers:
            return []
        frozen = [change.detail for change in changes if isinstance(change.detail, Frozen) and change.detail.parameters]
        moved = Moved(
            before=self._named,
            after=named_parameters(self._root),
            replaced=[
                (change.old, change.new, change.paths[0])
                for change in changes
                if change.kind in ("replace", "wrap") and change.old is not None and change.new is not None
            ],
            resized=[change.detail for change in changes if isinstance(change.detail, Resized)],
            thawed={id(parameter) for each in frozen if each.trainable for parameter in each.parameters},
            restart=bool(frozen),
        )
        return [str(each) for each in follow(self._optimizers, moved, journal) if each.changed]

    def positions(self) -> list[Positions]:
        """The parameters of each optimizer before and now."""
        return [Positions(before, after) for before, after in zip(self._held, self._numbers(), strict=True)]

    def _numbers(self) -> list[list[list[int]]]:
        return [[[id(p) for p in group["params"]] for group in each.param_groups] for each in self._optimizers]
