"""Replay: a recorded edit on another copy of the model."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from modsurg.errors import RecipeError, counted, listed
from modsurg.structure.trust import Trusted
from modsurg.surgery.edit import Edit
from modsurg.surgery.preflight import Example
from modsurg.surgery.recipes.borrowed import give_back
from modsurg.surgery.recipes.recipe import Recipe, make_module
from modsurg.surgery.report import Report
from modsurg.tree.selection import Selection, resolve
from modsurg.tree.suggestions import nearest
from modsurg.tree.walk import walk
from modsurg.tree.wrappers import unwrap


def replay(
    model: nn.Module,
    recipe: Recipe,
    *,
    trust: Trusted = (),
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
    example: Example | None = None,
) -> Report:
    """Make a recorded edit on a fresh copy of the model: the same tree, the same names, the same shapes.

    New modules are initialised by their own `reset_parameters`; where a class has none, its tensors are zeros and the
    report says so. Weights come from a checkpoint: `load_state(model, path)` afterwards.

    Args:
        model: Edited in place.
        recipe: From `report.recipe` or `Recipe.from_json`.
        trust: Packages ("timm") or classes from which new modules may be built; torch.nn and torchvision.models are
            trusted.
        optimizer: Follows the edit.
        scheduler: Goes on with its optimizer.
        example: Run on meta before the edit is committed.

    Raises:
        RecipeError: It is not a recipe, or the model has not the paths or the classes that it met.
        TrustError: A new module is of a class that is not trusted; the message lists them.

    Example:
        >>> from modsurg import replace
        >>> def make():
        ...     return nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> text = replace(make(), "1", nn.GELU).recipe.to_json()
        >>> other = make()
        >>> print(replay(other, Recipe.from_json(text)))
        ~ 1  ReLU -> GELU(approximate='none')
    """
    if not isinstance(recipe, Recipe):
        kind = type(recipe).__name__
        raise RecipeError(f"the recipe is a {kind}, not a Recipe; a text is read first: Recipe.from_json(text).")
    edit = Edit(model, optimizer, scheduler, example)
    with edit:
        for record in recipe.edits:
            try:
                _Replayed(edit, unwrap(model), recipe, trust).run(record)
            except (KeyError, TypeError, AttributeError) as error:
                raise RecipeError(f"the recipe has an edit that is not whole: {record!r:.200} ({error!r}).") from error
    return edit.report


_LEAST_ROOM = 256 << 20


class _Replayed:
    """One recorded verb, run within an edit."""

    def __init__(self, edit: Edit, root: nn.Module, recipe: Recipe, trust: Trusted) -> None:
        self.edit, self.root, self.recipe, self.trust = edit, root, recipe, trust
        self.most = _LEAST_ROOM + 4 * sum(tensor.nbytes for tensor in (*root.parameters(), *root.buffers()))

    def run(self, record: dict[str, Any]) -> None:
        """Dispatch on the verb.

        Raises:
            RecipeError: The verb is none of ours.
        """
        verb = record["verb"]
        if verb in ("replace", "wrap", "insert_before", "insert_after"):
            self._sites(verb, record)
        elif verb == "add":
            new = self._make(record, walk(self.root).modules)
            self.edit.add(record["path"], new, before=record["before"], after=record["after"])
        elif verb == "remove":
            self.edit.remove(self._select(record["paths"]), delete=record["delete"], untie=record["untie"])
        elif verb == "rename":
            self.edit.rename(record["path"], record["name"])
        elif verb == "resize":
            self._resize(record)
        elif verb in ("freeze", "unfreeze"):
            modules = [self._select(record["paths"])] if record["paths"] else []
            getattr(self.edit, verb)([*modules, *record.get("parameters", ())])
        else:
            raise RecipeError(f'the recipe has the verb "{verb}", which this version of modsurg does not know.')

    def _resize(self, record: dict[str, Any]) -> None:
        if "follow" in record:
            self.edit.resize_recorded(record["follow"], record["fill"])
        else:
            multiple, where = record.get("multiple"), self._select(record["paths"])
            self.edit.resize(where, fill=record["fill"], multiple=multiple, **record["sizes"])

    def _sites(self, verb: str, record: dict[str, Any]) -> None:
        sites = {path: site for site in record["sites"] for path in site["paths"]}
        if not sites:
            return
        modules = dict(walk(self.root).modules)

        def make(old: nn.Module, path: str) -> nn.Module:
            site = sites[path]
            if type(old).__name__ != site["class"]:
                raise RecipeError(
                    f'"{path}" is a {type(old).__name__} here and was a {site["class"]} where the recipe was recorded.'
                )
            new = self._make(site, modules)
            modules.update({f"+{site['paths'][0]}:{inner}": module for inner, module in new.named_modules()})
            return new

        selection = self._select(list(sites))
        method = getattr(self.edit, verb)
        others = [
            path
            for path, module in modules.items()
            if type(module).__name__ in record.get("every", ()) and path not in sites
        ]
        method(selection, make, untie=record["untie"])
        if others:
            kinds = ", ".join(record["every"])
            self.edit.warn(
                f"the recipe changed every {kinds} of its model; {counted(len(others), 'module', 'modules')} of that "
                f"class here {'is' if len(others) == 1 else 'are'} not in it and stayed: {listed(others, 5)}"
            )

    def _make(self, record: dict[str, Any], modules: Mapping[str, nn.Module]) -> nn.Module:
        if record["new"] is None:
            return modules[record["modules"][""]]
        module, empty = make_module(self.recipe, record["new"], self.trust, self.most)
        give_back(module, record, modules.__getitem__)
        if empty:
            self.edit.note(f"not initialised by their class, so zeros until weights are loaded: {', '.join(empty)}")
        return module

    def _select(self, paths: list[str]) -> Selection:
        if not isinstance(paths, list):
            raise TypeError("paths must be a list")
        wanted, tree = set(paths), walk(self.root)
        missing = next((path for path in paths if path not in tree.modules), None)
        if missing is not None:
            raise RecipeError(f"the recipe met a module that is not here: {nearest(tree, missing)}")
        return resolve(tree, lambda path, module: path in wanted)
