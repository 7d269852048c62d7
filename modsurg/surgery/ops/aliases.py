"""Plain Python references to modules (a list, a dict, a bound method, a closure): rewired, or reported.

`self.blocks = [self.a, self.b]` is invisible to torch: after `self.a` was replaced, the list would go on calling the
old module without a word.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from operator import itemgetter
from typing import Any

from torch import nn

from modsurg.structure.module_state import HOOKS
from modsurg.surgery.changes import Step
from modsurg.surgery.ops.references import PLAIN, Search
from modsurg.tree.selection import Site

_STANDARD = frozenset(nn.Module().__dict__)
_LAST = list(nn.Module().__dict__)[-1]
_hooks_of = itemgetter(*(name for name in HOOKS if not name.endswith(("_with_kwargs", "_always_called"))))


def rewire(step: Step, swaps: dict[int, nn.Module], gone: dict[int, str], *, ties: bool = True) -> None:
    """Find what else in the model refers to modules that were replaced or that left.

    Args:
        step: Its tree is the model before the edit.
        swaps: The new module for `id(old)`: references to the old one are changed to it.
        gone: What left without a successor, `id` of module or parameter -> its path: references to it are reported.
        ties: Whether a weight that stays is reported when it was tied to one that left.
    """
    left = {key: f'"{path}", which left the model' for key, path in gone.items()}
    fresh = {id(module) for new in swaps.values() for module in (new.modules() if new._modules else (new,))}
    search = Search(step.journal, swaps, left, step.tree.paths.keys() | fresh)
    inside = {id(module) for module in _subtrees(step, swaps)}
    tied: dict[int, str] = {}
    modules = step.tree.modules
    weights = ties and any(key not in step.tree.paths for key in gone)
    for key, paths in step.tree.paths.items():
        if key in inside or key in gone:
            continue
        module = modules[paths[0]]
        for name, value in _own_attributes(module):
            search.attribute(module, name, value, f"{paths[0]}.{name}" if paths[0] else name)
        if any(_hooks_of(module.__dict__)):
            _search_hooks(search, module, paths[0])
        for name, parameter in module._parameters.items() if weights and module._parameters else ():
            if id(parameter) in gone and id(parameter) not in tied:
                tied[id(parameter)] = f"{paths[0]}.{name}" if paths[0] else name
    for key, new in swaps.items():
        if any(_hooks_of(new.__dict__)) and not any(id(module) == key for module in new.modules()):
            _search_hooks(search, new, step.tree.paths[key][0])
    search.apply()
    step.warnings += search.warnings
    step.warnings += [
        f'"{gone[key]}" was tied to "{path}" and no longer is. Tie it again if they are still one weight: '
        f"parent.weight = other.weight."
        for key, path in tied.items()
    ]


def tell_untied(step: Step, made: Iterable[tuple[Site, tuple[str, ...], nn.Module]]) -> None:
    """Report what the parents of edited places hold of a module that also stands elsewhere, and stays there."""
    owners: dict[str, dict[int, str]] = {}
    for site, paths, _ in made:
        for path in paths if len(paths) < len(site.paths) else ():
            held = owners.setdefault(path.rpartition(".")[0], {})
            held.setdefault(id(site.module), f'the module that was at "{path}" too')
    for owner, held in owners.items():
        search = Search(step.journal, {}, held, step.tree.paths)
        for name, value in _own_attributes(step.tree.modules[owner]):
            search.attribute(step.tree.modules[owner], name, value, f"{owner}.{name}" if owner else name)
        step.warnings += search.warnings


def _own_attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """What stands in `__dict__` besides plain values and the slots of `nn.Module.__init__`, which mostly come first."""
    attributes = module.__dict__
    more = len(attributes) - len(_STANDARD)
    if more <= 0:
        return []
    plain = PLAIN.issuperset(map(type, islice(reversed(attributes.values()), more)))
    if plain and next(islice(reversed(attributes), more, None)) == _LAST:
        return []
    return [item for item in attributes.items() if type(item[1]) not in PLAIN and item[0] not in _STANDARD]


def _search_hooks(search: Search, module: nn.Module, path: str) -> None:
    for name in HOOKS:
        if module.__dict__[name]:
            search.swap(module.__dict__[name], f"{path} ({name.strip('_').replace('_', ' ')})")


def _subtrees(step: Step, swaps: dict[int, nn.Module]) -> Iterator[nn.Module]:
    for key in swaps:
        module = step.tree.modules[step.tree.paths[key][0]]
        yield from module.modules() if module._modules else (module,)
