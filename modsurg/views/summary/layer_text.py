"""The arguments of a layer that matter, in a few characters: `3->64 k7 s2 p3`."""

from collections.abc import Callable, Mapping
from typing import Any


def detail(attributes: Mapping[str, Any]) -> str:
    """What sets a layer apart from another of its class, told by its attributes; "" for a class of unknown habits.

    Args:
        attributes: A module's own, or those of its description in a file.

    Example:
        >>> detail({"in_channels": 3, "out_channels": 64, "kernel_size": (7, 7), "stride": (2, 2), "padding": (3, 3)})
        '3->64 k7 s2 p3'
        >>> detail({"in_features": 512, "out_features": 10}), detail({"p": 0.5})
        ('512->10', '0.5')
    """
    for needed, describe in _FORMS:
        if needed[0] in attributes and all(_plain(attributes.get(name)) for name in needed):
            return describe(attributes)
    return ""


def _plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return len(value) > 0 and all(map(_plain, value))
    return isinstance(value, (bool, int, float, str))


def _number(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return _number(value[0]) if len(set(map(str, value))) == 1 else "x".join(map(_number, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _unless(attributes: Mapping[str, Any], letter: str, name: str, default: Any) -> str:
    value = attributes.get(name, default)
    if not _plain(value) or _number(value) == _number(default):
        return ""
    return f" {letter}{_number(value)}"


def _convolution(a: Mapping[str, Any]) -> str:
    text = f"{a['in_channels']}->{a['out_channels']} k{_number(a['kernel_size'])}"
    options = (("s", "stride", 1), ("p", "padding", 0), ("d", "dilation", 1), ("g", "groups", 1))
    return text + "".join(_unless(a, *option) for option in options)


def _pooling(a: Mapping[str, Any]) -> str:
    stride = _unless(a, "s", "stride", a["kernel_size"])
    return _number(a["kernel_size"]) + stride + _unless(a, "p", "padding", 0)


def _recurrent(a: Mapping[str, Any]) -> str:
    layers = f" x{a['num_layers']}" if a.get("num_layers", 1) != 1 else ""
    return f"{a['input_size']}->{a['hidden_size']}{layers}{' bidirectional' if a.get('bidirectional') is True else ''}"


def _normalisation(a: Mapping[str, Any]) -> str:
    shape = a["normalized_shape"]
    return "x".join(map(str, shape)) if isinstance(shape, (tuple, list)) else str(shape)


_FORMS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], str]], ...] = (
    (("in_channels", "out_channels", "kernel_size"), _convolution),
    (
        ("in1_features", "in2_features", "out_features"),
        lambda a: "{in1_features},{in2_features}->{out_features}".format(**a),
    ),
    (("in_features", "out_features"), lambda a: f"{a['in_features']}->{a['out_features']}"),
    (("num_embeddings", "embedding_dim"), lambda a: f"{a['num_embeddings']}->{a['embedding_dim']}"),
    (("embed_dim", "num_heads"), lambda a: f"{a['embed_dim']} h{a['num_heads']}"),
    (("input_size", "hidden_size"), _recurrent),
    (("normalized_shape",), _normalisation),
    (("num_groups", "num_channels"), lambda a: f"{a['num_channels']} g{a['num_groups']}"),
    (("num_features",), lambda a: str(a["num_features"])),
    (("kernel_size",), _pooling),
    (("output_size",), lambda a: _number(a["output_size"])),
    (("scale_factor",), lambda a: f"x{_number(a['scale_factor'])}"),
    (("upscale_factor",), lambda a: f"x{_number(a['upscale_factor'])}"),
    (("negative_slope",), lambda a: _number(a["negative_slope"])),
    (("nx", "nf"), lambda a: f"{a['nx']}->{a['nf']}"),
    (("p",), lambda a: _number(a["p"])),
)
