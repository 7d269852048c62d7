"""The verbs that leave the tree as it is and change its weights: resize, freeze, unfreeze."""

from torch import nn

from modsurg.surgery.api import Optimizers, Schedulers, edit
from modsurg.surgery.preflight import Example
from modsurg.surgery.report import Report
from modsurg.surgery.resize.channel_groups import ChannelGroup, Keep
from modsurg.surgery.resize.follow import coupled_groups
from modsurg.surgery.resize.image_size import ImageSize
from modsurg.surgery.resize.values import Fill
from modsurg.tree.selection import Where, resolve
from modsurg.tree.walk import walk
from modsurg.tree.wrappers import unwrap


def resize(
    model: nn.Module,
    where: Where = "",
    *,
    image_size: ImageSize | None = None,
    follow: bool = False,
    keep: Keep = "first",
    multiple: int | None = None,
    fill: Fill = "init",
    count: int | None = None,
    optimizer: Optimizers = None,
    scheduler: Schedulers = None,
    example: Example | None = None,
    **sizes: float,
) -> Report:
    """Grow or shrink layers and keep the weights that overlap.

    Each parameter stays the same object, so that what is tied stays tied and optimizers go on. Fewer places keep the
    first ones. New inputs begin at zero, so that the old outputs stay what they were; new outputs begin as the layer
    initialises itself. Three input channels made one, and one made three, keep the response to a gray picture.

    Args:
        model: Edited in place.
        where: See `select`; by default the model itself.
        image_size: Of a vision transformer (timm, torchvision, transformers, OpenCLIP): one number, or height and
            width. Its position embeddings are resampled (bicubic, antialiased; class and register tokens are kept),
            and its modules get the new sizes.
        follow: Let everything follow that is coupled to these channels: the layers that read them, norms, residual
            partners, concatenations, attention heads. The model runs on the example (on meta) to find it. What can't
            follow is refused, and nothing is changed.
        keep: With `follow`, the channels that stay: `"first"`, `"l1"` or `"l2"` (those with the greatest weights,
            summed over all that is coupled), a list of channels, or `fn(group) -> scores`; see `coupled`.
        multiple: The new sizes are rounded to multiples of this.
        fill: How new places begin: `"init"` as the layer initialises itself, `"zeros"`, `"mean"` (the mean of the
            old ones, for tokens) or `"repeat"` (the old ones again, for input channels).
        count: How many sites there must be.
        optimizer: See `edit`; its state for a resized parameter is resized with it.
        scheduler: See `edit`.
        example: See `edit`.
        **sizes: The layer's own constructor names: `out_features=10`, `in_channels=1`, `num_embeddings=50_000`; or a
            share of the old size: `out_channels=0.5`.

    Raises:
        NoMatchError: Nothing matches.
        ResizeError: The layer has no such size, or can't get it; the message says what it has.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1000))
        >>> report = resize(model, "1", out_features=10)
        >>> model[1]
        Linear(in_features=8, out_features=10, bias=True)
        >>> print(resize(model, "0", out_features=0.5, follow=True, example=(1, 4)))
        ~ 0  Linear  out_features 8 -> 4
          1 layer follows: 1
          parameters 130 -> 70, multiply-adds 112 -> 56
    """
    with edit(model, optimizer=optimizer, scheduler=scheduler, example=example) as e:
        e.resize(
            where, image_size=image_size, follow=follow, keep=keep, multiple=multiple, fill=fill, count=count, **sizes
        )
    return e.report


def coupled(model: nn.Module, where: Where, example: Example) -> list[ChannelGroup]:
    """Find what would follow if the outputs of layers were resized; nothing is changed.

    Args:
        model: Only read.
        where: Layers; see `select`.
        example: A tensor, a tuple of arguments, a dict of keyword arguments or a shape.

    Returns:
        One group for each set of coupled channels; printed, it lists the tensors that belong to it.

    Raises:
        NoMatchError: Nothing matches.
        ResizeError: A layer can't be resized, or its channels can't change.
        ExampleError: The model does not run on the example.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> print(coupled(model, "0", (1, 4))[0])
        0  out_features 8
          0  weight[0], bias[0]
          2  weight[1] reads
    """
    root = unwrap(model)
    return coupled_groups(root, [(site.path, site.module) for site in resolve(walk(root), where)], example)


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
