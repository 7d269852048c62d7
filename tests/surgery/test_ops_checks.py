import pytest
import torch
from torch import nn

from modsurg import add, edit, freeze, insert_after, remove, rename, replace, resize, select, wrap
from modsurg.errors import ContainerError, EditError, ModsurgWarning, WrapperError
from modsurg.tree.wrappers import wrapper_kind


class Held(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_scripted_model_is_refused_before_a_change():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    for verb in (
        lambda: replace(scripted, "1", nn.GELU()),
        lambda: insert_after(scripted, "1", nn.GELU()),
        lambda: remove(scripted, "1"),
        lambda: resize(scripted, "0", out_features=3),
        lambda: freeze(scripted, "0"),
    ):
        with pytest.raises(
            WrapperError, match=r"ScriptModule\), and nothing was changed: .*torch.jit.script\(edited\)"
        ):
            verb()
    model = nn.Sequential(scripted, nn.ReLU())
    with pytest.raises(WrapperError, match='"0.1" can\'t be edited: "0" is a RecursiveScriptModule'):
        replace(model, "0.1", nn.GELU())
    replace(model, "0", nn.Linear(2, 2))
    assert type(model[0]) is nn.Linear


def test_data_parallel_is_refused():
    model = nn.DataParallel(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(WrapperError, match=r"DataParallel \(DataParallel\).*`parallel.module`"):
        replace(model, "module.0", nn.ReLU())


def test_ddp_and_fsdp_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(2, 2)))
        with pytest.raises(WrapperError, match=r"\(DDP\).*`ddp.module`, before wrapping"):
            replace(ddp, "module.0", nn.ReLU())
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = fully_shard(nn.Sequential(nn.Linear(2, 2)), mesh=mesh)
        assert wrapper_kind(sharded) == "FSDP2"
        with pytest.raises(WrapperError, match=r"\(FSDP2\).*before fully_shard"):
            replace(sharded, "0", nn.ReLU())
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_model_is_edited_and_runs_the_edit():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    compiled = torch.compile(model, backend="eager")
    x = torch.ones(1, 2)
    compiled(x)
    replace(compiled, "1", lambda old: nn.Threshold(100.0, 7.0))
    assert compiled(x).tolist() == [[7.0, 7.0]]
    assert type(model[1]) is nn.Threshold


def test_a_hook_of_accelerate_is_refused_and_may_be_wrapped():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0]._hf_hook = object()
    with pytest.raises(EditError, match=r'"0" is under a hook of accelerate.*remove_hook_from_module'):
        replace(model, "0", nn.Linear(2, 2))
    with pytest.raises(EditError, match="would not know of the edit"):
        resize(model, "0", out_features=3)
    wrap(model, "0", nn.Sequential)


def test_nothing_new_is_put_beside_offloaded_weights():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())).to("meta")
    model[1][0]._hf_hook = object()
    linear = nn.Linear(2, 2)
    for verb in (
        lambda: insert_after(model, "1.0", linear),
        lambda: wrap(model, "1.0", lambda old: nn.Sequential(old, nn.Linear(2, 2))),
        lambda: replace(model, "1.1", linear),
    ):
        with pytest.raises(EditError, match=r'"1\.[01]" is under a hook of accelerate'):
            verb()
    assert not linear.weight.is_meta
    replace(model, "0", nn.Linear(2, 2))


@pytest.mark.parametrize(
    "verb",
    [
        lambda m: remove(m, "0.parametrizations"),
        lambda m: remove(m, "0.parametrizations", delete=True),
        lambda m: wrap(m, "0.parametrizations.weight", nn.Sequential),
        lambda m: remove(m, "0.parametrizations.weight.0"),
        lambda m: replace(m, "0.parametrizations", nn.Identity()),
        lambda m: replace(m, "0.parametrizations.weight", nn.Identity()),
        lambda m: replace(m, "0.parametrizations.weight.0", nn.Identity()),
        lambda m: insert_after(m, "0.parametrizations.weight.0", nn.Identity()),
        lambda m: rename(m, "0.parametrizations.weight", "bias"),
        lambda m: rename(m, "0.parametrizations", "made"),
    ],
)
def test_where_torch_keeps_a_parametrization_is_refused(verb):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    before = model(torch.ones(1, 2))
    with pytest.raises(
        EditError, match=r'"0.para.*to take it off: .*remove_para.*\(model.get_submodule\("0"\), "weight"\)'
    ):
        verb(model)
    assert torch.equal(model(torch.ones(1, 2)), before)


def test_a_parametrization_among_other_sites_is_left():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.ReLU())
    with pytest.warns(ModsurgWarning, match=r'"0.para.*weight.0" is where .* ParametrizedLinear: left as it was'):
        remove(model, lambda path, module: not module._modules)
    assert torch.equal(model(torch.ones(1, 2)), model[0](torch.ones(1, 2)))


