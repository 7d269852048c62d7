"""A load that fails leaves the model byte for byte as it was, and says what would mend it."""

import copy
import json

import pytest
import torch
import torchvision
from torch import nn

from modsurg import load_state, save_state
from modsurg.errors import LoadError, ModsurgError, PatternError


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def frozen(model):
    """The model's bytes, objects and flags."""
    state = model.state_dict()
    return (
        {key: (value.clone(), value.data_ptr()) for key, value in state.items() if isinstance(value, torch.Tensor)},
        [(id(each), each.requires_grad) for each in model.parameters()],
    )


def unchanged(model, before):
    tensors, parameters = frozen(model)
    return parameters == before[1] and all(
        torch.equal(tensors[key][0], value) and tensors[key][1] == place for key, (value, place) in before[0].items()
    )


def refused(model, state, match, error=LoadError, **options):
    before = frozen(model)
    with pytest.raises(error, match=match) as caught:
        load_state(model, state, **options)
    assert unchanged(model, before)
    return str(caught.value)


def test_the_text_of_a_wrong_shape():
    model, head = nn.Module(), nn.Module()
    model.fc, head.fc = nn.Linear(512, 10), nn.Linear(512, 1000)
    text = refused(model, head.state_dict(), "nothing was loaded")
    assert text == (
        "2 of 2 keys do not fit; nothing was loaded.\n"
        '  fc.weight  file (1000, 512), model (10, 512): load_state(..., on_mismatch="skip") leaves the model\'s own\n'
        "  fc.bias    file (1000,), model (10,)"
    )


def test_the_text_of_a_missing_and_an_unexpected_key():
    state = net().state_dict()
    state["2.weigth"] = state.pop("2.weight")
    text = refused(net(), state, "do not fit")
    assert text == (
        "2 of 10 keys do not fit; nothing was loaded.\n"
        "  2.weight  not in the file\n"
        "  2.weigth  not in the model\n"
        'They fit with load_state(..., rename={"2.weigth": "2.weight"})'
    )


def test_the_nearest_key_where_no_rename_helps():
    state = net().state_dict()
    state["2.weigth"] = state.pop("2.weight")[:1]
    refused(net(), state, r'2\.weight  not in the file; nearest: "2\.weigth"')
    del state["2.weigth"]
    refused(
        net(), state, r"1 of 9 keys does not fit.*\n  2\.weight  not in the file\nload_state\(\.\.\., strict=False\)"
    )


@pytest.mark.parametrize(
    "change, fix",
    [
        (lambda key: f"backbone.{key}", {"backbone.": ""}),
        (lambda key: f"model.net.{key}", {"model.net.": ""}),
        (lambda key: key.replace("0.", "stem.", 1) if key.startswith("0.") else key, {"stem": "0"}),
        (lambda key: {"0": "a", "1": "b", "2": "c"}[key[0]] + key[1:], {"b": "1", "a": "0", "c": "2"}),
        (lambda key: f"module.backbone.{key}", {"module.backbone.": ""}),
    ],
)
def test_the_suggested_rename_is_right(change, fix):
    state = {change(key): value for key, value in net().state_dict().items()}
    text = refused(net(), state, "They fit with")
    suggested = json.loads(text.rpartition("rename=")[2].removesuffix(")"))
    assert suggested == fix
    assert load_state(net(), state, rename=suggested)


def test_a_prefix_that_the_file_lacks_is_suggested():
    model = nn.ModuleDict({"backbone": net()})
    text = refused(model, net().state_dict(), "They fit with")
    assert text.endswith('rename={"": "backbone."})')
    assert load_state(model, net().state_dict(), rename={"": "backbone."})


@pytest.mark.parametrize(
    "file, model, fits",
    [
        (torch.complex64, torch.float32, False),
        (torch.float32, torch.int64, False),
        (torch.int64, torch.bool, False),
        (torch.float32, torch.bool, False),
        (torch.float32, torch.float16, True),
        (torch.float64, torch.bfloat16, True),
        (torch.float32, torch.float8_e4m3fn, True),
        (torch.int64, torch.float32, True),
        (torch.bool, torch.uint8, True),
        (torch.int32, torch.int64, True),
        (torch.float32, torch.complex64, True),
    ],
)
def test_dtypes(file, model, fits):
    place = nn.Module()
    place.register_buffer("x", torch.zeros(3).to(model))
    state = {"x": torch.ones(3).to(file)}
    if fits:
        assert load_state(place, state)
        assert torch.equal(place.x, torch.ones(3).to(model)) or model is torch.float8_e4m3fn
    else:
        names = [str(each).removeprefix("torch.") for each in (file, model)]
        refused(place, state, f"x  file {names[0]}, model {names[1]}, which loses values")
        report = load_state(place, state, on_mismatch="skip")
        assert list(report.skipped) == ["x"]


