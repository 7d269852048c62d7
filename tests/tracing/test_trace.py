"""A shadow runs anything, touches nothing, and says what it could not do."""

import functools
import itertools
import random
import re
import threading
import weakref

import numpy
import pytest
import torch
from torch import nn

from modsurg.tracing.trace import run, shadow


def snapshot(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [None if each.grad is None else each.grad.clone() for each in model.parameters()]
    modes = [module.training for module in model.modules()]
    kept = [{key: id(value) for key, value in vars(module).items()} for module in model.modules()]
    return state, gradients, modes, kept


def same(one, other):
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][key], other[0][key]) for key in one[0])
    assert all(a is b or torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    assert one[2:] == other[2:]


class Conditional(nn.Module):
    """Can't run on meta, draws random numbers, and changes a buffer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        random.random(), numpy.random.rand(), torch.rand(3)
        x = self.layer(self.norm(nn.functional.dropout(x)))
        return x if x.sum().item() > 0 else -x


@pytest.mark.parametrize("fallback", [False, True])
def test_nothing_of_the_model_or_the_process_changes(fallback):
    model = Conditional()
    calls = []
    model.layer.register_forward_hook(lambda *args: calls.append(args))
    model(torch.rand(3, 4)).sum().backward()
    calls.clear()
    before, states = snapshot(model), (random.getstate(), torch.get_rng_state(), numpy.random.get_state()[1].copy())
    example = torch.rand(3, 4)
    torch.set_rng_state(states[1])
    kept = example.clone()
    trace = run(model, example, fallback=fallback)
    same(before, snapshot(model))
    assert calls == []
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (numpy.random.get_state()[1] == states[2]).all()
    assert torch.equal(example, kept)
    assert trace.failure is None
    assert "can't run on meta tensors: Tensor.item()" in trace.note
    assert trace.note.startswith("ran a real copy" if fallback else "not run")


def test_a_model_of_ten_gigabytes_costs_nothing():
    model = nn.Sequential(nn.Linear(50_000, 50_000, device="meta"), nn.ReLU())
    trace = run(model, (2, 50_000))
    assert trace.macs[""] == 2 * 50_000**2
    assert all(each.is_meta for each in shadow(model).parameters())


def test_memory_of_a_real_model_is_not_doubled():
    resource = pytest.importorskip("resource")
    model = nn.Sequential(*(nn.Linear(4000, 4000) for _ in range(5)))
    run(nn.Linear(2, 2), (1, 2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(model, (64, 4000))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


def test_shapes_calls_and_multiply_adds_of_every_path():
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    trace = run(nn.ModuleDict({"a": nn.Sequential(block, block), "b": nn.Linear(4, 2)}) and Stack(block), (3, 4))
    assert trace.calls == {"": 1, "first": 1, "first.0": 1, "first.1": 1, "second": 1, "second.0": 1, "second.1": 1}
    assert trace.outputs["second.0"] == ((3, 4),)
    assert trace.macs == {"": 96, "first": 48, "first.0": 48, "second": 48, "second.0": 48}


class Stack(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.first = block
        self.second = block

    def forward(self, x):
        return self.second(self.first(x))


def test_one_module_called_a_hundred_times():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(100):
                x = self.cell.forward(x)
            return x

    trace = run(Loop(), (1, 4))
    assert trace.calls["cell"] == 100
    assert trace.macs["cell"] == 1600


def test_never_called_and_why():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.direct = nn.Linear(8, 8)
            self.dead = nn.Sequential(nn.Linear(8, 8))
            self.listed = nn.ModuleList([nn.ReLU()])

        def forward(self, x):
            x = self.attention(x, x, x)[0]
            return self.listed[0](nn.functional.linear(x, self.direct.weight))

    trace = run(Net(), (1, 3, 8))
    assert trace.uncalled == ("attention.out_proj", "direct", "dead", "dead.0")
    assert trace.bypassed == {
        "attention.out_proj": "MultiheadAttention reads its weights and does not call it",
        "direct": "Net reads its weights and does not call it",
    }


def test_the_fast_path_of_a_transformer_layer_is_named():
    trace = run(nn.TransformerEncoderLayer(8, 2, batch_first=True).eval(), (1, 3, 8))
    assert "fast path" in trace.bypassed["linear1"]
    assert trace.macs[""] == 3 * 8 * 8 * 4 + 2 * 3 * 3 * 8 + 2 * 3 * 8 * 2048


def test_the_innermost_failing_module_is_named_with_its_shapes():
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(9, 2)))
    trace = run(model, (3, 4))
    assert trace.failure.path == "1.1"
    assert str(trace.failure).startswith("1.1 (Linear, weight 2x9, bias 2) on 3x8: ")
    assert trace.calls == {"": 1, "0": 1, "1": 1, "1.0": 1, "1.1": 1}


def test_arguments_that_forward_does_not_take():
    trace = run(nn.Linear(2, 2), {"picture": torch.zeros(1, 2)})
    assert trace.failure.path == ""
    assert "unexpected keyword argument 'picture'" in str(trace.failure)


def test_an_error_that_the_model_handles_is_none():
    class Patient(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Linear(9, 2), nn.Linear(4, 2)

        def forward(self, x):
            try:
                return self.wide(x)
            except RuntimeError:
                return self.narrow(x)

    assert run(Patient(), (1, 4)).failure is None


@pytest.mark.parametrize(
    "example",
    [(2, 4), torch.zeros(2, 4), (torch.zeros(2, 4),), {"x": torch.zeros(2, 4)}, {"x": (2, 4)}, ((2, 4), (2, 4))],
)
def test_forms_of_an_example(example):
    class Net(nn.Module):
        def forward(self, x, y=None):
            return x @ (x if y is None else y).T

    assert run(Net(), example).macs[""] == 2 * 4 * 2


def test_a_shape_is_of_whole_numbers_where_the_model_looks_things_up():
    assert run(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2)), (3, 5)).outputs[""] == ((3, 5, 2),)


def test_each_shape_may_be_of_whole_numbers_or_not():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.look, self.layer = nn.Embedding(10, 4), nn.Linear(4, 4)

        def forward(self, x, tokens):
            return self.layer(x) + self.look(tokens)

    trace = run(Net(), {"x": (2, 3, 4), "tokens": (2, 3)})
    assert trace.failure is None
    assert trace.macs[""] == 96


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(4, 4), (2, 4)), (nn.Conv1d(4, 4, 1), (2, 4, 4)), (nn.ConvTranspose1d(4, 4, 1), (2, 4, 4))],
)
def test_what_no_device_computes_fails_on_meta_too(layer, shape):
    model = nn.Sequential(nn.Identity(), layer.half())
    trace = run(model, torch.zeros(shape))
    assert trace.failure.path == "1"
    assert "it takes tensors of one dtype, not float32 and float16: convert the input, x.to(torch.float16)" in str(
        trace.failure
    )


def test_autocast_computes_with_two_dtypes():
    with torch.autocast("cpu", torch.bfloat16):
        assert run(nn.Linear(4, 4).half(), torch.zeros(2, 4)).failure is None


def test_a_forward_that_takes_a_gradient_of_its_own():
    class Force(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = nn.Linear(4, 1)

        def forward(self, x):
            return torch.autograd.grad(self.energy(x).sum(), x)[0]

    trace = run(Force(), torch.zeros(2, 4, requires_grad=True))
    assert (trace.failure, trace.note) == (None, "")
    assert trace.outputs[""] == ((2, 4),)
    assert trace.macs[""] == 8


def test_modules_under_vmap():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return torch.func.vmap(self.layer)(x)

    trace = run(Mapped(), (3, 5, 4))
    assert trace.note == ""
    assert trace.outputs == {"": ((3, 5, 2),), "layer": ((5, 2),)}
    assert trace.macs["layer"] == 3 * 5 * 8
    assert trace.activations["layer"] == 3 * 5 * 2 * 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_has_no_one_length(layout):
    class Ragged(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(torch.nested.nested_tensor([x, x[:1]], layout=layout))

    trace = run(Ragged(), (3, 4), fallback=True)
    assert trace.failure is None
    assert trace.outputs["layer"] == ((2, -1, 2),)
    assert trace.macs["layer"] == 4 * 8


def _never(*args):
    raise AssertionError("compiled")


def test_compiled_functions_are_not_compiled():
    class Compiled(nn.Module):
        def __init__(self):
            super().__init__()
            self.function = torch.compile(torch.matmul, backend=_never)

        def forward(self, x):
            return self.function(x, x)

    trace = run(Compiled(), (3, 3))
    assert trace.failure is None
    assert trace.macs[""] == 27


def test_sources_of_random_numbers_that_a_model_holds():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.torch, self.python = torch.Generator(), random.Random(0)
            self.numpy, self.count = numpy.random.default_rng(0), itertools.count()
            self.table = numpy.zeros(3)

        def forward(self, x):
            self.table += self.python.random() + self.numpy.random() + next(self.count)
            return x + torch.rand(4, generator=self.torch)

    model = Noisy()
    before = model.torch.get_state(), model.python.getstate(), model.numpy.bit_generator.state
    assert run(model, (2, 4)).failure is None
    assert torch.equal(model.torch.get_state(), before[0])
    assert (model.python.getstate(), model.numpy.bit_generator.state) == before[1:]
    assert (next(model.count), model.table.tolist()) == (0, [0, 0, 0])


@functools.lru_cache(maxsize=4)
def table(size):
    return torch.ones(size, size)


@functools.cache
def tables(size):
    return [{"table": table(size)}, torch.zeros(size, size)]


def test_what_functions_remember_is_not_the_shadows():
    class Cached(nn.Module):
        def forward(self, x):
            return x + table(300)[0] + tables(300)[1][0]

    assert run(Cached(), (2, 300)).note == ""
    assert Cached()(torch.zeros(2, 300)).device.type == "cpu"
    before = table(300)
    run(Cached(), (2, 300))
    assert table(300) is before


def test_an_interrupted_run_leaves_nothing_that_functions_remember():
    class Interrupted(nn.Module):
        def forward(self, x):
            table(301)
            raise KeyboardInterrupt("in forward")

    with pytest.raises(KeyboardInterrupt, match="in forward"):
        run(Interrupted(), (2, 301))
    assert table(301).device.type == "cpu"


def test_a_generator_that_has_no_state_to_copy():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.system = random.SystemRandom()

        def forward(self, x):
            return x + self.system.random()

    trace = run(Noisy(), (2, 4))
    assert (trace.failure, trace.note) == (None, "")


def test_files_and_tables_of_numpy_that_a_model_holds(tmp_path):
    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            numpy.savez(tmp_path / "tables.npz", table=numpy.arange(4.0))
            self.file = numpy.load(tmp_path / "tables.npz")
            self.large = numpy.memmap(tmp_path / "large", numpy.float32, "w+", shape=(1 << 16,))
            self.objects = numpy.array([nn.Linear(2, 2)], dtype=object)

        def forward(self, x):
            return x + float(self.file["table"][1]) + float(self.large[0])

    model = Holding()
    trace = run(model, (2, 4))
    assert (trace.failure, trace.note) == (None, "")
    assert trace.model.file is model.file
    assert numpy.shares_memory(trace.model.large, model.large)
    assert trace.model.objects[0] is model.objects[0]
    assert model.file["table"][3] == 3
    model.file.close()


@pytest.mark.parametrize("fallback", [False, True])
def test_a_large_table_that_a_forward_writes_to_stays_as_it_is(fallback):
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.large = numpy.zeros(1 << 16)

        def forward(self, x):
            self.large += 1
            return x

    model = Writing()
    trace = run(model, (2, 4), fallback=fallback)
    assert trace.failure is None
    assert "not run; " in trace.note
    assert "is read-only" in trace.note
    assert model.large.flags.writeable
    assert not model.large.any()


def test_a_mask_may_be_asked_for_its_values():
    class Masked(nn.Module):
        def forward(self, x, mask):
            return x if mask.to(x.device).all() else x * mask

    trace = run(Masked(), (torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)))
    assert trace.note == ""
    assert trace.outputs[""] == ((2, 3),)


def test_a_mask_that_forward_makes_may_be_asked_for_its_values():
    class Masked(nn.Module):
        def forward(self, x):
            mask = torch.ones(x.shape[:2], device=x.device)
            return x if mask.sum() == mask.numel() else x[0]

    trace = run(Masked(), (2, 3))
    assert trace.note == ""
    assert trace.outputs[""] == ((2, 3),)


def test_outputs_of_every_kind():
    from dataclasses import dataclass

    @dataclass
    class Out:
        first: torch.Tensor
        rest: dict

    class Net(nn.Module):
        def forward(self, x):
            return Out(x, {"a": [x[0], None], "b": "text"})

    assert run(Net(), (2, 3)).outputs[""] == ((2, 3), (3,))


def test_what_is_made_in_forward_without_a_device():
    class Net(nn.Module):
        constant = torch.ones(4)

        def forward(self, x):
            table = torch.arange(x.shape[1]).float() + torch.zeros(4, device="cpu") + torch.Tensor([1.0, 2, 3, 4])
            return (x + table).to("cpu").cpu() * self.constant + torch.rand(100_000)[:4]

    trace = run(Net(), (2, 4))
    assert trace.failure is None
    assert trace.note == ""
    assert trace.outputs[""] == ((2, 4),)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
        lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
        lambda: nn.LazyLinear(4),
        lambda: torch.compile(nn.Linear(4, 4)),
        lambda: nn.DataParallel(nn.Linear(4, 4)),
        lambda: nn.Sequential(torch.compile(nn.Linear(4, 4))),
        lambda: nn.Linear(4, 4, device="meta"),
        lambda: nn.Linear(4, 4).requires_grad_(False).eval(),
    ],
)
def test_kinds_of_modules(make):
    model = make()
    before = [type(module) for module in model.modules()]
    trace = run(model, (3, 4))
    assert trace.failure is None
    assert trace.note == ""
    assert trace.outputs[""] == ((3, 4),)
    assert [type(module) for module in model.modules()] == before


def test_pruned_and_old_weight_norm():
    from torch.nn.utils import prune

    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    assert run(layer, (3, 4)).macs[""] == 48
    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Linear(4, 4))
    assert run(old, (3, 4)).macs[""] == 48


def test_torchscript_runs_as_a_real_copy():
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)))
    assert run(model, (3, 4)).note.startswith("not run; TorchScript runs as a whole")
    trace = run(model, (3, 4), fallback=True)
    assert trace.outputs[""] == ((3, 4),)
    assert trace.note.startswith("ran a real copy; TorchScript")


def test_attributes_of_every_kind_are_the_shadows_own():
    class Config:
        def __init__(self):
            self.seen = 0

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.blocks = [self.layer]
            self.again = weakref.ref(self.layer)
            self.method = self.layer.forward
            self.partial = functools.partial(self.helper, factor=2)
            layer = self.layer
            self.closure = lambda x: layer(x)
            self.constant = torch.ones(4)
            self.table = numpy.ones(4)
            self.lock = threading.Lock()
            self.config = Config()
            self.log = []

        def helper(self, x, factor):
            return self.layer(x) * factor

        def forward(self, x):
            self.config.seen += 1
            self.log.append(x)
            with self.lock:
                x = self.blocks[0](x) + self.again()(x) + self.method(x) + self.partial(x) + self.closure(x)
            return x * self.constant

    model = Net()
    calls = []
    model.layer.register_forward_hook(lambda *args: calls.append(args))
    trace = run(model, (2, 4))
    assert trace.failure is None
    assert trace.calls["layer"] == 4  # the bound forward is the caller's own work
    assert trace.macs[""] == 5 * 32
    assert (calls, model.log, model.config.seen) == ([], [], 0)


def test_a_very_deep_tree():
    model = nn.Identity()
    for _ in range(600):
        model = nn.ModuleList([model])
    assert sum(1 for _ in shadow(model).modules()) == 601


def test_a_batch_too_small_to_train_on_is_run_with_norms_in_eval_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    trace = run(model, (1, 4))
    assert trace.failure is None
    assert trace.note.startswith("run with its norms in eval mode; in train mode 1 (BatchNorm1d")
    assert model.training


def test_memory_of_outputs():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 2), nn.Sigmoid())
    trace = run(model, (3, 4))
    assert [trace.activations.get(str(index), 0) for index in range(5)] == [96, 0, 0, 24, 24]
    assert trace.activations[""] == 144


@torch.library.custom_op("modsurg_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Calling(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self.layer, x)


def energy(layer, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(layer(x).square().sum(), x)[0]


@pytest.mark.parametrize("function", [energy, lambda layer, x: torch.vmap(layer)(x)], ids=["gradient", "vmap"])
def test_gradients_and_vmap_inside_forward_run_on_meta(function):
    trace = run(Calling(function), (2, 4))
    assert (trace.failure, trace.note) == (None, "")
    assert trace.outputs[""] == ((2, 4),)


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda layer, x: doubled(x), "no fake impl"),
        (lambda layer, x: torch.autocast(x.device.type, enabled=False).__enter__(), "unsupported scalarType"),
        (lambda layer, x: torch.nested.nested_tensor([x]).to_padded_tensor(0), "storage_device"),
        (lambda layer, x: x.set_(torch.zeros(8).untyped_storage()), "set the storage of a tensor on device"),
    ],
    ids=["custom operator", "autocast", "nested", "storage"],
)
def test_what_meta_can_not_do_is_no_failure(function, reason):
    trace = run(Calling(function), (2, 4))
    assert trace.failure is None
    assert reason in trace.note


@pytest.mark.parametrize(
    "error",
    [
        ValueError("storage of features must be NCHW"),
        RuntimeError("cache not allocated: call setup()"),
        OSError("no data pointer in the file"),
        KeyError("meta"),
    ],
    ids=repr,
)
def test_an_error_of_the_models_own_is_a_failure(error):
    def fail(layer, x):
        raise error

    trace = run(Calling(fail), (2, 4))
    assert trace.failure is not None
    assert trace.failure.error is error


@pytest.mark.parametrize(
    "model, reason",
    [
        (nn.Sequential(nn.ModuleList([nn.ReLU()])), 'missing the required "forward"'),
        (nn.Upsample(scale_factor=2, mode="bilinear"), "bilinear mode needs 4D input"),
    ],
)
def test_what_torch_has_no_forward_for_is_a_failure(model, reason):
    assert reason in str(run(model, (1, 3, 4)).failure)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)

    def forward(self, tokens):
        return self.embed(tokens[tokens != 0])


REASON = r"can't run on meta tensors: (the shape of what torch\.nonzero gives depends on values|aten::nonzero: .*)"
"""The second where torch (2.6) has no words of its own for it."""


def test_a_real_copy_is_given_whole_numbers_too_for_a_shape():
    trace = run(Masked(), (2, 6), fallback=True)
    assert trace.failure is None
    assert trace.outputs["embed"] == ((12, 4),)
    assert re.fullmatch(f"ran a real copy; Masked {REASON}", trace.note)


def test_whole_numbers_for_a_shape_are_indices_that_every_embedding_has():
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(1, 4)

        def forward(self, tokens):
            found = self.embed(tokens)
            return found if found.sum().item() > 0 else -found

    trace = run(Looking(), (2, 6), fallback=True)
    assert trace.failure is None
    assert trace.outputs["embed"] == ((2, 6, 4),)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_run_in_a_real_copy(layout):
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)], layout=layout)
    trace = run(nn.Sequential(nn.Linear(8, 4)), nested, fallback=True)
    assert trace.failure is None
    assert trace.macs[""] == 5 * 8 * 4
    assert trace.note.endswith("a nested tensor has no copy on meta")


class Wanting(Masked):
    def forward(self, tokens, targets=None):
        if self.training and targets is None:
            raise ValueError("targets should not be none")
        return super().forward(tokens)


def test_what_train_mode_wants_is_said_first():
    wanted = "in train mode the model (Wanting) on 2x6: targets should not be none"
    told, real = run(Wanting(), (2, 6)).note, run(Wanting(), (2, 6), fallback=True).note
    assert re.fullmatch(f"not run: {re.escape(wanted)}; in eval mode Wanting {REASON}", told)
    assert re.fullmatch(f"run in eval mode; {re.escape(wanted)}; ran a real copy; Wanting {REASON}", real)


def test_a_mode_that_is_kept_is_not_exchanged_for_another():
    assert run(Wanting(), (2, 6), keep_mode=True).failure.message == "targets should not be none"


def test_a_part_in_train_mode_is_helped_too():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    model[0].train()
    assert run(model, (1, 4)).note.startswith("run with its norms in eval mode")


def test_a_norm_without_statistics_fails_on_one_value_as_it_does_for_real():
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)).eval()
    assert "Expected more than 1 value" in str(run(model, (1, 4)).failure)