def test_what_attention_reads_is_told():
    class Masked(nn.Linear):
        def forward(self, x):
            return super().forward(x * 0)

    attention = nn.MultiheadAttention(4, 2)
    with pytest.warns(ModsurgWarning, match='"out_proj" is never called: MultiheadAttention reads its bias, weight'):
        replace(attention, "out_proj", lambda old: Masked(4, 4))
    assert replace(attention, "out_proj", lambda old: Masked(4, 4)).warnings == ()  # no other forward than before
    with pytest.raises(EditError, match='"out_proj": MultiheadAttention reads bias, weight of it, which Held does not'):
        wrap(attention, "out_proj", Held)


def test_among_several_the_one_that_is_read_stays():
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    with pytest.warns(ModsurgWarning, match='"1.out_proj": MultiheadAttention reads .* Held does not have: left as it'):
        report = wrap(model, nn.Linear, Held)
    assert [change.paths for change in report.changes] == [("0",)]
    x = torch.ones(1, 1, 4)
    model[1](x, x, x)


@torch.no_grad()
def test_the_fast_path_does_not_pass_a_new_module_by():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model = nn.TransformerEncoder(layer, 1).eval()
    calls = []

    class Counted(Held):
        def forward(self, x):
            calls.append(1)
            return self.base(x)

    x = torch.randn(1, 3, 8)
    before = model(x)
    with pytest.warns(ModsurgWarning, match='"layers.0": the fast path .* is turned off'):
        report = wrap(model, "layers.0.linear1", Counted)
    torch.testing.assert_close(model(x), before)
    assert calls == [1]
    report.undo()
    assert model.layers[0].activation_relu_or_gelu == 1


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "verb",
    [
        lambda m: wrap(m, "layers.0.linear1", Held),
        lambda m: replace(m, "layers.1.norm1", lambda old: nn.RMSNorm(8)),
        lambda m: remove(m, "layers.0.norm1"),
    ],
)
def test_an_encoder_that_would_nest_its_padded_batch_runs_the_edit(verb):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    before = model(x, src_key_padding_mask=padding)
    with pytest.warns(ModsurgWarning, match='"layers..": the fast path of this nn.TransformerEncoderLayer .* off'):
        report = verb(model)
    after = model(x, src_key_padding_mask=padding)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        torch.testing.assert_close(after, model(x, src_key_padding_mask=padding))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    report.undo()
    torch.testing.assert_close(model(x, src_key_padding_mask=padding), before, rtol=0, atol=0)


def test_the_first_layer_of_an_encoder_is_read_by_it():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    with pytest.raises(EditError, match='"layers.0": TransformerEncoder reads self_attn of it, which Held does not'):
        wrap(model, "layers.0", Held)
    wrap(model, "layers.1", Held)
    with pytest.warns(ModsurgWarning, match="picks children of layers by number"):
        remove(model, "layers.0", count=1).undo()
    assert model(torch.ones(2, 1, 8)).shape == (2, 1, 8)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ReLU()])
        self.act = nn.ReLU()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.act(x)


def test_no_identity_stands_for_a_list():
    model = Twice()
    with pytest.raises(EditError, match=r'"blocks" is a ModuleList, which has no .*: ') as error:
        remove(model, "*")
    assert str(model) == str(Twice())
    exec(str(error.value).partition("To empty it: ")[2].rstrip("."), {"remove": remove, "model": model})
    assert model(torch.ones(1)) == 1
    unused = nn.Sequential(nn.Linear(2, 2))
    unused[0].extra = nn.ModuleDict({"a": nn.ReLU()})
    with pytest.raises(EditError, match=r'"0.extra" is a ModuleDict, which has no forward, .* To delete it: ') as error:
        remove(unused, "0.extra")
    exec(str(error.value).partition("To delete it: ")[2].rstrip("."), {"remove": remove, "model": unused})
    assert unused(torch.ones(1, 2)).shape == (1, 2)
    with pytest.warns(ModsurgWarning, match='"act": the code of Twice references self.act, which it will not .* more'):
        remove(model, "act", delete=True)


def test_a_traced_graph_keeps_the_names_that_it_calls():
    model = torch.fx.symbolic_trace(
        nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), nn.ReLU())
    )
    x = torch.ones(1, 2)
    with pytest.raises(ContainerError, match=r'Put both into its place: wrap\(model, "0.1"'):
        insert_after(model, "0.1", nn.Tanh())
    wrap(model, "0.1", lambda old: nn.Sequential(old, nn.Tanh()))
    remove(model, "0.2")
    assert torch.equal(model(x), model.get_submodule("0.0")(x).relu().tanh().relu())
    with pytest.warns(ModsurgWarning, match='"0.0": the graph that torch.fx traced calls it by name'):
        remove(model, "0.0", delete=True)


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.recurrent, self.act = nn.MultiheadAttention(4, 2), nn.GRU(4, 4), nn.ReLU()

    def forward(self, x):
        x, _ = self.attention(x, x, x)
        x, _ = self.recurrent(x)
        return self.act(x)


def test_no_identity_stands_for_what_takes_or_returns_several():
    model = Several()
    for path in ("attention", "recurrent"):
        with pytest.raises(EditError, match=f'"{path}" is a .*, which takes or returns more than one.*"{path}", new'):
            remove(model, path)
    remove(model, "act")
    assert str(model.attention) == str(Several().attention)