def test_whole_numbers_that_do_not_fit():
    place = nn.Module()
    place.register_buffer("x", torch.zeros(2, dtype=torch.int32))
    assert load_state(place, {"x": torch.tensor([1, -1])})
    refused(place, {"x": torch.tensor([1, 2**40])}, "x  file int64, model int32, which loses values")


class TestOptions:
    def test_strict_off_reports(self):
        state = net().state_dict()
        del state["0.bias"]
        state["more"] = torch.ones(1)
        report = load_state(net(), state, strict=False)
        assert not report
        assert report.missing == ["0.bias"]
        assert report.unexpected == ["more"]
        assert str(report) == (
            "loaded 8 of 9 keys\n  missing  0.bias  not in the file, as it was\n  unexpected  more  not in the model"
        )

    def test_strict_off_still_refuses_a_wrong_shape(self):
        state = net().state_dict() | {"2.bias": torch.ones(5)}
        refused(net(), state, r"1 of 9 keys does not fit.*\n  2\.bias  file \(5,\), model \(2,\)", strict=False)

    def test_skip(self):
        model = net()
        own = model[2].bias.clone()
        report = load_state(model, net().state_dict() | {"2.bias": torch.ones(5)}, on_mismatch="skip")
        assert dict(report.skipped) == {"2.bias": "file (5,), model (2,)"}
        assert torch.equal(model[2].bias, own)

    @pytest.mark.parametrize("theirs, mine", [((5, 3), (2, 4)), ((2, 2), (3, 3)), ((4,), (2,)), ((2, 3, 1), (2, 3, 4))])
    def test_slice(self, theirs, mine, tmp_path):
        model = nn.Module()
        model.weight = nn.Parameter(torch.zeros(mine))
        values = torch.randn(theirs)
        for state in ({"weight": values}, save_state({"weight": values}, tmp_path / "a.safetensors")):
            report = load_state(model, state, on_mismatch="slice")
            common = tuple(slice(0, min(sizes)) for sizes in zip(theirs, mine, strict=True))
            assert torch.equal(model.weight[common], values[common])
            assert model.weight.count_nonzero() == values[common].numel()
            assert dict(report.sliced) == {"weight": f"file {theirs}, model {mine}"}

    def test_slice_needs_as_many_dimensions(self):
        refused(nn.Linear(2, 2), {"weight": torch.ones(4), "bias": torch.ones(2)}, "weight  file", on_mismatch="slice")

    def test_slice_does_not_leave_meta_half_filled(self):
        with torch.device("meta"):
            model = nn.Linear(2, 2)
        with pytest.raises(LoadError, match=r"weight  file \(1, 2\), model \(2, 2\)"):
            load_state(model, nn.Linear(2, 1).state_dict(), on_mismatch="slice")
        assert model.weight.is_meta

    @pytest.mark.parametrize("only", ["0", "0.*", ["0.weight", "0.bias"], "re:0\\..*", lambda key: key[0] == "0"])
    def test_only(self, only):
        model, other = net(), net()
        before = model[2].weight.clone()
        report = load_state(model, other.state_dict() | {"9.more": torch.ones(1)}, only=only)
        assert report
        assert list(report.loaded) == ["0.weight", "0.bias"]
        assert torch.equal(model[0].weight, other[0].weight)
        assert torch.equal(model[2].weight, before)

    def test_only_is_strict_about_what_it_chose(self):
        refused(net(), {"2.weight": torch.ones(2, 4)}, r"0\.weight  not in the file", only="0")

    def test_arguments_that_fit_nothing(self):
        refused(net(), net().state_dict(), r"only='encoder' fits no key of the model", only="encoder")
        refused(net(), net().state_dict(), r"rename: 'fc' fits no key.*The keys are like 0\.weight", rename={"fc": "a"})
        refused(net(), net().state_dict(), r"on_mismatch='crop' has to be", on_mismatch="crop")
        refused(net(), net().state_dict(), r"rename: 're:\(' does not parse", PatternError, rename={"re:(": "a"})

    def test_rename(self):
        model, other = net(), net()
        state = {f"old.{key}": value for key, value in other.state_dict().items()} | {"junk.a": torch.ones(1)}
        for rename in (
            {"old": "", "junk": None},
            {"old.": "", "junk.": None},
            {r"re:old\.(.*)": r"\1", r"re:junk\..*": None},
            lambda key: None if key.startswith("junk") else key.removeprefix("old."),
        ):
            assert load_state(copy.deepcopy(model), state, rename=rename)

    def test_two_keys_for_one_name(self):
        state = net().state_dict()
        refused(
            net(),
            state,
            r"'0\.weight' and '1\.weight' both become 'x'",
            rename=lambda key: "x" if "weight" in key else key,
        )
        refused(
            net(),
            state | {"module.0.weight": torch.ones(4, 3)},
            r"'0\.weight' and 'module\.0\.weight' both mean '0\.weight'.*rename={'module\.0\.weight': None}",
        )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"_orig_mod.module.module.{key}",
        lambda key: key.replace(".", "._orig_mod.", 1),
        lambda key: key.replace(".", ".module.", 1),
    ],
)
def test_wrappers_do_not_count(wrap):
    old, new = net(), net()
    assert load_state(new, {wrap(key): value for key, value in old.state_dict().items()})
    assert torch.equal(new[2].weight, old[2].weight)


