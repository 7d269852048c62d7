"""The verbs. Each alone is a transaction of one; `edit` opens one for several."""

from collections.abc import Sequence
from typing import TypeAlias

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from modsurg.surgery.edit import Edit
from modsurg.surgery.ops.factory import New
from modsurg.surgery.preflight import Example
from modsurg.surgery.report import Report
from modsurg.tree.selection import Where

Optimizers: TypeAlias = Optimizer | Sequence[Optimizer] | None
Schedulers: TypeAlias = LRScheduler | Sequence[LRScheduler] | None


def edit(
    model: nn.Module, *, optimizer: Optimizers = None, scheduler: Schedulers = None, example: Example | None = None
) -> Edit:
    """Open a transaction: the same verbs, and any error rolls back everything, bit for bit.

    Each verb takes effect at once, so that the next one meets the tree as it is by then. When the block ends, the
    optimizers follow, the example runs, and the edit is committed. A transaction within another on the same model is
    brought back with the outer one.

    Args:
        model: Edited in place. A torch.compile wrapper is looked through.
        optimizer: One or several; parameters that leave the model leave them, new ones enter the group of those that
            they replace or of their nearest neighbour, and surviving state is kept. No group is added or removed.
        scheduler: One or several; they go on with their optimizers, which need not be given again.
        example: A tensor, a tuple of arguments, a dict of keyword arguments or a shape such as `(1, 3, 224, 224)`: the
            edited model is run on meta tensors before it is committed; nothing is computed and no state is touched.

    Returns:
        A context manager; `e.plan()` inside the block and `e.report` after it are reports.

    Raises:
        ExampleError: The edited model does not run on the example.
        OptimizerError: An optimizer or scheduler can't follow.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with edit(model, example=(1, 4)) as e:
        ...     e.insert_after("0", nn.LayerNorm(8))
        ...     e.replace(nn.ReLU, nn.GELU)
        >>> print(e.report)
        + 1  LayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True)
        ~ 2  ReLU -> GELU(approximate='none')
    """
    return Edit(model, optimizer, scheduler, example)


def add(
    model: nn.Module,
    path: str,
    module: nn.Module,
    *,
    before: str | None = None,
    after: str | None = None,
    optimizer: Optimizers = None,
    scheduler: Schedulers = None,
    example: Example | None = None,
) -> Report:
    """Give a parent a new child.

    Args:
        model: Edited in place.
        path: Of the new child: the parent must exist, and the name must be free among its children, parameters,
            buffers, attributes and properties. An empty slot (`downsample=None`) can be filled.
        module: The child; it takes the device, floating dtype and mode of its parent.
        before: A sibling before which it stands in the order. Without `before` and `after` it comes last.
        after: A sibling after which it stands.
        optimizer: See `edit`.
        scheduler: See `edit`.
        example: See `edit`. A child that the parent's forward never calls is a warning.

    Raises:
        NoMatchError: There is no such parent or sibling; the message names the nearest paths.
        NameTakenError: The name is not free.
        ContainerError: A number that would leave a gap in a Sequential or ModuleList.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8))
        >>> print(add(model, "1", nn.ReLU()))
        + 1  ReLU
    """
    with edit(model, optimizer=optimizer, scheduler=scheduler, example=example) as e:
        e.add(path, module, before=before, after=after)
    return e.report


def insert_before(
    model: nn.Module,
    where: Where,
    new: New,
    *,
    untie: bool = False,
    count: int | None = None,
    optimizer: Optimizers = None,
    scheduler: Schedulers = None,
    example: Example | None = None,
) -> Report:
    """Put a new module before each site, in its Sequential or ModuleList.

    The children are numbered anew; where they have names, they keep them, and the new one is called by its class.

    Args:
        model: Edited in place.
        where: See `select`.
        new: A module, a module class, or `fn(old)` / `fn(old, path)`; see `replace`.
        untie: Only beside the paths that were meant, where the site has others too.
        count: How many sites there must be.
        optimizer: See `edit`.
        scheduler: See `edit`.
        example: See `edit`.

    Raises:
        NoMatchError: Nothing matches.
        CountError: There are not `count` sites.
        ContainerError: The parent calls its children by attribute; the message offers `wrap`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> print(insert_before(model, nn.ReLU, lambda old: nn.LayerNorm(8)))
        + 1  LayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True)
    """
    with edit(model, optimizer=optimizer, scheduler=scheduler, example=example) as e:
        e.insert_before(where, new, count=count, untie=untie)
    return e.report


def insert_after(
    model: nn.Module,
    where: Where,
    new: New,
    *,
    untie: bool = False,
    count: int | None = None,
    optimizer: Optimizers = None,
    scheduler: Schedulers = None,
    example: Example | None = None,
) -> Report:
    """Put a new module after each site, in its Sequential or ModuleList; otherwise as `insert_before`.

    Args:
        model: Edited in place.
        where: See `select`.
        new: A module, a module class, or `fn(old)` / `fn(old, path)`; see `replace`.
        untie: Only beside the paths that were meant, where the site has others too.
        count: How many sites there must be.
        optimizer: See `edit`.
        scheduler: See `edit`.
        example: See `edit`.

    Raises:
        NoMatchError: Nothing matches.
        CountError: There are not `count` sites.
        ContainerError: The parent calls its children by attribute; the message offers `wrap`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        >>> print(insert_after(model, nn.Conv2d, nn.ReLU))
        + 1  ReLU
        + 3  ReLU
    """
    with edit(model, optimizer=optimizer, scheduler=scheduler, example=example) as e:
        e.insert_after(where, new, count=count, untie=untie)
    return e.report


