"""A transaction: verbs that take effect at once, and all go back if anything fails before the end of the block."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from modsurg.errors import EditError, counted, warn
from modsurg.surgery.changes import Change, Step
from modsurg.surgery.journal import Journal
from modsurg.surgery.key_mapping import Remapping
from modsurg.surgery.ops.checks import refuse_offloaded, refuse_wrapped
from modsurg.surgery.ops.children import outdated
from modsurg.surgery.ops.factory import New, caller, maker
from modsurg.surgery.ops.freeze import apply_frozen, plan_freeze, plan_unfreeze
from modsurg.surgery.ops.placement import add_child, insert_sites, remove_sites, rename_child, replace_sites
from modsurg.surgery.optimizers.following import Following
from modsurg.surgery.preflight import Example, preflight
from modsurg.surgery.recipes.recipe import Recorder
from modsurg.surgery.report import Report
from modsurg.surgery.resize.resize import Fill, resize_modules
from modsurg.tree.collector import pause_collector
from modsurg.tree.selection import Where, resolve
from modsurg.tree.walk import Tree, walk
from modsurg.tree.wrappers import unwrap


class Edit:
    """What `edit(model)` gives to its block: the verbs, `plan()`, and after the block `report`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
        example: Example | None = None,
    ) -> None:
        self._root = unwrap(model)
        self._example = example
        self._journal = Journal()
        self._steps: list[Step] = []
        self._said: list[str] = []
        self._recorder = Recorder()
        self._before: Tree | None = None
        self._report: Report | None = None
        self._following = Following(self._root, optimizer, scheduler)
        self._state = "new"
        self._outer: Edit | None = None

    def __enter__(self) -> "Edit":
        if self._state != "new":
            raise EditError(_OVER)
        self._outer = next((each for each in reversed(_still_open()) if each._shares(self._root)), None)
        if self._outer is not None:
            self._outer._before = self._outer._before or walk(self._outer._root)
            self._outer._journal.open(self._journal)
        self._state = "open"
        _open.set((*_still_open(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state = "over"
        _open.set(_still_open())
        if kind is not None:
            self._journal.rollback()
            return
        try:
            with pause_collector():
                self._report = self._commit()
        except BaseException:
            self._journal.rollback()
            raise
        if self._outer is not None and self._outer._state == "open":
            self._outer._take_in(self)

    @property
    def report(self) -> Report:
        """What the transaction did; there once the block is over."""
        if self._report is not None:
            return self._report
        if self._state == "over":
            raise EditError("there is no report: the block failed, and everything is as it was before.")
        raise EditError("the report is there when the block is over; within it, print(e.plan()).")

    def plan(self) -> Report:
        """What was done so far, and is not committed yet."""
        return Report(self._changes(), self._warnings(), self._notes())

    def add(self, path: str, module: nn.Module, *, before: str | None = None, after: str | None = None) -> None:
        """See `modsurg.add`."""
        with self._verb() as step:
            add_child(step, path, module, before, after)
            self._recorder.add(path, module, step.tree, before, after)

    def insert_before(self, where: Where, new: New, *, count: int | None = None, untie: bool = False) -> None:
        """See `modsurg.insert_before`."""
        self._insert("insert_before", where, new, count, untie)

    def insert_after(self, where: Where, new: New, *, count: int | None = None, untie: bool = False) -> None:
        """See `modsurg.insert_after`."""
        self._insert("insert_after", where, new, count, untie)

    def replace(self, where: Where, new: New, *, count: int | None = None, untie: bool = False) -> None:
        """See `modsurg.replace`."""
        with self._verb() as step:
            selection = resolve(step.tree, where, count)
            replace_sites(step, selection, maker(new, len(selection)), untie)
            self._recorder.sites("replace", step.changes, step.tree, untie)

    def wrap(self, where: Where, wrapper: New, *, count: int | None = None, untie: bool = False) -> None:
        """See `modsurg.wrap`."""
        with self._verb() as step:
            selection = resolve(step.tree, where, count)
            replace_sites(step, selection, caller(wrapper), untie, kind="wrap")
            self._recorder.sites("wrap", step.changes, step.tree, untie)

    def remove(self, where: Where, *, delete: bool = False, count: int | None = None, untie: bool = False) -> None:
        """See `modsurg.remove`."""
        with self._verb() as step:
            selection = resolve(step.tree, where, count)
            remove_sites(step, selection, delete, untie)
            paths = [path for site in selection for path in site.matched]
            self._recorder.plain("remove", paths=paths, delete=delete, untie=untie)

    def rename(self, path: str, name: str) -> None:
        """See `modsurg.rename`."""
        with self._verb() as step:
            rename_child(step, resolve(step.tree, path), name)
            self._recorder.plain("rename", path=path, name=name)

    def resize(self, where: Where, *, fill: Fill = "init", count: int | None = None, **sizes: int) -> None:
        """See `modsurg.resize`."""
        with self._verb() as step:
            selection = resolve(step.tree, where, count)
            refuse_wrapped(step.tree, selection.paths)
            sites = [(site.path, site.module) for site in selection]
            for path, module in sites:
                refuse_offloaded(path, module)
            for each in resize_modules(step.tree, sites, sizes, step.journal, fill=fill):
                paths = tuple(step.tree.paths[id(each.module)])
                step.changes.append(Change("resize", paths, old=each.module, new=each.module, detail=each))
                step.notes += each.notes
            self._recorder.plain("resize", paths=list(selection.paths), fill=fill, sizes=sizes)

    def freeze(self, where: Where, *, count: int | None = None) -> None:
        """See `modsurg.freeze`."""
        with self._verb() as step:
            selection = resolve(step.tree, where, count)
            refuse_wrapped(step.tree, selection.paths)
            step.changes, step.warnings = plan_freeze(step.tree, selection)
            apply_frozen(step.changes, step.journal)
            self._recorder.plain("freeze", paths=list(selection.paths))

    def unfreeze(self, where: Where, *, count: int | None = None) -> None:
        """See `modsurg.unfreeze`."""
        with self._verb() as step:
            selection = resolve(step.tree, where, count)
            refuse_wrapped(step.tree, selection.paths)
            step.changes, step.warnings = plan_unfreeze(step.tree, selection)
            apply_frozen(step.changes, step.journal)
            self._recorder.plain("unfreeze", paths=list(selection.paths))

    def _insert(self, verb: str, where: Where, new: New, count: int | None, untie: bool) -> None:
        with self._verb() as step:
            selection = resolve(step.tree, where, count)
            insert_sites(step, selection, maker(new, len(selection)), verb == "insert_after", untie)
            self._recorder.sites(verb, step.changes, step.tree, untie)

    @contextmanager
    def _verb(self) -> Generator[Step]:
        if self._state == "new":
            raise EditError("the verbs of a transaction stand in its block: with edit(model) as e: e.replace(...)")
        if self._state == "over":
            raise EditError(_OVER)
        if any(each._outer is self for each in _still_open()):
            raise EditError("a transaction within this one is open; use its verbs, or let its block end first.")
        self._recorder.settle()
        with pause_collector(), torch.inference_mode(False):  # what is made is to train
            step = Step(walk(self._root))
            self._before = self._before or step.tree
            self._journal.open(step.journal)  # before the first change, so that no interrupt can come between
            try:
                yield step
            except BaseException:
                step.journal.rollback()
                raise
        self._journal.absorb(step.journal)
        self._steps.append(step)

    def _shares(self, root: nn.Module) -> bool:
        return any(m is root for m in self._root.modules()) or any(m is self._root for m in root.modules())

    def _take_in(self, inner: "Edit") -> None:
        """What another transaction did within this one is brought back with this one."""
        self._journal.absorb(inner._journal)
        if inner._steps:
            self._recorder.refuse("another transaction was made within it; use the verbs of one: e.replace(...)")
            changes = counted(len(inner._changes()), "change", "changes")
            self._said.append(f"within it another edit was made, of {changes}: see its report")

    def note(self, text: str) -> None:
        """Say something in the report."""
        self._said.append(text)

    def _commit(self) -> Report:
        before = self._before or walk(self._root)
        said = self._warnings()
        notes = [
            *self._notes(),
            *outdated(before, self._journal),
            *self._following.follow(self._changes(), self._journal),
        ]
        if self._example is not None:
            fresh = [change.added for change in self._changes() if change.added is not None]
            said = (*said, *preflight(self._root, self._example, fresh))
        for text in said:
            warn(text)
        if len(self._changes()) <= _DESCRIBED_AT_ONCE:
            self._recorder.settle()
        remapping = Remapping(before, self._journal, self._following.positions())
        return Report(self._changes(), said, tuple(notes), (self._journal, remapping, self._recorder.recipe))

    def _changes(self) -> tuple[Change, ...]:
        return tuple(change for step in self._steps for change in step.changes)

    def _warnings(self) -> tuple[str, ...]:
        return tuple(text for step in self._steps for text in step.warnings)

    def _notes(self) -> tuple[str, ...]:
        return (*(text for step in self._steps for text in step.notes), *self._said)


_DESCRIBED_AT_ONCE = 1000
_OVER = "this transaction is over; open another: with edit(model) as e: ..."
_open: ContextVar[tuple[Edit, ...]] = ContextVar("open transactions, the innermost last", default=())


def _still_open() -> tuple[Edit, ...]:
    """Those open here: a copied context (that of a task) goes on to list the ones that ended in another."""
    return tuple(each for each in _open.get() if each._state == "open")
