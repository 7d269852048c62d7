"""Partners in random trees: what was done to a model is what is found."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modsurg.views.diff.api import diff
from modsurg.views.diff.build import two_sides
from modsurg.views.diff.match import Matching

LEAVES = [
    lambda: nn.Linear(3, 3),
    lambda: nn.Linear(3, 5, bias=False),
    lambda: nn.Conv1d(2, 2, 1),
    lambda: nn.BatchNorm1d(3),
    nn.ReLU,
    lambda: nn.Dropout(0.5),
    nn.Identity,
]


def random_tree(chance: random.Random, depth: int = 3) -> nn.Module:
    if depth == 0 or chance.random() < 0.3:
        return chance.choice(LEAVES)()
    children = [random_tree(chance, depth - 1) for _ in range(chance.randint(1, 4))]
    if chance.random() < 0.5:
        return nn.Sequential(*children)
    module = nn.Module()
    for number, child in enumerate(children):
        module.add_module(f"part_{'abcd'[number]}", child)
    if chance.random() < 0.2:
        module.add_module("again", children[0])
    return module


def grown(seed: int) -> tuple[nn.Module, random.Random]:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    return nn.Sequential(random_tree(chance), random_tree(chance), nn.Linear(4, 4)), chance


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_a_copy_is_equal_and_everything_has_a_partner(seed):
    model, _ = grown(seed)
    twin = copy.deepcopy(model)
    old, new = two_sides(model, twin)
    matching = Matching(old.root, new.root)
    assert all(matching.new_of[node].path == node.path for node in old.root.below())
    assert not diff(model, twin)
    assert not diff(model.state_dict(), twin)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_two_unrelated_trees_give_partners_one_to_one(seed):
    old, new = two_sides(grown(seed)[0], grown(seed + 1)[0])
    matching = Matching(old.root, new.root)
    assert all(matching.old_of[partner] is node for node, partner in matching.new_of.items())
    assert len(matching.new_of) == len(matching.old_of)
    assert diff(grown(seed)[0], grown(seed + 1)[0]) or str(grown(seed)[0]) == str(grown(seed + 1)[0])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_one_replaced_leaf_is_one_change(seed):
    model, chance = grown(seed)
    new = copy.deepcopy(model)
    paths = [path for path, module in new.named_modules() if path and not list(module.children())]
    path = chance.choice(paths)
    new.set_submodule(path, nn.Tanh())
    found = [change for change in diff(model, new) if change.kind != "tied"]
    assert [(change.kind, change.path) for change in found] == [("replaced", path)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_a_tree_under_another_parent_is_found_again(seed):
    model, _ = grown(seed)
    new = nn.ModuleDict({"body": copy.deepcopy(model), "head": nn.Linear(7, 1)})
    assert [(change.kind, change.old_path, change.path) for change in diff(model, new)] == [("wrapped", "", "body")]
    assert [change.kind for change in diff(new, model)] == ["unwrapped"]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.data())
def test_any_blocks_left_out(count, data):
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(count))
    kept = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    new = nn.ModuleList(copy.deepcopy(blocks[i]) for i in kept)
    found = diff(blocks, new)
    assert {int(change.path) for change in found if change.kind == "removed"} == set(range(count)) - set(kept)
    renamed = {int(change.old_path): int(change.path) for change in found if change.kind == "renamed"}
    assert renamed == {old: number for number, old in enumerate(kept) if old != number}
    assert set(found.counts) <= {"removed", "renamed"}
    assert diff(new, blocks).counts.get("added", 0) == count - len(kept)


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(6)))
def test_any_order_of_equal_blocks(order):
    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(6)))
    new = nn.Sequential(*(copy.deepcopy(blocks[i]) for i in order))
    found = {(change.old_path, change.path) for change in diff(blocks, new)}
    assert found == {(str(old), str(number)) for number, old in enumerate(order) if old != number}


@pytest.mark.parametrize("count", [1000])
def test_a_long_chain_of_alike_layers(count):
    chain = nn.Sequential(*(nn.ReLU() for _ in range(count)))
    new = copy.deepcopy(chain)
    del new[500]
    assert [change.kind for change in diff(chain, new)] == ["removed"]


def test_a_deep_tree():
    model = nn.Linear(1, 1)
    twin = copy.deepcopy(model)
    for _ in range(2000):
        model, twin = nn.Sequential(model), nn.Sequential(twin)
    assert not diff(model, twin)


@st.composite
def edited(draw):
    """Numbers of old blocks, and of new ones: some left out, some moved, fresh ones (from 100 on) put in."""
    olds = list(range(draw(st.integers(1, 7))))
    news = [number for number in olds if draw(st.booleans())]
    if draw(st.booleans()):
        news = draw(st.permutations(news))
    for fresh in range(draw(st.integers(0, 3))):
        news.insert(draw(st.integers(0, len(news))), 100 + fresh)
    return olds, news


@pytest.mark.parametrize("as_state", [False, True])
@settings(max_examples=150, deadline=None)
@given(edited())
def test_blocks_left_out_put_in_and_moved_are_named_exactly(as_state, lists):
    olds, news = lists
    torch.manual_seed(0)
    made = {number: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)) for number in sorted({*olds, *news})}
    old, new = (nn.Sequential(*(copy.deepcopy(made[number]) for number in side)) for side in (olds, news))
    found = list(diff(old.state_dict(), new.state_dict()) if as_state else diff(old, new))
    named = {(change.kind, change.old_path, change.path) for change in found if change.kind != "values"}
    renewed = {(int(change.old_path[0]), int(change.path[0])) for change in found if change.kind == "values"}
    gone = {number for number in olds if number not in news} - {i for i, _ in renewed}
    come = {j for j, number in enumerate(news) if number >= 100} - {j for _, j in renewed}
    pairs = {(i, news.index(i)) for i in olds if i in news} | renewed
    assert named == {
        *(("removed", str(i), str(i)) for i in gone),
        *(("added", None, str(j)) for j in come),
        *(("renamed", str(i), str(j)) for i, j in pairs if i != j),
    }
    assert all(i not in news and news[j] >= 100 for i, j in renewed)
    if [i for i in news if i < 100] == sorted(i for i in news if i < 100):
        kept = set(news)
        before = {(i, j): (sum(k in kept for k in olds[:i]), sum(k < 100 for k in news[:j])) for i, j in renewed}
        assert all(i == j or before[i, j][0] == before[i, j][1] for i, j in renewed)
