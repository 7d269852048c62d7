"""Layers to resize, by hand: no transaction around it."""

import torch

from modsurg.surgery.journal import Journal
from modsurg.surgery.resize.resize import resize_modules
from modsurg.tree.walk import walk


def resize(model, *paths, fill="init", **sizes):
    journal = Journal()
    sites = [(path, model.get_submodule(path)) for path in paths or [""]]
    return resize_modules(walk(model), sites, sizes, journal, fill=fill), journal


def arrange(layer):
    torch.manual_seed(0)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return layer.eval()


def overlap(tensor, shape):
    return tensor[tuple(slice(size) for size in shape)]
