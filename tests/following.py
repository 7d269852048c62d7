"""An oracle for widths that follow, which knows nothing of labels: the untouched model, with the weights zeroed by
which layers read the channels that go, gives what the narrowed model gives."""

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

from modsurg.errors import ResizeError
from modsurg.surgery.journal import Journal
from modsurg.surgery.resize.follow import check_followed, find_widths, follow_modules, group_of
from modsurg.surgery.resize.resize import layer_of
from modsurg.tree.walk import walk

TOLERANCE = 1e-4


@dataclass
class Tally:
    """How many layers of a model followed: exactly, or reported as not exact; which were refused, which are wrong."""

    exact: int = 0
    reported: int = 0
    refused: dict = field(default_factory=dict)
    wrong: dict = field(default_factory=dict)

    @property
    def layers(self):
        return self.exact + self.reported + len(self.refused) + len(self.wrong)

    @property
    def followed(self):
        return self.exact + self.reported


def first_tensor(output):
    while not isinstance(output, torch.Tensor):
        if hasattr(output, "to_tuple"):
            output = output.to_tuple()
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def run(model, example):
    with torch.no_grad():
        return first_tensor(model(**example) if isinstance(example, dict) else model(example))


def scatter(model):
    """Give every parameter and statistic a value that matters."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.uniform_(-0.1, 0.1, generator=generator)
            module.running_var.uniform_(0.8, 1.2, generator=generator)
    for tensor in model.parameters():
        if tensor.dim() == 1:
            tensor.data += torch.rand(tensor.shape, generator=generator) * 0.1
    return model.eval()


def sites(model, widths):
    """Each layer that was called, with the size of its output and the group of that."""
    for path, module in model.named_modules():
        layer = layer_of(module)
        if layer is not None and any(True for _ in module.parameters()) and not path.endswith("out_proj_"):
            yield path, module, layer.outputs


def oracle(model, before, example, results):
    """What the untouched model gives where the channels that go are not read."""
    held = {}
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    state = dict((*before.named_parameters(), *before.named_buffers()))
    for each in results:
        for reshaped in each.tensors:
            old = state[names[id(reshaped.tensor)]]
            for dim, axis in enumerate(reshaped.axes):
                if axis.reads and axis.changes:
                    held.setdefault(id(old), (old, old.detach().clone()))
                    gone = torch.ones(old.shape[dim], dtype=torch.bool)
                    gone[axis.source] = False
                    old.data.index_fill_(dim, gone.nonzero().flatten(), 0)
    try:
        return run(before, example)
    finally:
        for old, values in held.values():
            old.data.copy_(values)


def tally(model, example, share=0.5, seed=0, every=1):
    """Narrow every layer of a model, each from the whole model, and compare."""
    scatter(model)
    before = copy.deepcopy(model)
    tree = walk(model)
    widths = find_widths(tree, example)
    counts, seen, generator = Tally(), {}, torch.Generator().manual_seed(seed)
    full = run(before, example)
    for number, (path, module, size) in enumerate(sites(model, widths)):
        if number % every:
            continue
        try:
            group, _ = group_of(widths, path, module, size)
        except ResizeError as error:
            if "not called" not in str(error):
                counts.refused[path] = str(error)
            continue
        key = frozenset((m.path, m.name, m.dim) for m in group.members)
        if key not in seen:
            seen[key] = one(model, before, example, widths, (path, module, size), group, full, generator, share)
        what, text = seen[key]
        if what in ("exact", "reported"):
            setattr(counts, what, getattr(counts, what) + 1)
        else:
            getattr(counts, what)[path] = text
    return counts


def one(model, before, example, widths, site, group, full, generator, share):
    path, module, size = site
    journal = Journal()

    def scores(_):
        return torch.rand(group.channels, generator=generator)

    try:
        if group.step >= group.channels:
            return "refused", f"{path}: all {group.channels} channels come and go at once"
        done, _ = follow_modules(widths, [(path, module)], {size: share}, journal, keep=scores)
        try:
            check_followed(widths, model, example)
        except ResizeError as refused:
            return "refused", f"{path}: {refused}"
        try:
            out = run(model, example)
        except Exception as error:
            return "wrong", f"{path}: {type(error).__name__} {error}"
        if group.spanned:
            return "reported", ""
        expected = oracle(model, before, example, done)
        chosen = next((a.source for each in done if each.path == path for t in each.tensors for a in t.axes[:1]), None)
        for dim in range(out.dim()):
            if out.shape[dim] != expected.shape[dim]:
                expected = expected.index_select(dim, chosen)
        scale = float(expected.abs().max())
        error = float((out - expected).abs().max()) / max(scale, 1e-12)
        if not error <= TOLERANCE:
            return "wrong", f"{path}: differs by {error:.2g}"
        return "exact", ""
    except ResizeError as error:
        return "refused", str(error)
    finally:
        journal.rollback()
        widths.now = torch.ones_like(widths.now)
        widths.planned = torch.ones_like(widths.now)
