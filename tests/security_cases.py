"""The hostile trees, by what they try. Each is opened in `tests/security` and by a process of its own with limits."""

import base64
import zlib

from hostile import IDENTITY, MODULE_DICT, SEQUENTIAL, one, parametrized, tree

METHODS = [
    "eval",
    "train",
    "extra_repr",
    "modules",
    "forward",
    "state_dict",
    "_call_impl",
    "_apply",
    "__call__",
    "__del__",
]
METHODS += [
    "__getattr__",
    "__bool__",
    "__len__",
    "__iter__",
    "__repr__",
    "__class__",
    "__dict__",
    "_compiled_call_impl",
]


def packed(data):
    return base64.b64encode(zlib.compress(data)).decode()


def code_that_runs(mark):
    """Trees that would leave `mark` behind, were anything of them run; (label, tree, trust)."""
    write = {"method": [{"path": mark}, "write_text"]}
    source = f"open({mark!r}, 'w').write('ran')\ndef forward(self, *a): return a\n"
    python_code = {"partial": [3, [], {"src": source, "globals": {"dict": {}}}]}
    for holder in ("argparse:Namespace", "types:SimpleNamespace", "torch.nn.utils.rnn:PackedSequence"):
        names = [
            "torchvision.models.feature_extraction:DualGraphModule",
            MODULE_DICT,
            IDENTITY,
            "functools:partial",
            holder,
        ]
        graph = {"object": {"class": 4, "state": {"_codegen": None, "python_code": python_code}}}
        for name in METHODS:
            attributes = {"training": True, "_graph": graph, name: {"method": [0, "recompile"]}}
            yield f"graph module {name} {holder}", tree(names, [{"attributes": attributes}]), ()
        yield (
            f"graph module {holder}",
            tree(names, [{"attributes": {"training": True, "_graph": graph}}]),
            ("torch", "torchvision"),
        )
    call = {"partial": [2, ["content"], {"key": write}]}
    for callee in ("builtins:max", "builtins:sorted", "torch:relu", "functools:reduce"):
        for names in (["dup", "dup"], ["__del__"], ["__len__"], ["forward"], ["training"], ["_modules"]):
            yield f"parametrized {names} {callee}", parametrized([callee], *names), ()
        for table in ("_forward_pre_hooks", "_forward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"):
            yield f"hook {table} {callee}", one(None, [IDENTITY, callee], hooks={table: [[0, call]]}), ()
            yield f"hook list {table} {callee}", one(None, [IDENTITY, callee], hooks=[[table, call]]), ()
        yield f"value {callee}", one(call, [IDENTITY, callee]), ()
        inner = {"partial": [2, [], {"key": {"partial": [2, [], {}]}}]}
        yield f"partial in a partial {callee}", one(inner, [IDENTITY, callee]), ()
    for name in METHODS:
        yield (
            f"relu as {name}",
            tree([IDENTITY, "torch:relu"], [{"attributes": {"training": True, name: {"name": 1}}}]),
            (),
        )
        yield f"child as {name}", tree([IDENTITY], [{}, {"children": {name: 0}}]), ()
        yield (
            f"buffer as {name}",
            tree(
                [IDENTITY],
                [{"buffers": {name: 0}}],
                tensors=[{"dtype": "float32", "shape": [1], "data": packed(bytes(4))}],
            ),
            (),
        )
        yield (
            f"method as {name}",
            tree([SEQUENTIAL], [{"attributes": {"training": True, name: {"method": [0, "append"]}}}]),
            (),
        )
    weights = "torchvision.models.resnet:ResNet18_Weights"
    for get in (
        {"enum": [1, "IMAGENET1K_V1"]},
        {"method": [{"enum": [1, "IMAGENET1K_V1"]}, "get_state_dict"]},
        {"name": 1},
    ):
        yield f"weights {get}", one(get, [weights]), ()
        yield f"weights in a partial {get}", one({"partial": [1, [get], {}]}, [weights]), ()
    data = {"object": {"class": 1, "state": {"url": mark, "transforms": {"name": 2}, "meta": {"dict": {}}}}}
    yield "a data object with a function", one(data, ["torchvision.models._api:Weights", "torch:relu"]), ()
    deep = {"object": {"class": 1, "state": {"meta": {"list": [{"dict": {"a": {"method": [0, "forward"]}}}]}}}}
    yield "a data object with a method inside", one(deep, ["torchvision.models._api:Weights"]), ()
    later = {"object": {"class": 1, "state": {"meta": {"shared": 0}}}}
    yield (
        "a data object with a shared list",
        one(later, ["torchvision.models._api:Weights"], shared=[{"list": [{"module": 0}]}]),
        (),
    )
    for name in ("timm.models._helpers:load_state_dict", "timm.models._hub:load_model_config_from_hf"):
        yield name, one({"name": 1}, [name]), ("timm",)
        yield f"partial of {name}", one({"partial": [1, [mark], {"weights_only": False}]}, [name]), ("timm",)