def test_torchs_own_forward_speaks_of_its_children_too():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.warns(ModsurgWarning, match='"norm1": the code of TransformerEncoderLayer references self.norm1'):
        rename(model, "norm1", "first")


def test_what_was_compiled_is_not_edited_behind_the_wrappers_back():
    model = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), backend="eager"))
    for verb in (
        lambda: replace(model, "0._orig_mod", nn.ReLU()),
        lambda: wrap(model, lambda path, module: type(module) is nn.Sequential, Held),
        lambda: remove(model, "0._orig_mod"),
        lambda: rename(model, "0._orig_mod", "inner"),
    ):
        with pytest.raises(EditError, match=r'"0" would go on .*: replace\(model, "0", torch.compile\(new\)\)'):
            verb()
    replace(model, "0.1", nn.Tanh())
    assert add(model, "0.more", nn.ReLU()).changes[0].paths == ("0._orig_mod.more",)
    with pytest.warns(ModsurgWarning, match="the forward that was set"):
        replace(model, "0", nn.ReLU())


def test_a_module_that_forgot_its_super_is_told_so():
    class Scale(nn.Module):
        def __init__(self):
            self.by = 2

    model = nn.Sequential(nn.ReLU())
    for verb in (
        lambda: replace(model, "0", Scale),
        lambda: wrap(model, "0", lambda old: Scale()),
        lambda: insert_after(model, "0", Scale()),
        lambda: add(model, "1", Scale()),
    ):
        with pytest.raises(EditError, match=r"begin Scale.__init__ with super\(\).__init__\(\)"):
            verb()
    assert str(model) == str(nn.Sequential(nn.ReLU()))


def test_the_root_has_no_place():
    for verb in (replace, wrap, insert_after):
        with pytest.raises(EditError, match="the root Linear has no parent .*; assign your variable: model = new"):
            verb(nn.Linear(2, 2), "", nn.ReLU)
    with edit(nn.Sequential(nn.Sequential(nn.ReLU()))) as e:
        e.remove(nn.Sequential)
    assert [change.paths for change in e.report.changes] == [("0",)]


def test_a_lazy_module_is_replaced_by_another():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2).to("meta"), nn.Bilinear(2, 2, 2))
    report = replace(model, "0", nn.LazyLinear(8))
    assert len(select(model, nn.LazyLinear)) == 1
    assert model[0].out_features == 8
    report.undo()
    assert model[0].out_features == 4


def test_one_of_several_inside_a_compiled_wrapper_is_left():
    model = nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Linear(2, 2)))
    with pytest.warns(ModsurgWarning, match=r"1\._orig_mod.*left as it was"):
        replace(model, nn.Linear, nn.Identity())
    assert isinstance(model[0], nn.Identity)
    assert isinstance(model[1]._orig_mod, nn.Linear)


@pytest.mark.parametrize("make", [torch.jit.script, lambda layer: torch.jit.trace(layer, torch.ones(1, 2))])
def test_torchscript_as_a_new_module_and_as_one_that_goes(make):
    model = nn.Sequential(nn.Linear(2, 2))
    replace(model, "0", make(nn.ReLU()))
    assert model(torch.ones(1, 2)).shape == (1, 2)
    parent = nn.Module()
    parent.layer = make(nn.ReLU())
    remove(parent, "layer")
    assert isinstance(parent.layer, nn.Identity)


class NormAct(nn.BatchNorm1d):
    """As in timm: the activation stands in the norm."""

    def __init__(self, features, act):
        super().__init__(features)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def normed():
    return nn.Sequential(nn.Linear(4, 4), NormAct(4, nn.SiLU()), nn.Linear(4, 4), NormAct(4, nn.Identity()))


def test_an_activation_that_goes_with_its_norm_is_told():
    with pytest.warns(
        ModsurgWarning,
        match=r'submodules of the replaced norm were dropped: "1\.act" \(SiLU\)\. To keep it: .*old\.act',
    ):
        replace(normed(), nn.BatchNorm1d, lambda old: nn.GroupNorm(2, old.num_features))
    with pytest.warns(ModsurgWarning, match=r'were dropped: "1\.act" \(SiLU\)'):
        remove(normed(), nn.BatchNorm1d)


@pytest.mark.filterwarnings("error::modsurg.errors.ModsurgWarning")
@pytest.mark.parametrize(
    "new",
    [
        lambda old: nn.Sequential(nn.GroupNorm(2, old.num_features), old.act),
        lambda old: NormAct(old.num_features, nn.ReLU()),
        lambda old: Held(old),
    ],
)
def test_an_activation_that_stays_is_not_told(new):
    model = normed()
    replace(model, nn.BatchNorm1d, new, example=(2, 4))
    assert any(isinstance(module, nn.SiLU | nn.ReLU) for module in model.modules())
    replace(nn.Sequential(nn.BatchNorm1d(4)), "0", nn.GroupNorm(2, 4))
