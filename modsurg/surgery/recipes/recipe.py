"""A recorded edit as plain data: to JSON and back, and replayed on another copy of the model.

    {"version": 2,
     "edits": [{"verb": "replace", "untie": false, "sites": [{"paths": ["fc"], "class": "Linear", "new": 0}]}, ...],
     "modules": [...]}                                        new modules, each as a blueprint: structure without
         weights

What a new module has of the model itself (the old module that it wraps, a weight that it shares) stands beside "new" as
{"modules": {path in it: path in the model}, "parameters": {...}}. A part of the module that the same verb made for the
site "a" is written "+a:path in that module".

It holds no pickle. A new module is built from its description, without a call to its constructor, and then initialised
by its own `reset_parameters`.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from inspect import getattr_static
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from modsurg.errors import ModsurgError, RecipeError, TrustError
from modsurg.structure.build import build, describe
from modsurg.structure.trust import Trusted
from modsurg.surgery.changes import Beside, Change, Record
from modsurg.surgery.recipes.borrowed import entered, loans, parameter_names, taken_out
from modsurg.tree.walk import Tree, parents

VERSION = 2


@dataclass(frozen=True)
class Recipe:
    """An edit without its model.

    Attributes:
        edits: The verbs in their order, with the paths that they met.
        modules: Descriptions of the new modules.

    Example:
        >>> import modsurg
        >>> recipe = modsurg.rename(nn.Sequential(nn.ReLU()), "0", "act").recipe
        >>> Recipe.from_json(recipe.to_json()) == recipe
        True
    """

    edits: list[dict[str, Any]] = field(default_factory=list)
    modules: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> str:
        """The recipe as a JSON text."""
        return json.dumps({"version": VERSION, "edits": self.edits, "modules": self.modules})

    @classmethod
    def from_json(cls, text: str | os.PathLike[str]) -> "Recipe":
        """Read what `to_json` wrote.

        Args:
            text: The text, or the path of a file that holds it.

        Raises:
            RecipeError: The text is not a recipe, or one of another version.
            FileNotFoundError: There is no such file.
        """
        is_text = isinstance(text, str) and (text.lstrip()[:1] in ("{", "[", "") or not os.path.exists(text))
        if not is_text and isinstance(text, str | os.PathLike):
            text = Path(text).read_text(encoding="utf-8")
        try:
            data = json.loads(os.fspath(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise RecipeError(f"this is not a recipe: {error}. Write one with report.recipe.to_json().") from None
        version = data.get("version") if isinstance(data, dict) else None
        if version != VERSION:
            raise RecipeError(
                f'this is not a recipe of version {VERSION}: its "version" is {version!r:.20}. Make the edit again and '
                "write report.recipe.to_json()."
            )
        return cls(_objects(data, "edits"), _objects(data, "modules"))


def _objects(data: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = data.get(key)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RecipeError(f'this is not a recipe: its "{key}" must be a list of objects.')
    return value


class RecipeWriter:
    """Describes the verbs of a transaction when the recipe is asked for.

    Only where a later verb of the same transaction edits a module that an earlier one made, that module is described
    before.
    """

    def __init__(self) -> None:
        self._edits: list[dict[str, Any]] = []
        self._modules: list[dict[str, Any]] = []
        self._numbers: dict[str, int] = {}
        self._pending: list[Record] = []
        self._sealed: list[tuple[Change, list[Any]]] = []
        self._failure: ModsurgError | None = None

    def add(self, record: Record) -> None:
        """Take a verb that is done."""
        self._pending.append(record)

    def describe_if_inside(self, tree: Tree, paths: Iterable[str]) -> None:
        """Describe the modules that were made so far, if one of these paths of the model leads into them."""
        added = [c.added for record in self._pending for c in record.changes if c.added is not None]
        made = {id(module) for new in added for module in new.modules()}
        if made and any(id(tree.modules[each]) in made for path in paths for each in (path, *parents(path))):
            self._describe()

    def seal(self) -> None:
        """Take note of the form of what was made: a module that is edited later can't be described."""
        changes = [change for record in self._pending for change in record.changes if change.added is not None]
        self._sealed = [(change, _form(change.added)) for change in changes if change.added is not None]

    def refuse(self, why: str) -> None:
        """Remember why there can be no recipe."""
        self._failure = self._failure or RecipeError(why)

    def recipe(self) -> Recipe:
        """Describe the whole edit.

        Raises:
            RecipeError: A new module can't be written as plain data, or was edited since; the message names it.
        """
        for change, form in self._sealed if self._pending else ():
            if change.added is not None and _form(change.added) != form:
                kind = type(change.added).__name__
                self.refuse(
                    f'the new {kind} at "{change.paths[0]}" was edited since; ask for report.recipe before that'
                )
        self._describe()
        if self._failure is not None:
            raise RecipeError(f"this edit can't be recorded: {self._failure}") from self._failure
        return Recipe(self._edits, self._modules)

    def _describe(self) -> None:
        try:
            while self._pending and self._failure is None:
                self._edits.append(self._edit(self._pending[0]))
                self._pending.pop(0)
        except ModsurgError as error:
            self._failure = error

    def _edit(self, record: Record) -> dict[str, Any]:
        described: dict[str, Any] = {"verb": record.verb, **record.arguments}
        if record.verb == "add":
            (change,) = record.changes
            assert change.new is not None
            return described | self._new(change.new, *_known(record.tree))
        if record.verb in ("replace", "wrap", "insert_before", "insert_after"):
            sites = [_site(change) for change in record.changes]
            described["sites"] = self._sites(sites, record.tree)
            described["every"] = _whole_classes([old for _, old, _ in sites], record.tree)
        return described

    def _sites(self, made: list[tuple[tuple[str, ...], nn.Module, nn.Module]], tree: Tree) -> list[dict[str, Any]]:
        modules, parameters = _known(tree)
        sites = []
        for paths, old, new in made:
            sites.append({"paths": list(paths), "class": type(old).__name__, **self._new(new, modules, parameters)})
            own = [(f"+{paths[0]}:{inner}", m) for inner, m in entered(new, modules) if id(m) not in modules]
            for place, module in own:  # a later site may get the same, or share a parameter with it
                modules[id(module)] = place
                named = ((name, p) for name, p in module._parameters.items() if p is not None)
                parameters.update({id(p): f"{place}.{name}" for name, p in named if id(p) not in parameters})
        return sites

    def _new(self, module: nn.Module, modules: dict[int, str], parameters: dict[int, str]) -> dict[str, Any]:
        loan = loans(module, modules, parameters)
        if "" in loan.get("modules", ()):
            return {"new": None, **loan}
        with taken_out(module, loan):
            blueprint = describe(module).data
        number = self._numbers.setdefault(json.dumps(blueprint, sort_keys=True), len(self._modules))
        if number == len(self._modules):
            self._modules.append(blueprint)
        return {"new": number, **loan}


