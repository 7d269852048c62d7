"""A transaction: verbs that take effect at once, and all go back if anything fails before the end of the block."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from modsurg.errors import EditError, ExampleError, ResizeError, counted, warn
from modsurg.surgery.changes import Change, Record
from modsurg.surgery.journal import Journal
from modsurg.surgery.key_mapping import Remapping
from modsurg.surgery.ops.checks import refuse_offloaded, refuse_wrapped
from modsurg.surgery.ops.children import list_renumbered
from modsurg.surgery.ops.factory import New, caller, maker
from modsurg.surgery.ops.freeze import apply_frozen, plan_freeze, plan_parameters, plan_unfreeze
from modsurg.surgery.ops.hints import collect_hints, refuse_adapter, warn_of_unused_copies
from modsurg.surgery.ops.insert import apply_add, apply_insert, plan_add, plan_insert
from modsurg.surgery.ops.remove import apply_remove, apply_rename, plan_remove, plan_rename
from modsurg.surgery.ops.replace import apply_replace, plan_replace
from modsurg.surgery.optimizers.sync import OptimizerSync
from modsurg.surgery.preflight import Example, preflight
from modsurg.surgery.recipes.recipe import RecipeWriter
from modsurg.surgery.report import Report, fold_texts
from modsurg.surgery.resize.channel_groups import Keep, Widths
from modsurg.surgery.resize.follow import check_followed, find_widths, follow_modules
from modsurg.surgery.resize.image_size import ImageSize, resize_images
from modsurg.surgery.resize.recorded import read_plans
from modsurg.surgery.resize.resize import resize_modules
from modsurg.surgery.resize.values import Fill, Resized, write_plans
from modsurg.surgery.undo import Undo
from modsurg.tree.selection import Selection, Where, resolve, resolve_parameters
from modsurg.tree.walk import Tree, split, walk
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
        self._records: list[Record] = []
        self._said: list[str] = []
        self._writer = RecipeWriter()
        self._before: Tree | None = None
        self._report: Report | None = None
        self._optimizers = OptimizerSync(self._root, optimizer, scheduler)
        self._optimizers.watch(self._journal)
        self._state = "new"
        self._widths: Widths | None = None
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
        """Report what was done so far, and is not committed yet."""
        return Report(self._changes(), fold_texts(self._warnings()), fold_texts(self._notes()))

    def add(self, path: str, module: nn.Module, *, before: str | None = None, after: str | None = None) -> None:
        """See `modsurg.add`."""
        with self._verb("add", path=path, before=before, after=after) as verb:
            verb.changes = plan_add(verb.tree, path, module, before, after)
            self._writer.describe_if_inside(verb.tree, [path.rpartition(".")[0]])
            apply_add(verb.tree, verb.changes, verb.journal, before, after)

    def insert_before(self, where: Where, new: New, *, count: int | None = None, untie: bool = False) -> None:
        """See `modsurg.insert_before`."""
        self._insert("insert_before", where, new, count, untie)

    def insert_after(self, where: Where, new: New, *, count: int | None = None, untie: bool = False) -> None:
        """See `modsurg.insert_after`."""
        self._insert("insert_after", where, new, count, untie)

    def replace(self, where: Where, new: New, *, count: int | None = None, untie: bool = False) -> None:
        """See `modsurg.replace`."""
        with self._verb("replace", untie=untie) as verb:
            selection = self._select(verb, where, count)
            verb.changes, verb.warnings = plan_replace(verb.tree, selection, maker(new, len(selection)), untie)
            verb.warnings += apply_replace(verb.tree, verb.changes, verb.journal)

    def wrap(self, where: Where, wrapper: New, *, count: int | None = None, untie: bool = False) -> None:
        """See `modsurg.wrap`."""
        with self._verb("wrap", untie=untie) as verb:
            selection = self._select(verb, where, count)
            verb.changes, verb.warnings = plan_replace(verb.tree, selection, caller(wrapper), untie, kind="wrap")
            verb.warnings += apply_replace(verb.tree, verb.changes, verb.journal)

    def remove(self, where: Where, *, delete: bool = False, count: int | None = None, untie: bool = False) -> None:
        """See `modsurg.remove`."""
        with self._verb("remove", delete=delete, untie=untie) as verb:
            selection = self._select(verb, where, count)
            verb.arguments["paths"] = [path for site in selection for path in site.matched]
            verb.changes, verb.warnings = plan_remove(verb.tree, selection, delete, untie)
            verb.warnings += apply_remove(verb.tree, verb.changes, verb.journal)
            verb.notes += list_renumbered(verb.tree, verb.changes, verb.journal)

    def rename(self, path: str, name: str) -> None:
        """See `modsurg.rename`."""
        with self._verb("rename", path=path, name=name) as verb:
            verb.changes, verb.warnings = plan_rename(verb.tree, self._select(verb, path), name)
            apply_rename(verb.tree, verb.changes, verb.journal)

    def resize(
        self,
        where: Where = "",
        *,
        image_size: ImageSize | None = None,
        follow: bool = False,
        keep: Keep = "first",
        multiple: int | None = None,
        fill: Fill = "init",
        count: int | None = None,
        **sizes: float,
    ) -> None:
        """See `modsurg.resize`."""
        with self._verb("resize", fill=fill, sizes=sizes) as verb:
            selection = self._select(verb, where, count)
            verb.arguments["paths"] = list(selection.paths)
            refuse_wrapped(verb.tree, selection.paths)
            sites = [(site.path, site.module) for site in selection]
            for path, module in sites:
                refuse_offloaded(path, module)
                refuse_adapter(path, module)
            if image_size is not None:
                if sizes or follow or multiple:
                    raise ResizeError("image_size= is resized alone: resize(model, image_size=...).")
                verb.arguments["sizes"] = {"image_size": image_size}
                done = resize_images(verb.tree, sites, image_size, verb.journal)
            elif follow:
                if self._example is None:
                    raise ResizeError("follow=True needs an example: resize(..., follow=True, example=x).")
                self._widths = self._widths or find_widths(verb.tree, self._example)
                done, verb.arguments["follow"] = follow_modules(
                    self._widths, sites, sizes, verb.journal, fill=fill, keep=keep, multiple=multiple
                )
            else:
                done = resize_modules(verb.tree, sites, sizes, verb.journal, fill=fill, multiple=multiple)
                verb.arguments["multiple"] = multiple
            self._note_resized(verb, done)

    def resize_recorded(self, recorded: Mapping[str, Any], fill: Fill) -> None:
        """Resize what a recipe recorded of a resize with `follow`."""
        with self._verb("resize", fill=fill, follow=recorded) as verb:
            plans = read_plans(verb.tree, recorded)
            self._writer.describe_if_inside(verb.tree, [plan.path for plan in plans])
            self._note_resized(verb, write_plans(plans, fill, verb.journal))
            self._check_widths()

    def _note_resized(self, verb: Record, done: Sequence[Resized]) -> None:
        for each in done:
            paths = tuple(verb.tree.paths[id(each.module)])
            verb.changes.append(Change("resize", paths, old=each.module, new=each.module, detail=each))
            verb.notes += each.notes
        verb.warnings += warn_of_unused_copies(verb.tree, verb.changes)

    def freeze(self, where: Where, *, count: int | None = None) -> None:
        """See `modsurg.freeze`."""
        self._freeze("freeze", where, count)

    def unfreeze(self, where: Where, *, count: int | None = None) -> None:
        """See `modsurg.unfreeze`."""
        self._freeze("unfreeze", where, count)

    def _freeze(self, kind: Literal["freeze", "unfreeze"], where: Where, count: int | None) -> None:
        with self._verb(kind) as verb:
            selection, named = resolve_parameters(verb.tree, where, count, modules_first=True)
            self._writer.describe_if_inside(verb.tree, [*selection.paths, *named])
            verb.arguments |= {"paths": list(selection.paths), "parameters": list(named)}
            refuse_wrapped(verb.tree, [*selection.paths, *(split(name)[0] for name in named)])
            plan = plan_freeze if kind == "freeze" else plan_unfreeze
            verb.changes, verb.warnings = plan(verb.tree, selection)
            verb.changes += plan_parameters(verb.tree, named, trainable=kind == "unfreeze")
            apply_frozen(verb.changes, verb.journal)

    def _insert(self, kind: str, where: Where, new: New, count: int | None, untie: bool) -> None:
        with self._verb(kind, untie=untie) as verb:
            selection = self._select(verb, where, count)
            make, after = maker(new, len(selection)), kind == "insert_after"
            verb.changes, verb.warnings = plan_insert(verb.tree, selection, make, after, untie)
            verb.changes, warnings = apply_insert(verb.tree, verb.changes, verb.journal)
            verb.warnings += warnings

    def _select(self, verb: Record, where: Where, count: int | None = None) -> Selection:
        selection = resolve(verb.tree, where, count)
        self._writer.describe_if_inside(verb.tree, selection.paths)
        return selection

    @contextmanager
    def _verb(self, verb_name: str, /, **arguments: Any) -> Generator[Record]:
        """Open one verb: what it touches goes back if it fails, and is recorded if it does not."""
        if self._state == "new":
            raise EditError("the verbs of a transaction are called in its block: with edit(model) as e: e.replace(...)")
        if self._state == "over":
            raise EditError(_OVER)
        if any(each._outer is self for each in _still_open()):
            raise EditError("a transaction within this one is open; use its verbs, or let its block end first.")
        if verb_name != "resize":
            self._check_widths()
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad):  # what is made is to train
            verb = Record(verb_name, walk(self._root), arguments)
            self._before = self._before or verb.tree
            self._journal.open(verb.journal)  # before the first change, so that no interrupt can come between
            try:
                yield verb
            except BaseException:
                verb.journal.rollback()
                raise
        self._journal.absorb(verb.journal)
        self._records.append(verb)
        self._writer.add(verb)

    def _check_widths(self) -> None:
        """Let the model run once after its channels changed: everything must have followed."""
        if self._widths is not None and self._example is not None:
            before, after = self._widths.channels, check_followed(self._widths, self._root, self._example)
            counts = (before.parameters, after.parameters, before.macs, after.macs)
            self._said.append("parameters {:,} -> {:,}, multiply-adds {:,} -> {:,}".format(*counts))
            self._widths = None

    def _shares(self, root: nn.Module) -> bool:
        return any(m is root for m in self._root.modules()) or any(m is self._root for m in root.modules())

    def _take_in(self, inner: "Edit") -> None:
        """What another transaction did within this one is brought back with this one."""
        self._journal.absorb(inner._journal)
        if inner._records:
            self._writer.refuse("another transaction was made within it; use the verbs of one: e.replace(...)")
            changes = counted(len(inner._changes()), "change", "changes")
            self._said.append(f"within it another edit was made, of {changes}: see its report")

    def warn(self, text: str) -> None:
        """Add a warning about the last verb to the report."""
        self._records[-1].warnings.append(text)

    def note(self, text: str) -> None:
        """Say something in the report."""
        self._said.append(text)

    def _commit(self) -> Report:
        before, changes = self._before or walk(self._root), self._changes()
        self._check_widths()
        after = walk(self._root)
        hints = collect_hints(before, after, changes, self._journal)
        warnings = self._warnings()
        if self._example is not None:
            try:
                warnings += preflight(self._root, self._example, [c.added for c in changes if c.added is not None])
            except ExampleError as error:
                raise ExampleError("\n".join([str(error), *hints])) from error
        notes = [*self._notes(), *hints, *self._optimizers.follow(before, after, changes)]
        warnings = fold_texts(warnings)
        for text in warnings:
            warn(text)
        self._writer.seal()
        undo = Undo(before, after, changes, self._journal, self._optimizers)
        remapping = Remapping(before, self._journal, self._optimizers.held)
        return Report(changes, warnings, fold_texts(notes), (undo, remapping, self._writer.recipe))

    def _changes(self) -> tuple[Change, ...]:
        return tuple(change for record in self._records for change in record.changes)

    def _warnings(self) -> list[str]:
        return [text for record in self._records for text in record.warnings]

    def _notes(self) -> list[str]:
        return [*(text for record in self._records for text in record.notes), *self._said]


_OVER = "this transaction is over; open another: with edit(model) as e: ..."
_open: ContextVar[tuple[Edit, ...]] = ContextVar("open transactions, the innermost last", default=())


def _still_open() -> tuple[Edit, ...]:
    """Those open here: a copied context (that of a task) goes on to list the ones that ended in another."""
    return tuple(each for each in _open.get() if each._state == "open")
