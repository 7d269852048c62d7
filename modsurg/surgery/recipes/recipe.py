"""A recorded edit as plain data: to JSON and back, and replayed on another copy of the model.

    {"version": 2,
     "edits": [{"verb": "replace", "untie": false, "sites": [{"paths": ["fc"], "class": "Linear", "new": 0}]}, ...],
     "modules": [...]}                                        new modules, each as a blueprint: structure without
         weights

What a new module has of the model itself (the old module that it wraps, a weight that it shares) stands beside "new" as
{"modules": {path in it: path in the model}, "parameters": {...}}. A part of the module that the same verb made for the
site "a" is written "+a:path in that module".

It holds no pickle. A new module is built from its blueprint, without a call to its constructor, and then initialised by
its own `reset_parameters`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from modsurg.errors import ModsurgError, RecipeError, TrustError
from modsurg.structure.build import build, describe
from modsurg.structure.trust import Trusted
from modsurg.surgery.changes import Beside, Change
from modsurg.surgery.recipes.borrowed import entered, loans, parameter_names, taken_out
from modsurg.tree.walk import Tree

VERSION = 2


@dataclass(frozen=True)
class Recipe:
    """An edit without its model.

    Attributes:
        edits: The verbs in their order, with the paths that they met.
        modules: Blueprints of the new modules.

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
    def from_json(cls, text: str) -> "Recipe":
        """Read what `to_json` wrote.

        Raises:
            RecipeError: The text is no recipe, or one of another version.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"this is no recipe: {error}. Write one with report.recipe.to_json().") from None
        version = data.get("version") if isinstance(data, dict) else None
        if version != VERSION:
            raise RecipeError(
                f'this is no recipe of version {VERSION}: its "version" is {version!r:.20}. Make the edit again and '
                "write report.recipe.to_json()."
            )
        return cls(_objects(data, "edits"), _objects(data, "modules"))


def _objects(data: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = data.get(key)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RecipeError(f'this is no recipe: its "{key}" must be a list of objects.')
    return value


class Recorder:
    """Writes a recipe while a transaction goes on.

    Describing thousands of new modules takes time that most edits don't want to spend, so each verb leaves a note of
    what to describe. `settle` works the notes off, before another verb can change what they speak of.
    """

    def __init__(self) -> None:
        self._edits: list[dict[str, Any]] = []
        self._modules: list[dict[str, Any]] = []
        self._numbers: dict[str, int] = {}
        self._pending: list[Callable[[], dict[str, Any]]] = []
        self._failure: ModsurgError | None = None

    def plain(self, verb: str, **arguments: Any) -> None:
        """A verb that brings no new module."""
        self._pending.append(lambda: {"verb": verb, **arguments})

    def add(self, path: str, module: nn.Module, tree: Tree, before: str | None, after: str | None) -> None:
        """One new module at a new path of the model, of which `tree` is what it was."""
        self._pending.append(
            lambda: {"verb": "add", "path": path, **self._new(module, *_known(tree)), "before": before, "after": after}
        )

    def sites(self, verb: str, changes: Sequence[Change], tree: Tree, untie: bool) -> None:
        """New modules in, around or beside the sites of a verb, of which `tree` is the model before it."""
        made = [_site(change) for change in changes]
        self._pending.append(lambda: {"verb": verb, "untie": untie, "sites": self._sites(made, tree)})

    def settle(self) -> None:
        """Describe what was noted; what can't be described is told when the recipe is asked for."""
        try:
            while self._pending:
                self._edits.append(self._pending[0]())
                self._pending.pop(0)
        except ModsurgError as error:
            self._failure = self._failure or error
            self._pending.clear()

    def refuse(self, why: str) -> None:
        """Remember why there can be no recipe."""
        self._failure = self._failure or RecipeError(why)

    def recipe(self) -> Recipe:
        """The whole edit.

        Raises:
            RecipeError: A new module can't be written as plain data; the message names what and where.
        """
        self.settle()
        if self._failure is not None:
            raise RecipeError(f"this edit can't be recorded: {self._failure}") from self._failure
        return Recipe(self._edits, self._modules)

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
            blueprint = describe(module)
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


def _known(tree: Tree) -> tuple[dict[int, str], dict[int, str]]:
    return {key: paths[0] for key, paths in tree.paths.items()}, parameter_names(tree)


def make_module(recipe: Recipe, number: object, trust: Trusted) -> tuple[nn.Module, list[str]]:
    """Build a new module of a recipe and initialise it.

    Returns:
        The module, on cpu, and the paths within it whose tensors nothing initialises: they are zeros.

    Raises:
        RecipeError: There is no such module.
        TrustError: A class in it is not trusted.
    """
    if not isinstance(number, int) or not 0 <= number < len(recipe.modules):
        raise RecipeError(f"the recipe speaks of module {number!r} and has {len(recipe.modules)}.")
    try:
        module = build(recipe.modules[number], trust)
    except TrustError as error:
        raise TrustError(str(error).replace("load_model(path,", "replay(model, recipe,")) from None
    try:
        module.to_empty(device="cpu")
        return module, [path for path, part in module.named_modules() if not _initialise(part)]
    except Exception as error:  # whatever the class says of tensors that are not its own
        raise RecipeError(
            f"module {number} of the recipe, a {type(module).__name__}, can't be initialised: {error}"
        ) from error


def _initialise(module: nn.Module) -> bool:
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    with torch.no_grad():
        for tensor in tensors:
            tensor.zero_()
    if tensors and reset is not None:
        reset()
    return not tensors or reset is not None
