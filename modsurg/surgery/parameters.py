"""The verbs that leave the tree as it is and change its weights: resize, freeze, unfreeze."""

from torch import nn

from modsurg.surgery.api import Optimizers, Schedulers, edit
from modsurg.surgery.preflight import Example
from modsurg.surgery.report import Report
from modsurg.surgery.resize.resize import Fill
from modsurg.tree.selection import Where


def resize(
    model: nn.Module,
    where: Where,
    *,
    fill: Fill = "init",
    count: int | None = None,
    optimizer: Optimizers = None,
    scheduler: Schedulers = None,
    example: Example | None = None,
    **sizes: int,
) -> Report:
    """Grow or shrink layers and keep the weights that overlap.

    Each parameter stays the same object, so that what is tied stays tied and optimizers go on. Fewer places keep the
    first ones. New inputs begin at zero, so that the old outputs stay what they were; new outputs begin as the layer
    initialises itself. Three input channels made one, and one made three, keep the response to a gray picture.

    Args:
        model: Edited in place.
        where: See `select`.
        fill: How new outputs begin: `"init"` as the layer initialises itself, or `"zeros"`.
        count: How many sites there must be.
        optimizer: See `edit`; its state for a resized parameter is resized with it.
        scheduler: See `edit`.
        example: See `edit`.
        **sizes: The layer's own constructor names: `out_features=10`, `in_channels=1`, `num_embeddings=50_000`.

    Raises:
        NoMatchError: Nothing matches.
        ResizeError: The layer has no such size, or can't get it; the message says what it has.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1000))
        >>> report = resize(model, "1", out_features=10)
        >>> model[1]
        Linear(in_features=8, out_features=10, bias=True)
    """
    with edit(model, optimizer=optimizer, scheduler=scheduler, example=example) as e:
        e.resize(where, fill=fill, count=count, **sizes)
    return e.report


def freeze(
    model: nn.Module,
    where: Where,
    *,
    count: int | None = None,
    optimizer: Optimizers = None,
    scheduler: Schedulers = None,
    example: Example | None = None,
) -> Report:
    """Keep modules, and all that is in them, from training.

    Parameters lose `requires_grad` and any gradient that is left, so that neither momentum nor weight decay moves them.
    Normalisation statistics stay too, after `model.train()` as well; the mode of other layers, such as Dropout, does
    not change.

    Args:
        model: Edited in place.
        where: See `select`. `"**"` is everything, with the parameters of the model itself; a `Selection` can leave
            something out.
        count: How many sites there must be.
        optimizer: See `edit`. An LBFGS must be given: its history moves what has no gradient too.
        scheduler: See `edit`.
        example: See `edit`.

    Raises:
        NoMatchError: Nothing matches.

    Example:
        >>> from modsurg import select
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> report = freeze(model, select(model, "*") - select(model, "-1"))
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['2.weight', '2.bias']
        >>> model.train()[1].training
        False
    """
    with edit(model, optimizer=optimizer, scheduler=scheduler, example=example) as e:
        e.freeze(where, count=count)
    return e.report


def unfreeze(
    model: nn.Module,
    where: Where,
    *,
    count: int | None = None,
    optimizer: Optimizers = None,
    scheduler: Schedulers = None,
    example: Example | None = None,
) -> Report:
    """Let modules, and all that is in them, train again: the reverse of `freeze`.

    Args:
        model: Edited in place.
        where: See `select`.
        count: How many sites there must be.
        optimizer: See `edit`.
        scheduler: See `edit`.
        example: See `edit`.

    Raises:
        NoMatchError: Nothing matches.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8))
        >>> report = freeze(model, "0")
        >>> print(unfreeze(model, "0"))
        ~ 0  Linear  2 parameters trainable
    """
    with edit(model, optimizer=optimizer, scheduler=scheduler, example=example) as e:
        e.unfreeze(where, count=count)
    return e.report