def _site(change: Change) -> tuple[tuple[str, ...], nn.Module, nn.Module]:
    """The paths of a site before the verb, the module there, and the new one."""
    old = change.old if change.anchor is None else change.anchor
    assert old is not None
    assert change.new is not None
    return change.detail.paths if isinstance(change.detail, Beside) else change.paths, old, change.new


def _whole_classes(sites: Sequence[nn.Module], tree: Tree) -> list[str]:
    """The classes of which every module of the tree is a site, where there are several: the edit meant the class."""
    there = Counter(type(module).__name__ for module in {id(each): each for each in tree.modules.values()}.values())
    changed = Counter(type(module).__name__ for module in sites)
    return sorted(name for name, count in changed.items() if count == there[name] > 1)


def _form(module: nn.Module) -> list[Any]:
    """The modules of a new module, and the shapes of its parameters."""
    if not module._modules and not module._parameters:
        return []
    return [
        (id(inner), list(inner._modules), [(name, _shape(p)) for name, p in inner._parameters.items()])
        for inner in module.modules()
    ]


def _shape(parameter: torch.Tensor | None) -> object:
    return None if parameter is None or is_lazy(parameter) else parameter.shape


def _known(tree: Tree) -> tuple[dict[int, str], dict[int, str]]:
    return {key: paths[0] for key, paths in tree.paths.items()}, parameter_names(tree)


def make_module(recipe: Recipe, number: object, trust: Trusted, most: int) -> tuple[nn.Module, list[str]]:
    """Build a new module of a recipe and initialise it.

    Args:
        recipe: Has its description.
        number: Of the module in the recipe.
        trust: As in `replay`.
        most: How many bytes its tensors may take.

    Returns:
        The module, on cpu, and the paths within it whose tensors nothing initialises: they are zeros.

    Raises:
        RecipeError: There is no such module, or it is too large.
        TrustError: A class in it is not trusted.
    """
    if not isinstance(number, int) or not 0 <= number < len(recipe.modules):
        raise RecipeError(f"the recipe names module {number!r} and has {len(recipe.modules)}.")
    try:
        module = build(recipe.modules[number], trust)
    except TrustError as error:
        raise TrustError(str(error).replace("load_model(path,", "replay(model, recipe,")) from None
    nbytes = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    if nbytes > most:
        raise RecipeError(
            f"module {number} of the recipe, a {type(module).__name__}, takes {nbytes:,} bytes, over {most:,}: more "
            "than four times this model. If you trust the recipe, make the module yourself and replace it."
        )
    try:
        module.to_empty(device="cpu")
        return module, [path for path, part in module.named_modules() if not _initialise(part)]
    except Exception as error:  # whatever the class says of tensors that are not its own
        raise RecipeError(
            f"module {number} of the recipe, a {type(module).__name__}, can't be initialised: {error}"
        ) from error


def _initialise(module: nn.Module) -> bool:
    # A method of the class alone: an attribute of this name would be what the recipe says.
    methods = [getattr_static(type(module), name, None) for name in ("reset_parameters", "_reset_parameters")]
    reset = next((method for method in methods if isinstance(method, FunctionType)), None)
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    with torch.no_grad():
        for tensor in tensors:
            tensor.zero_()
    if tensors and reset is not None:
        reset(module)
    return not tensors or reset is not None