def too_much(_):
    """Trees that would take much time or memory."""
    n = 28
    pairs = [{"dict": {"a": 1}}, *({"list": [{"shared": i}, {"shared": i}]} for i in range(n))]
    config = "torchvision.models.convnext:CNBlockConfig"
    objects = [{"object": {"class": 1, "state": {"a": {"shared": i - 1} if i else 1}}} for i in range(n)]
    named = [
        {"object": {"class": 1, "args": [{"shared": i - 1}, {"shared": i - 1}] if i else [1, 1]}} for i in range(n)
    ]
    yield "aliases in a set", one({"set": [{"shared": n}]}, shared=pairs), ()
    yield "objects in a set", one({"set": [{"shared": n - 1}]}, [config], shared=objects), ()
    yield (
        "named tuples in a set",
        one({"set": [{"shared": n - 1}]}, ["torch.nn.utils.rnn:PackedSequence_"], shared=named),
        (),
    )
    yield "a regular expression", one({"regex": ["(" * 40 + "a" + "{1,9}){1,9}" * 40, 0]}), ()
    yield "an array without values", one({"array": 0}, tensors=[{"dtype": "float32", "shape": [1 << 32]}]), ()
    yield "numbers of one hash", one({"set": [i * (2**61 - 1) for i in range(1, 3500)]}), ()
    yield (
        "one value repeated",
        one(
            None,
            tensors=[small(), {"dtype": "float32", "shape": [1 << 40], "of": 0, "offset": 0, "stride": [0]}],
            buffers={"b": 1},
        ),
        (),
    )
    yield (
        "a negative place",
        one(
            None,
            tensors=[
                small(),
                {"dtype": "float32", "shape": [0, 1 << 60], "of": 0, "offset": 1 << 62, "stride": [1 << 62] * 2},
            ],
            buffers={"b": 1},
        ),
        (),
    )
    yield (
        "large strides",
        one(None, tensors=[{**small(), "shape": [1, 1], "stride": [1 << 60, 1]}], buffers={"b": 0}),
        (),
    )
    yield (
        "large strides of two",
        one(
            None,
            tensors=[{"dtype": "float32", "shape": [2], "stride": [1 << 40], "data": packed(bytes(8))}],
            buffers={"b": 0},
        ),
        (),
    )
    bomb = {"dtype": "float32", "shape": [1 << 20], "data": packed(bytes(4 << 20))}
    yield "zeros that unpack", one(None, tensors=[bomb] * 16, buffers={f"b{i}": i for i in range(16)}), ()
    yield (
        "a chain",
        one({"shared": 0}, shared=[*({"list": [{"shared": i + 1}]} for i in range(3000)), {"list": []}]),
        (),
    )
    deep = 1
    for _ in range(400):
        deep = [deep]
    yield "deep lists", one(deep), ()
    yield "many names", tree([IDENTITY, *(f"torchvision.models.a{i}:X" for i in range(2500))], [{}]), ()
    yield "a long name", one(None, ["torchvision.models." + "a" * 40_000 + ":X"]), ()
    yield "a long attribute", tree([IDENTITY], [{"attributes": {"training": True, "a" * 70_000: 1}}]), ()
    yield "a long logger", one({"logger": ".".join(["a"] * 40_000)}), ()
    yield "a long size", one({"size": [1 << 60] * 10}), ()
    yield "a range", one({"list": [{"range": [0, 10**18, 1]}]}), ()
    yield "many paths", tree([SEQUENTIAL], [{}, *({"children": {str(k): i for k in range(9)}} for i in range(9))]), ()
    yield "a large number", one(int("9" * 4000)), ()
    yield "values that are shared", one({"list": [{"shared": 0}] * 20_000}, shared=[{"list": list(range(30))}]), ()


def small():
    return {"dtype": "float32", "shape": [1], "data": packed(bytes(4))}
