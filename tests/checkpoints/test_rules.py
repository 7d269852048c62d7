"""Tensors that another project stores otherwise: joined, cut, transposed, resampled, and back."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loads import refused
from torch import nn

from modsurg import convert, load_model, load_state, read_state, save_model, save_state, verify
from modsurg.checkpoints.formats.memory import MemorySource
from modsurg.checkpoints.rules import apply_rules, parse_rule, rule_as_code
from modsurg.errors import FormatError, LoadError, SaveError
from modsurg.rules import Concat, Interpolate, Split, Transpose


class Apart(nn.Module):
    def __init__(self, kv=8):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, kv), nn.Linear(8, kv)


class Packed(nn.Module):
    def __init__(self, kv=8):
        super().__init__()
        self.qkv = nn.Linear(8, 8 + 2 * kv)


def tower(kind, **sizes):
    return nn.ModuleDict({"blocks": nn.ModuleList([kind(**sizes) for _ in range(12)]), "head": nn.Linear(8, 2)})


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(("kv", "sizes"), [(8, None), (2, (8, 2, 2))])
def test_apart_and_packed_both_ways(tmp_path, suffix, kv, sizes):
    rule = Concat([f"blocks.*.{name}" for name in "qkv"], "blocks.*.qkv", sizes=sizes)
    apart, packed, again = tower(Apart, kv=kv), tower(Packed, kv=kv), tower(Apart, kv=kv)
    path = save_state(apart, tmp_path / f"a{suffix}")
    assert load_state(packed, path, rules=[rule])
    x = torch.randn(3, 8)
    parts = [getattr(apart["blocks"][11], name)(x) for name in "qkv"]
    assert torch.allclose(packed["blocks"][11].qkv(x), torch.cat(parts, -1), atol=1e-6)
    assert load_state(again, packed.state_dict(), rules=[rule.inverse()])
    assert equal(again.state_dict(), apart.state_dict())
    there = convert(path, tmp_path / f"b{suffix}", rules=[rule]).target
    assert list(read_state(there))[:2] == ["blocks.0.qkv.weight", "blocks.0.qkv.bias"]
    assert verify(there)
    back = convert(there, tmp_path / "c.safetensors", rules=[rule.inverse()]).target
    assert equal(dict(read_state(back)), apart.state_dict())


class Conv1D(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, out))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_transposed_both_ways(tmp_path):
    old = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"fc": Conv1D(8, 8), "proj": Conv1D(8, 4)})])})
    new = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(8, 8), "proj": nn.Linear(8, 4)})])})
    rule = Transpose(["h.*.fc", "h.*.proj"])
    load_state(new, save_state(old, tmp_path / "a.pt"), rules=[rule])
    x = torch.randn(2, 8)
    for name in ("fc", "proj"):
        assert torch.allclose(new["h"][0][name](x), old["h"][0][name](x), atol=1e-6)
    again = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"fc": Conv1D(8, 8), "proj": Conv1D(8, 4)})])})
    load_state(again, new.state_dict(), rules=[rule.inverse()])
    assert equal(again.state_dict(), old.state_dict())


def test_rules_then_rename_and_only(tmp_path):
    path = save_state(tower(Apart), tmp_path / "a.pt")
    model = nn.ModuleDict({"layer": nn.ModuleList([Packed() for _ in range(12)])})
    rule = Concat(["blocks.*.q", "blocks.*.k", "blocks.*.v"], "blocks.*.qkv")
    report = load_state(model, path, rules=[rule], rename={"blocks": "layer"}, only="layer")
    assert len(report.loaded) == 24
    load_state(model, read_state(path), rules=[rule], rename={"blocks": "layer", "head": None})


@pytest.mark.parametrize("rules", [Transpose("weight"), 3, "weight", ["weight"]])
def test_rules_that_are_not_a_list(rules):
    refused(nn.Linear(2, 2), nn.Linear(2, 2).state_dict(), "must be a list of rules", rules=rules)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_wrappers_put_in_keys_does_not_count(prefix):
    apart, packed, again = tower(Apart, kv=2), tower(Packed, kv=2), tower(Apart, kv=2)
    rule = Concat([f"blocks.*.{name}" for name in "qkv"], "blocks.*.qkv")
    state = {prefix + key: value for key, value in apart.state_dict().items()}
    assert load_state(packed, state, rules=[rule])
    state = {prefix + key: value for key, value in packed.state_dict().items()}
    assert load_state(again, state, rules=[rule.inverse()])
    assert equal(again.state_dict(), apart.state_dict())
    old, new = Eyes((4, 4)), Eyes((3, 7))
    load_state(new, {prefix + "pos_embed": old.pos_embed}, rules=[Interpolate("pos_embed")])
    assert torch.equal(new.pos_embed[:, 0], old.pos_embed[:, 0])


def test_a_whole_model_is_a_state_after_rules(tmp_path):
    path = save_model(tower(Apart), tmp_path / "model.safetensors")
    state = convert(path, tmp_path / "state.safetensors", rules=[Transpose("head")]).target
    with pytest.raises(FormatError, match="load_state"):
        load_model(state)
    assert read_state(state)["head.weight"].shape == (8, 2)


def test_onto_the_meta_device(tmp_path):
    old = Eyes((4, 4))
    with torch.device("meta"):
        new = Eyes((6, 6))
    load_state(new, save_state(old, tmp_path / "a.safetensors"), on_mismatch="interpolate")
    assert torch.equal(new.pos_embed[:, 0], old.pos_embed[:, 0])
    assert load_state(old, save_state(old, tmp_path / "b.pt"), rules=[Interpolate("pos_embed")], verify=False)


def test_a_state_of_the_model_itself():
    model = nn.Linear(4, 4, bias=False)
    before = model.weight.detach().clone()
    load_state(model, model.state_dict(), rules=[Transpose("weight")])
    assert torch.equal(model.weight, before.t())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Concat(["blocks.*.x", "blocks.*.k"], "blocks.*.qkv"), r"'blocks\.\*\.x' matches no key"),
        (Concat(["blocks.*.q", "blocks.*.x"], "blocks.*.qkv"), r"there is no blocks\.0\.x\.weight"),
        (Concat(["blocks.*.q", "head"], "blocks.*.qkv", dim=1), r"can't be joined along dimension 1"),
        (Concat(["blocks.*.q", "blocks.*.k"], "blocks.*.qkv", dim=1), r"no dimension 1"),
        (Concat(["blocks.*.q", "blocks.*.k"], "head"), r"two tensors would be called head\.weight"),
        (Split("blocks.*.q", ["blocks.*.a", "blocks.*.b", "blocks.*.c"]), r"can't be cut into \[2, 2, 2\]"),
        (
            Concat(["blocks.*.q", "blocks.*.k"], "blocks.*.qk", sizes=(8, 4)),
            r"the sizes along dimension 0 are \[8, 8\]",
        ),
        (Split("**.*.q", ["a", "b"]), "at most one"),
        (Split("blocks.*.q", ["a.*.*", "b"]), "at most one"),
        (Transpose("nothing"), "no matrix matches"),
        (Interpolate("head.bias", grid=(2, 2)), "can't tell how"),
        ("blocks", "must be a list of rules"),
    ],
)
def test_rules_that_can_not_be_used(tmp_path, rule, message):
    state = tower(Apart).state_dict()
    refused(tower(Packed), state, message, rules=[rule])
    path = save_state(state, tmp_path / "a.pt")
    with pytest.raises(SaveError, match=f"{message}.*nothing was written" if rule != "blocks" else message):
        convert(path, tmp_path / "b.pt", rules=[rule])
    assert not (tmp_path / "b.pt").exists()


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    path = save_state(tower(Apart), tmp_path / "a.safetensors")
    with pytest.raises(LoadError, match="in the model"):
        load_state(nn.Linear(2, 2), path, rules=[Concat(["blocks.*.q", "blocks.*.k", "blocks.*.v"], "blocks.*.qkv")])


class Eyes(nn.Module):
    """What a vision transformer has that its position embeddings depend on."""

    def __init__(self, grid, prefix=1, width=8):
        super().__init__()
        self.patch_embed = nn.Identity()
        self.patch_embed.grid_size = grid
        self.pos_embed = nn.Parameter(torch.randn(1, prefix + grid[0] * grid[1], width))


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("grid", [(6, 6), (3, 7), (2, 2)])
def test_position_embeddings_follow_the_number_of_patches(tmp_path, grid, prefix):
    old, new = Eyes((4, 4), prefix), Eyes(grid, prefix)
    path = save_state(old, tmp_path / "a.pt")
    refused(new, path, r"pos_embed  file \(1, \d+, 8\)")
    report = load_state(new, path, on_mismatch="interpolate")
    assert list(report.resampled) == ["pos_embed"]
    assert "resampled  pos_embed" in str(report)
    assert torch.equal(new.pos_embed[:, :prefix], old.pos_embed[:, :prefix])
    picture = old.pos_embed[:, prefix:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    wanted = nn.functional.interpolate(picture, grid, mode="bicubic", antialias=True)
    assert torch.allclose(new.pos_embed[:, prefix:], wanted.permute(0, 2, 3, 1).reshape(1, -1, 8), atol=1e-6)


def test_a_grid_that_is_not_square_is_in_a_rule(tmp_path):
    old, new = Eyes((3, 7)), Eyes((4, 4))
    path = save_state(old, tmp_path / "a.pt")
    text = refused(new, path, r"not a square of patches: load_state\(", on_mismatch="interpolate")
    rule = Interpolate("pos_embed", grid=(4, 4), old_grid=(3, 7))
    assert eval(text.split("rules=")[1].split(")\n")[0]) == [rule]
    load_state(new, path, rules=[rule])
    assert torch.equal(new.pos_embed[:, 0], old.pos_embed[:, 0])
    done = convert(path, tmp_path / "b.safetensors", rules=[rule])
    assert torch.equal(read_state(done.target)["pos_embed"], new.pos_embed)
    back = convert(done.target, tmp_path / "c.pt", rules=[rule.inverse()])
    assert read_state(back.target)["pos_embed"].shape == old.pos_embed.shape


@pytest.mark.parametrize("grid", [(6, 6), (3, 7)])
def test_a_rule_without_a_grid_has_that_of_the_model(grid):
    old, new = Eyes((4, 4)), Eyes(grid)
    load_state(new, old.state_dict(), rules=[Interpolate("pos_embed")])
    again = Eyes(grid)
    load_state(again, old.state_dict(), on_mismatch="interpolate")
    assert torch.equal(new.pos_embed, again.pos_embed)
    assert torch.equal(new.pos_embed[:, 0], old.pos_embed[:, 0])


def test_a_split_without_sizes_has_those_of_the_model():
    rule = Concat(["blocks.*.q", "blocks.*.k", "blocks.*.v"], "blocks.*.qkv")
    apart, packed, again = tower(Apart, kv=2), tower(Packed, kv=2), tower(Apart, kv=2)
    load_state(packed, apart.state_dict(), rules=[rule])
    load_state(again, packed.state_dict(), rules=[rule.inverse()])
    assert equal(again.state_dict(), apart.state_dict())


def test_two_stars_are_any_number_of_segments():
    one, many = nn.ModuleDict({"stages": tower(Apart)}), nn.ModuleDict({"stages": tower(Packed)})
    report = load_state(many, one.state_dict(), rules=[Concat([f"**.{name}" for name in "qkv"], "**.qkv")])
    assert len(report.loaded) == 26
    refused(many, one.state_dict(), "matches no key", rules=[Concat(["*.q", "*.k", "*.v"], "*.qkv")])


def test_what_is_made_of_tied_tensors_is_tied(tmp_path):
    shared = Apart()
    apart, packed = nn.ModuleDict({"a": shared, "b": shared}), Packed()
    tied = nn.ModuleDict({"a": packed, "b": packed})
    rule = Concat(["*.q", "*.k", "*.v"], "*.qkv")
    path = convert(save_state(apart, tmp_path / "a.pt"), tmp_path / "b.safetensors", rules=[rule]).target
    assert read_state(path).source.notes.ties == {"b.qkv.weight": "a.qkv.weight", "b.qkv.bias": "a.qkv.bias"}
    assert load_state(tied, path)
    back = convert(path, tmp_path / "c.pt", rules=[rule.inverse()]).target
    assert equal(dict(read_state(back)), apart.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Concat("q", "qkv"), "must be a list of keys"),
        (lambda: Concat([], "qkv"), "at least one"),
        (lambda: Split("qkv", ["q", "q"]), "must be different keys"),
        (lambda: Split("qkv", ["q", 3]), "must be a list of keys"),
        (lambda: Split(["qkv"], ["q", "k"]), "must be a key"),
        (lambda: Split("qkv", ["q", "k"], sizes=(2,)), "must be 2 positive integers"),
        (lambda: Concat(["q", "k"], "qk", sizes=(2, 0)), "must be 2 positive integers"),
        (lambda: Transpose(3), "must be a key"),
        (lambda: Interpolate("pos_embed", grid=14), "must be rows and columns"),
    ],
)
def test_arguments_of_another_type(make, message):
    with pytest.raises(LoadError, match=message):
        make()


@pytest.mark.parametrize(
    "rule",
    [
        Concat(["a.*", "b.*"], "c.*", 1, sizes=(2, 3)),
        Split('say "hi"', ["x", "y"]),
        Transpose("h.*"),
        Interpolate(["a", "b"], grid=(3, 4)),
    ],
)
def test_a_rule_as_code_is_read_as_that_rule(rule):
    assert parse_rule(rule_as_code(rule)) == rule == parse_rule(repr(rule))
    assert rule.inverse().inverse() == rule


@pytest.mark.parametrize(
    "text", ["", "Merge('a')", "Transpose(print(1))", "Transpose('a'", "Transpose()", "__import__('os')"]
)
def test_other_code_is_not_a_rule(text):
    with pytest.raises(LoadError, match=r"is not a rule.*Try: Transpose"):
        parse_rule(text)


def test_relative_positions_of_windows():
    old, new = nn.Module(), nn.Module()
    for module, window in ((old, 7), (new, 12)):
        module.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, 4))
        module.register_buffer("relative_position_index", torch.arange(window**4).reshape(window**2, window**2))
    report = load_state(new, old.state_dict(), on_mismatch="interpolate")
    assert list(report.skipped) == ["relative_position_index"]
    picture = old.relative_position_bias_table.t().reshape(1, 4, 13, 13)
    wanted = nn.functional.interpolate(picture, (23, 23), mode="bicubic").reshape(4, -1).t()
    assert torch.allclose(new.relative_position_bias_table, wanted, atol=1e-6)


def test_what_is_not_a_position_is_not_resampled():
    model, other = nn.ModuleDict({"head": nn.Linear(8, 16)}), nn.ModuleDict({"head": nn.Linear(8, 25)})
    refused(model, other.state_dict(), r"head\.weight  file \(25, 8\)", on_mismatch="interpolate")


def follow(model, state, text):
    """Run the line that an error recommends."""
    found = text.split("They match with load_state(..., rules=")[1].split(") (from modsurg.rules)")[0]
    return load_state(model, state, rules=eval(found))


def test_the_error_proposes_to_join_and_to_cut():
    apart, packed = tower(Apart), tower(Packed)
    text = refused(packed, apart.state_dict(), r'rules=\[Concat\(\["blocks\.\*\.q", "blocks\.\*\.k", "blocks')
    assert follow(packed, apart.state_dict(), text)
    text = refused(apart, packed.state_dict(), r"rules=\[Split\(")
    again = {key: value.clone() for key, value in apart.state_dict().items()}
    assert follow(apart, packed.state_dict(), text)
    assert equal(again, apart.state_dict())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(0, 2),
    st.integers(1, 3),
)
def test_any_split_is_undone_by_its_inverse(sizes, shape, dim, layers):
    """Whatever the sizes, the dimension and the number of layers, and whether dimensions are counted from the end."""
    dim %= len(shape)
    shape[dim] = sum(sizes)
    state = {f"h.{layer}.x": torch.randn(shape) for layer in range(layers)}
    names = [f"h.*.part{number}" for number in range(len(sizes))]
    for given_dim in (dim, dim - len(shape)):
        rule = Split("h.*.x", names, given_dim, sizes)
        apart = apply_rules(MemorySource(state), [rule])
        assert [apart[f"h.0.part{n}"].shape[dim] for n in range(len(sizes))] == sizes
        parts = {key: apart.read(key) for key in apart}
        again = apply_rules(MemorySource(parts), [rule.inverse()])
        assert equal({key: again.read(key) for key in again}, state)


@pytest.mark.parametrize("names", ["kvq", "vkq"])
@pytest.mark.parametrize("form", ["{}", "{}_proj", "to_{}"])
def test_proposed_parts_are_in_the_order_of_the_packed_name(names, form):
    """Whatever the order in the file."""
    apart = nn.ModuleDict({form.format(name): nn.Linear(8, 8) for name in names})
    text = refused(nn.ModuleDict({"in_proj": nn.Linear(8, 24)}), apart.state_dict(), "Shapes do not show the order")
    assert f"Concat({json.dumps([form.format(name) for name in 'qkv'])}" in text
    text = refused(nn.ModuleDict({"kqv": nn.Linear(8, 24)}), apart.state_dict(), "Shapes do not show the order")
    assert f"Concat({json.dumps([form.format(name) for name in 'kqv'])}" in text


class Block(nn.Module):
    """A layer of a transformer, with the names of one project."""

    def __init__(self, attention, norms, packed):
        super().__init__()
        names = {"qkv": 24, "proj": 8} if packed else {"q_proj": 8, "k_proj": 8, "v_proj": 8, "o_proj": 8}
        first, second = norms
        layers = nn.ModuleDict({name: nn.Linear(8, size) for name, size in names.items()})
        if packed:
            self.add_module(first, nn.LayerNorm(8))
            self.add_module(attention, layers)
        else:
            self.add_module(attention, layers)
            self.add_module(first, nn.LayerNorm(8))
        self.add_module(second, nn.LayerNorm(8))
        for module in self.modules():
            for parameter in module.parameters():
                nn.init.normal_(parameter)


def projects():
    packed = nn.ModuleDict({"blocks": nn.ModuleList(Block("attn", ("norm1", "norm2"), True) for _ in range(3))})
    packed.pos_embed = nn.Parameter(torch.randn(1, 5, 8))
    norms = ("layernorm_before", "layernorm_after")
    apart = nn.ModuleDict({"layers": nn.ModuleList(Block("attention", norms, False) for _ in range(3))})
    apart.embeddings = nn.Module()
    apart.embeddings.position_embeddings = nn.Parameter(torch.randn(1, 5, 8))
    return packed, apart


def test_the_error_proposes_rules_and_names_together():
    """What is packed in one project has another home in the other."""
    (packed, apart), (_, again) = projects(), projects()
    text = refused(packed, apart.state_dict(), "Shapes do not tell layers or parts of one shape apart")
    arguments = text.split("They match with load_state(..., ")[1].split(") (from modsurg.rules)")[0]
    assert load_state(packed, apart.state_dict(), **eval(f"dict({arguments})"))
    for old, new in zip(apart["layers"], packed["blocks"], strict=True):
        parts = [old.attention[f"{name}_proj"].weight for name in "qkv"]
        assert torch.equal(new.attn["qkv"].weight, torch.cat(parts))
        assert torch.equal(new.attn["proj"].weight, old.attention["o_proj"].weight)
        assert torch.equal(new.norm1.weight, old.layernorm_before.weight)
        assert torch.equal(new.norm2.weight, old.layernorm_after.weight)
    text = refused(again, packed.state_dict(), r"rules=\[Split\(.*rename=")
    arguments = text.split("They match with load_state(..., ")[1].split(") (from modsurg.rules)")[0]
    assert load_state(again, packed.state_dict(), **eval(f"dict({arguments})"))
    assert equal(again.state_dict(), apart.state_dict())


def arguments_of(text):
    return eval(f"dict({text.split('load_state(..., ')[1].split(') (from modsurg.rules)')[0]})")


def test_the_error_proposes_rules_for_torchs_own_attention():
    torchs = nn.ModuleList([nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}) for _ in range(2)])
    names = {"q_proj": 8, "k_proj": 8, "v_proj": 8, "out_proj": 8}

    def layer():
        return nn.ModuleDict({"attn": nn.ModuleDict({name: nn.Linear(8, size) for name, size in names.items()})})

    apart = nn.ModuleList([layer() for _ in range(2)])
    text = refused(torchs, apart.state_dict(), r'They match with .*"\*\.attn\.in_proj_weight"')
    assert load_state(torchs, apart.state_dict(), **arguments_of(text))
    weights = [apart[1]["attn"][f"{name}_proj"].weight for name in "qkv"]
    assert torch.equal(torchs[1]["attn"].in_proj_weight, torch.cat(weights))
    again = nn.ModuleList([layer() for _ in range(2)])
    text = refused(again, torchs.state_dict(), r"They match with .*Split\(")
    assert load_state(again, torchs.state_dict(), **arguments_of(text))
    assert equal(again.state_dict(), apart.state_dict())


def test_rules_are_proposed_where_other_keys_do_not_match():
    packed, apart = projects()
    packed.head = nn.Linear(8, 3)
    text = refused(packed, apart.state_dict(), r"\n24 keys match with load_state\(\.\.\., rules=\[Concat")
    report = load_state(packed, apart.state_dict(), **arguments_of(text))
    assert (len(report.loaded), report.missing) == (24, ["pos_embed", "head.weight", "head.bias"])
    assert report.unexpected == ["embeddings.position_embeddings"]


def test_proposed_for_several_numbers():
    apart, packed = nn.ModuleList([tower(Apart), tower(Apart)]), nn.ModuleList([tower(Packed), tower(Packed)])
    text = refused(packed, apart.state_dict(), r'Concat\(\["\*\*\.q", "\*\*\.k", "\*\*\.v"\], "\*\*\.qkv"\)\]')
    assert follow(packed, apart.state_dict(), text)


def test_the_error_proposes_to_interpolate():
    old, new = Eyes((4, 4)), Eyes((6, 6))
    refused(new, old.state_dict(), r'They match with load_state\(\.\.\., on_mismatch="interpolate"\)')
    load_state(new, old.state_dict(), on_mismatch="interpolate")


@pytest.mark.parametrize("name", ["position_embeddings", "pos_embed"])
def test_positions_in_a_text_are_not_a_picture(name):
    short, long = (nn.ModuleDict({name: nn.Embedding(count, 8)}) for count in (256, 1024))
    refused(long, short.state_dict(), "does not match", on_mismatch="interpolate")


def test_the_error_proposes_to_transpose():
    def layers(kind):
        return nn.ModuleList([nn.ModuleDict({"fc": kind(8, 6), "p": kind(8, 4)}) for _ in range(2)])

    old, new = nn.ModuleDict({"h": layers(Conv1D)}), nn.ModuleDict({"h": layers(nn.Linear)})
    text = refused(new, old.state_dict(), r'rules=\[Transpose\(\["h\.\*\.fc\.weight", "h\.\*\.p\.weight"\]\)\]')
    assert follow(new, old.state_dict(), text)
    assert torch.equal(new["h"][1]["fc"].weight, old["h"][1]["fc"].weight.t())
    old["h"][0]["fc"], new["h"][0]["fc"] = Conv1D(8, 8), nn.Linear(8, 8)
    assert "square" in refused(new, old.state_dict(), "Transpose")


def test_nothing_is_proposed_where_shapes_prove_nothing():
    for state in ({"qkv.weight": torch.ones(25, 8)}, {"a.weight": torch.ones(9, 8), "b.weight": torch.ones(9, 8)}):
        assert "rules=" not in refused(Apart(), state, "not match")
