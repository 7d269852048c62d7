"""Models at random, and what happens to them: edits, steps, saves, loads and kills, each of them checked."""

import contextlib
import copy
import multiprocessing
import signal

import pytest
import torch
from torch import nn

from modsurg import (
    edit,
    load_checkpoint,
    load_model,
    load_state,
    save_checkpoint,
    save_model,
    save_state,
    summary,
    verify,
)
from modsurg.errors import ContainerError

WIDTH = 8
MOST = 12
ALIKE = 1 / 16  # with ones, a chain of layers would overflow


class Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = inner

    def forward(self, x):
        return x + self.inner(self.norm(x))


class Net(nn.Module):
    """A body of parts, two of them tied, and a head that changes its size and its name."""

    def __init__(self, random):
        super().__init__()
        shared = nn.Linear(WIDTH, WIDTH)
        self.body = nn.Sequential(*(part(random) for _ in range(random.randrange(1, 6))), shared, Block(shared))
        self.end = nn.Sequential(nn.Linear(WIDTH, 3))

    def forward(self, x):
        return self.end(self.body(x))


def part(random):
    """Any layer that gives what it gets, in shape."""
    return random.choice(
        (
            lambda: nn.Linear(WIDTH, WIDTH, bias=random.random() < 0.5),
            nn.Tanh,
            lambda: nn.BatchNorm1d(WIDTH),
            lambda: Block(nn.Linear(WIDTH, WIDTH)),
            lambda: nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH)),
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
        )
    )()


def bits(model):
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def assert_same(state, other):
    assert list(state) == list(other)
    assert all(torch.equal(state[key], other[key]) for key in state)


def assert_same_steps(optimizer, other):
    """Two states of an optimizer, bit for bit."""
    assert optimizer["param_groups"] == other["param_groups"]
    assert set(optimizer["state"]) == set(other["state"])
    for number, state in optimizer["state"].items():
        assert_same(state, other["state"][number])