def test_a_child_that_is_really_called_module():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.weight = nn.Parameter(torch.randn(3))

    old, new = Holder(), Holder()
    assert load_state(new, old.state_dict())
    assert torch.equal(new.module.weight, old.module.weight)
    assert torch.equal(new.weight, old.weight)


def test_a_file_from_before_batch_counters():
    state = {key: value for key, value in net().state_dict().items() if "num_batches" not in key}
    model = net()
    model[1].num_batches_tracked.fill_(7)
    assert load_state(model, state)
    assert model[1].num_batches_tracked == 7


class TestSharedMemory:
    """Parameters and buffers of a model that are views of one memory."""

    def module(self, **views):
        model = nn.Module()
        for name, view in views.items():
            model.register_buffer(name, view)
        return model

    def test_a_matrix_and_its_transpose(self):
        base = torch.zeros(2, 3)
        model = self.module(w=base, t=base.t())
        values = torch.randn(2, 3)
        assert load_state(model, {"w": values, "t": values.t().clone()})
        assert torch.equal(model.w, values)
        assert load_state(model, {"t": values.t() + 1})
        assert torch.equal(model.w, values + 1)
        refused(model, {"w": values, "t": values.t() + 1}, r"t  shares memory with w in the model.*differing")

    def test_chained_overlaps(self):
        base = torch.zeros(6)
        model = self.module(a=base[:3], b=base[2:5], c=base[4:])
        values = torch.arange(6.0)
        assert load_state(model, {"a": values[:3], "b": values[2:5].clone(), "c": values[4:].clone()})
        assert torch.equal(base, values)
        refused(model, {"a": values[:3], "b": values[2:5], "c": values[4:] + 1}, "c  shares memory with b")

    def test_views_of_another_dtype(self):
        base = torch.zeros(4)
        model = self.module(f=base, i=base.view(torch.int32))
        values = torch.randn(4)
        assert load_state(model, {"f": values, "i": values.view(torch.int32)})
        assert torch.equal(base, values)
        refused(model, {"f": values, "i": values.view(torch.int32) + 1}, "i  shares memory with f")

    def test_neighbours_in_one_memory_do_not_share(self):
        base = torch.zeros(6)
        model = self.module(a=base[:3], b=base[3:])
        assert load_state(model, {"a": torch.ones(3), "b": torch.full((3,), 2.0)})
        assert base.tolist() == [1, 1, 1, 2, 2, 2]

    def test_expanded(self, tmp_path):
        model = self.module(e=torch.zeros(1, 3).expand(4, 3))
        values = torch.randn(1, 3).expand(4, 3)
        assert load_state(model, save_state({"e": values}, tmp_path / "a.safetensors"))
        assert torch.equal(model.e, values)
        assert model.e.stride() == (0, 1)
        refused(model, {"e": torch.randn(4, 3)}, "e  has many places for one value")

    def test_conjugate_and_negative_places(self):
        base = torch.zeros(3, dtype=torch.complex64)
        model = self.module(c=base.conj(), n=torch.zeros(3, dtype=torch.complex64).conj().imag)
        state = {"c": torch.randn(3, dtype=torch.complex64), "n": torch.randn(3)}
        assert load_state(model, state)
        assert torch.equal(model.c, state["c"])
        assert torch.equal(model.n, state["n"])