def replace(
    model: nn.Module,
    where: Where,
    new: New,
    *,
    untie: bool = False,
    count: int | None = None,
    optimizer: Optimizers = None,
    scheduler: Schedulers = None,
    example: Example | None = None,
) -> Report:
    """Put a new module into the place of each site.

    The new module takes over the device, floating dtype, mode and forward/backward hooks of the old one; not
    `requires_grad`: a new head on a frozen body must train. Plain Python references to the old module (in a list, a
    dict, a bound method, a closure) are rewired or reported.

    Args:
        model: Edited in place.
        where: See `select`. Where one match lies inside another, the outermost is edited.
        new: A module (for one site; without parameters it is copied for each of several), a module class, which is
            called without arguments, or `fn(old)` / `fn(old, path)`, which returns a module, or None to skip this site.
        untie: A module that stands at several paths is replaced at the paths that were meant only. Else at all of them.
        count: How many sites there must be.
        optimizer: See `edit`.
        scheduler: See `edit`.
        example: See `edit`.

    Raises:
        NoMatchError: Nothing matches; the message names the nearest paths.
        CountError: There are not `count` sites.
        WrapperError: The place is inside DDP, FSDP or TorchScript.
        EditError: The new module holds its own parent, or `new` makes no module.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1000))
        >>> print(replace(model, "-1", lambda old: nn.Linear(old.in_features, 10)))
        ~ 2  Linear(in_features=8, out_features=1000, bias=True) -> Linear(in_features=8, out_features=10, bias=True)
    """
    with edit(model, optimizer=optimizer, scheduler=scheduler, example=example) as e:
        e.replace(where, new, count=count, untie=untie)
    return e.report


def remove(
    model: nn.Module,
    where: Where,
    *,
    delete: bool = False,
    untie: bool = False,
    count: int | None = None,
    optimizer: Optimizers = None,
    scheduler: Schedulers = None,
    example: Example | None = None,
) -> Report:
    """Take modules out.

    In a Sequential or ModuleList they are deleted and the others numbered anew. Elsewhere an `nn.Identity` takes their
    place, so that forward still runs.

    Args:
        model: Edited in place.
        where: See `select`.
        delete: Really delete, also where the parent calls the child by attribute.
        untie: Only at the paths that were meant, where the site has others too.
        count: How many sites there must be.
        optimizer: See `edit`.
        scheduler: See `edit`.
        example: See `edit`.

    Raises:
        NoMatchError: Nothing matches.
        CountError: There are not `count` sites.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
        >>> print(remove(model, nn.Dropout))
        - 1  Dropout(p=0.5, inplace=False)
          renumbered: "Sequential"
    """
    with edit(model, optimizer=optimizer, scheduler=scheduler, example=example) as e:
        e.remove(where, delete=delete, count=count, untie=untie)
    return e.report


def wrap(
    model: nn.Module,
    where: Where,
    wrapper: New,
    *,
    untie: bool = False,
    count: int | None = None,
    optimizer: Optimizers = None,
    scheduler: Schedulers = None,
    example: Example | None = None,
) -> Report:
    """Put each site into a wrapper that takes its place.

    Args:
        model: Edited in place.
        where: See `select`. A wrapper that holds the matched class is not matched again.
        wrapper: `wrapper(old)` or `wrapper(old, path)`: a class or a function that returns a module which holds `old`.
        untie: Only at the paths that were meant, where the site has others too.
        count: How many sites there must be.
        optimizer: See `edit`.
        scheduler: See `edit`.
        example: See `edit`.

    Raises:
        NoMatchError: Nothing matches.
        CountError: There are not `count` sites.
        EditError: The wrapper does not hold the old module.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8))
        >>> print(wrap(model, nn.Linear, lambda old: nn.Sequential(old, nn.ReLU())))
        ~ 0  Linear -> Sequential(Linear)
    """
    with edit(model, optimizer=optimizer, scheduler=scheduler, example=example) as e:
        e.wrap(where, wrapper, count=count, untie=untie)
    return e.report


def rename(
    model: nn.Module,
    path: str,
    name: str,
    *,
    optimizer: Optimizers = None,
    scheduler: Schedulers = None,
    example: Example | None = None,
) -> Report:
    """Give the child at `path` another name; it keeps its place in the order, and so the output.

    Code that names the child by its old name, as `self.head`, no longer finds it; where that is in the parent's own
    class, the report warns.

    Args:
        model: Edited in place.
        path: Dotted path of one existing child.
        name: The new last segment, free among the parent's attributes.
        optimizer: See `edit`.
        scheduler: See `edit`.
        example: See `edit`.

    Raises:
        NoMatchError: No child at `path`; the message names the nearest ones.
        NameTakenError: The parent has a child, parameter, buffer or attribute of that name.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> print(rename(model, "1", "activation"))
        ~ 1 -> activation  ReLU
    """
    with edit(model, optimizer=optimizer, scheduler=scheduler, example=example) as e:
        e.rename(path, name)
    return e.report