class Life:
    """One model, its optimizer, and a folder in which it is kept."""

    def __init__(self, random, folder):
        self.random, self.folder = random, folder
        self.model = Net(random)
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def happen(self, *, kills=True):
        """One thing, by chance."""
        things = [self.change, self.take_back, self.fail, self.train, self.keep, self.keep_whole, self.resume]
        self.random.choice(things + [self.be_killed] * kills)()

    def edit_once(self, e, *, resizes=True):
        """One edit by chance."""
        random, body = self.random, self.model.body
        path = f"body.{random.choice(list(body._modules))}"
        name = next(iter(self.model.end._modules))
        edits = [
            lambda: e.replace(path, part(random)),
            lambda: e.rename(f"end.{name}", "head" if name == "0" else "0"),
            lambda: e.freeze(path),
            lambda: e.unfreeze(path),
        ]
        if resizes:
            edits += [lambda: e.resize(f"end.{name}", out_features=random.randrange(1, 9))]
        if len(body) < MOST:
            edits += [lambda: e.insert_before(path, part(random)), lambda: e.insert_after(path, part(random))]
            edits += [lambda: e.wrap(path, Block)]
        if len(body) > 1:
            edits += [lambda: e.remove(path)] * 3
        with contextlib.suppress(ContainerError):  # the shared layer stands in a Block too, where no neighbour can be
            random.choice(edits)()

    def edits(self):
        """A transaction of one to three edits; the parameters that were there keep their values and their place."""
        before = bits(self.model)
        with edit(self.model, optimizer=self.optimizer) as e:
            for turn in range(self.random.randrange(1, 4)):
                self.edit_once(e, resizes=turn == 0)  # there and back, a size is the same with other weights
        after = self.model.state_dict()
        for key, value in e.report.remap(before).items():
            assert after[key].shape != value.shape or torch.equal(after[key], value), key
        stepped = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        own = {id(p): p.requires_grad for p in self.model.parameters()}
        assert stepped <= set(own)
        assert stepped >= {number for number, trains in own.items() if trains}
        return e.report

    def change(self):
        self.edits()
        assert summary(self.model, (2, WIDTH)).to_dict()["total"]["params"] == sum(
            p.numel() for p in self.model.parameters()
        )

    def take_back(self):
        before, steps = bits(self.model), copy.deepcopy(self.optimizer.state_dict())
        self.edits().undo()
        assert_same(self.model.state_dict(), before)
        assert_same_steps(self.optimizer.state_dict(), steps)

    def fail(self):
        before, steps = bits(self.model), copy.deepcopy(self.optimizer.state_dict())
        with pytest.raises(ZeroDivisionError, match="now"), edit(self.model, optimizer=self.optimizer) as e:
            self.edit_once(e)
            raise ZeroDivisionError("now")
        assert_same(self.model.state_dict(), before)
        assert_same_steps(self.optimizer.state_dict(), steps)

    def train(self):
        self.optimizer.zero_grad()
        self.model(torch.randn(4, WIDTH)).square().mean().backward()
        self.optimizer.step()

    def keep(self):
        """Save the weights in one of the formats, and load them into a model with others."""
        path = self.folder / self.random.choice(("a.safetensors", "a.pt", "a.safetensors.index.json"))
        save_state(self.model, path, shard_size="2KB" if path.name.endswith(".json") else None)
        assert verify(path)
        self.assert_loads(path)
        return path

    def assert_loads(self, path):
        other = copy.deepcopy(self.model)
        for tensor in other.state_dict().values():
            tensor.fill_(7)
        assert load_state(other, path)
        assert_same(other.state_dict(), self.model.state_dict())

    def keep_whole(self):
        parametrized = any(map(nn.utils.parametrize.is_parametrized, self.model.modules()))  # torch can't pickle these
        path = self.folder / self.random.choice(
            ("whole.safetensors", "whole.safetensors" if parametrized else "whole.pt")
        )
        save_model(self.model, path)
        other, x = load_model(path, trust=(Net, Block)), torch.randn(2, WIDTH)
        assert repr(other) == repr(self.model)
        assert_same(other.state_dict(), self.model.state_dict())
        assert torch.equal(other.eval()(x), copy.deepcopy(self.model).eval()(x))

    def resume(self):
        """Go on from a checkpoint of model and optimizer."""
        path = self.folder / "run.safetensors"
        save_checkpoint(path, step=3, model=self.model, optimizer=self.optimizer)
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        for tensor in model.state_dict().values():
            tensor.fill_(7)
        for state in optimizer.state.values():
            state["exp_avg"].fill_(7)
        load_checkpoint(path, model=model, optimizer=optimizer)
        assert_same(model.state_dict(), self.model.state_dict())
        assert_same_steps(optimizer.state_dict(), self.optimizer.state_dict())

    def be_killed(self):
        """A process that saves other weights over ours ends at some moment: the file is the old one or the new one."""
        path = self.keep()
        saver = multiprocessing.get_context("fork").Process(target=self.save_and_die, args=(path,))
        saver.start()
        saver.join()
        assert verify(path)
        if saver.exitcode == 0:
            self.be_alike()
        self.assert_loads_either(path)
        save_state(self.model, path, shard_size="2KB" if path.name.endswith(".json") else None)
        self.assert_loads(path)

    def be_alike(self):
        for tensor in self.model.state_dict().values():
            tensor.fill_(ALIKE)

    def assert_loads_either(self, path):
        other = copy.deepcopy(self.model)
        load_state(other, path)
        if not all(torch.all(tensor == tensor.new_tensor(ALIKE)) for tensor in other.state_dict().values()):
            assert_same(other.state_dict(), self.model.state_dict())

    def save_and_die(self, path):
        torch.set_num_threads(1)
        self.be_alike()
        signal.setitimer(signal.ITIMER_REAL, self.random.uniform(1e-6, 0.02))
        save_state(self.model, path, shard_size="2KB" if path.name.endswith(".json") else None)