class TestCustomCode:
    """Modules that load in their own way."""

    def test_old_keys_of_torchvision(self):
        model = torchvision.models.vision_transformer.MLPBlock(4, 8, 0.0)
        state = {
            key.replace("0.", "linear_1.").replace("3.", "linear_2."): torch.randn_like(value)
            for key, value in model.state_dict().items()
        }
        assert load_state(model, state)
        assert torch.equal(model[0].weight, state["linear_1.weight"])

    def test_a_pre_hook(self):
        model = net()
        model.register_load_state_dict_pre_hook(
            lambda module, state, *rest: state.update({"0.bias": state.pop("0.b")} if "0.b" in state else {})
        )
        state = net().state_dict()
        state["0.b"] = state.pop("0.bias")
        assert load_state(model, state)
        assert torch.equal(model[0].bias, state["0.b"])

    def test_a_hook_that_fails_is_rolled_back(self):
        model = net()

        def hook(module, state, *rest):
            module[0].weight.data.zero_()
            module.note = "changed"
            module.extra = nn.Linear(1, 1)
            raise RuntimeError("no such version")

        model.register_load_state_dict_pre_hook(hook)
        refused(model, net().state_dict(), "loading code of the model's own refused.*\n.*no such version")
        assert not hasattr(model, "note")
        assert not hasattr(model, "extra")

    def test_a_wrong_shape_is_rolled_back(self):
        model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        refused(
            model,
            {**model.state_dict(), "bias": torch.ones(5)},
            r"1 of 3 keys does not fit.*\n  bias  file \(5,\), model \(2,\)",
        )
        refused(model, {"bias": torch.ones(2)}, r"parametrizations\.weight\.original0  not in the file")
        report = load_state(model, {**model.state_dict(), "bias": torch.ones(5)}, on_mismatch="skip")
        assert list(report.skipped) == ["bias"]

    def test_weight_norm_of_both_kinds(self):
        old = nn.utils.weight_norm(nn.Linear(3, 2))
        new = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        assert load_state(new, old.state_dict())
        assert torch.equal(new(torch.ones(1, 3)), old(torch.ones(1, 3)))

    def test_parametrized_and_spectral_norm(self, tmp_path):
        for make in (
            nn.utils.parametrizations.spectral_norm,
            nn.utils.spectral_norm,
            nn.utils.parametrizations.orthogonal,
        ):
            old, new = make(nn.Linear(3, 2)), make(nn.Linear(3, 2))
            load_state(new, save_state(old, tmp_path / "a.safetensors"))
            assert torch.equal(new.eval()(torch.ones(1, 3)), old.eval()(torch.ones(1, 3)))

    def test_lazy_modules(self):
        old = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        new = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
        assert load_state(new, old.state_dict())
        assert torch.equal(new.eval()(torch.ones(2, 3)), old.eval()(torch.ones(2, 3)))

    def test_a_lazy_module_stays_lazy_when_the_load_fails(self):
        new = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
        state = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict()
        with pytest.raises(LoadError, match=r"1\.bias  file \(5,\), model \(2,\)"):
            load_state(new, {**state, "1.bias": torch.ones(5)})
        assert isinstance(new[0].weight, nn.UninitializedParameter)
        assert new(torch.ones(1, 7)).shape == (1, 2)

    def test_code_that_replaces_a_class_method(self):
        class Doubling(nn.Linear):
            def _load_from_state_dict(self, state, prefix, *rest):
                state[prefix + "weight"] = state[prefix + "weight"] * 2
                super()._load_from_state_dict(state, prefix, *rest)

        model, other = nn.Sequential(Doubling(2, 2)), nn.Sequential(nn.Linear(2, 2))
        assert load_state(model, other.state_dict())
        assert torch.equal(model[0].weight, other[0].weight * 2)

    def test_on_meta(self):
        with torch.device("meta"):
            model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        model.register_load_state_dict_pre_hook(lambda *rest: None)
        old = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        assert load_state(model, old.state_dict())
        assert torch.equal(model(torch.ones(1, 3)), old(torch.ones(1, 3)))


def test_every_refusal_is_of_our_own_kind(tmp_path):
    path = save_state(net(), tmp_path / "a.safetensors")
    raw = path.read_bytes()
    model = net()
    before = frozen(model)
    for length in range(0, len(raw), max(1, len(raw) // 100)):
        path.write_bytes(raw[:length])
        with pytest.raises(ModsurgError, match=r"a\.safetensors"):
            load_state(model, path)
    assert unchanged(model, before)
