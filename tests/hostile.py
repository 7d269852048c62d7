"""Hostile model files: trees that nobody's `save_model` writes, and what a person then does with them."""

import contextlib
import gc
import json
import struct

import torch

import modsurg
from modsurg.errors import ModsurgError

IDENTITY = "torch.nn.modules.linear:Identity"
SEQUENTIAL = "torch.nn.modules.container:Sequential"
MODULE_DICT = "torch.nn.modules.container:ModuleDict"


def tree(names, modules, shared=(), tensors=(), attributes=()):
    """A tree of version 2 whose last module is the root."""
    modules = [{"class": 0, "attributes": {"training": True}, **module} for module in modules]
    parts = {"names": list(names), "shared": list(shared), "tensors": list(tensors), "attributes": list(attributes)}
    return {"version": 2, **parts, "modules": modules, "root": len(modules) - 1}


def one(value, names=(), **rest):
    """A module with one attribute."""
    module = {"attributes": {"training": True, "x": value}}
    module |= {key: rest.pop(key) for key in ("hooks", "buffers", "parametrized", "children") if key in rest}
    return tree([IDENTITY, *names], [module], **rest)


def parametrized(names, *attributes):
    """A module that has another module as the parametrization of these names, or tries to."""
    inner = {"attributes": {"training": True}}
    by_name = dict.fromkeys(dict.fromkeys(attributes), 0)
    lists = {"class": 1, "children": by_name}
    return tree(
        [IDENTITY, MODULE_DICT, *names],
        [inner, lists, {"children": {"parametrizations": 1}, "parametrized": attributes}],
    )


def write(path, data, tensors=b"", header=None):
    """A safetensors file that holds this tree."""
    entries = {"__metadata__": {"modsurg.tree": json.dumps(data)}, **(header or {})}
    raw = json.dumps(entries).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + tensors)
    return path


def use(path, **options):
    """Open a model and do with it whatever a person does; the error that refused it, or None."""
    try:
        model = modsurg.load_model(path, **options)
    except ModsurgError as error:
        return error
    actions = (
        repr,
        lambda model: model.eval().train(),
        lambda model: model.state_dict(),
        bool,
        lambda model: model(torch.zeros(1, 2)),
        lambda model: list(model.modules()),
        lambda model: modsurg.save_model(model, path.with_suffix(".again.safetensors")),
        lambda model: str(modsurg.summary(model)),
    )
    for action in actions:
        with contextlib.suppress(Exception):  # it may not work; it must not do anything else
            action(model)
    del model
    gc.collect()
    return None
