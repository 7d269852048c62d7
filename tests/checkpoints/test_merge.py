"""merge: equal to the same arithmetic in memory, for each method; nothing written where it can't be right."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modsurg import convert, load_model, load_state, merge, read_state, save_model, save_state
from modsurg.checkpoints.merge import _least_kept
from modsurg.errors import MergeError, ModsurgWarning


def state(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(5, 3, generator=generator).to(dtype),
        "a.bias": torch.randn(5, generator=generator).to(dtype),
        "steps": torch.tensor(seed),
    }


@pytest.fixture
def files(tmp_path):
    return [save_state(state(seed), tmp_path / f"{seed}.safetensors") for seed in range(3)]


def values(path):
    with read_state(path) as found:
        return {key: found[key] for key in found}


def close(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6)


@given(weights=st.lists(st.floats(-2, 2), min_size=1, max_size=4))
@pytest.mark.filterwarnings("ignore:the weights sum to")
def test_linear_is_the_weighted_sum(tmp_path_factory, weights):
    states = [state(seed) for seed in range(len(weights))]
    expected = {key: sum(w * s[key] for w, s in zip(weights, states, strict=True)) for key in ("a.weight", "a.bias")}
    path = tmp_path_factory.getbasetemp() / "linear.safetensors"
    merge(list(zip(states, weights, strict=True)), path)
    close(values(path), expected | {"steps": torch.tensor(0)})


def test_sources_of_every_kind_and_format(tmp_path):
    model = nn.Linear(3, 2)
    pairs = [
        (save_state(model, tmp_path / "a.safetensors"), 0.1),
        (save_state(model, tmp_path / "b.pt"), 0.2),
        (save_state(model, tmp_path / "c.safetensors.index.json", shard_size=30), 0.3),
        (model, 0.1),
        (model.state_dict(), 0.1),
        (read_state(tmp_path / "b.pt"), 0.2),
    ]
    for target in ("t.safetensors", "t.pt", "t.safetensors.index.json"):
        done = merge(pairs, tmp_path / target)
        close(values(done.target), dict(model.state_dict()))
    assert str(done).startswith("linear -> ")


def test_half_precision_is_summed_in_float32(tmp_path):
    halves = [{"w": torch.full((2,), value, dtype=torch.float16)} for value in (60000.0, 50000.0)]
    merge([(half, 0.5) for half in halves], tmp_path / "t.safetensors")
    assert values(tmp_path / "t.safetensors")["w"].tolist() == [54976.0, 54976.0]  # float16 has 60000 and 49984
    tiny = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([1.0 + 1e-12], dtype=torch.float64)}]
    merge([(each, 0.5) for each in tiny[::-1]], tmp_path / "t.safetensors")
    assert values(tmp_path / "t.safetensors")["w"].dtype == torch.float64


def test_what_does_not_fit_in_the_dtype_is_not_written(tmp_path):
    half = torch.full((2,), 6e4, dtype=torch.float16)
    one = save_state({"w": half}, tmp_path / "one.safetensors")
    other = save_state({"w": -half}, tmp_path / "other.safetensors")
    with pytest.raises(MergeError, match=r"w: 2 merged values do not fit in torch\.float16; nothing was written"):
        merge([(one, 3.0), (other, -2.0)], tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
    wide = convert(one, tmp_path / "wide.safetensors", dtype=torch.float32).target
    merge([(wide, 3.0), (other, -2.0)], tmp_path / "b.safetensors")
    assert torch.equal(read_state(tmp_path / "b.safetensors")["w"], half.float() * 5)


def test_slerp_keeps_to_the_arc(tmp_path):
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    merge([({"w": a}, 0.75), ({"w": b}, 0.25)], tmp_path / "t.safetensors", method="slerp")
    expected = math.sin(0.75 * math.pi / 2) * a + math.sin(0.25 * math.pi / 2) * b
    torch.testing.assert_close(values(tmp_path / "t.safetensors")["w"], expected)
    for other in (a, -a, 0 * a):
        merge([({"w": a}, 0.75), ({"w": other}, 0.25)], tmp_path / "t.safetensors", method="slerp")
        torch.testing.assert_close(values(tmp_path / "t.safetensors")["w"], 0.75 * a + 0.25 * other)


def test_task_arithmetic(files, tmp_path):
    base, one, two = (values(path) for path in files)
    merge({files[1]: 0.7, files[2]: -0.4}, tmp_path / "t.safetensors", method="task", base=files[0])
    expected = {
        key: base[key] + 0.7 * (one[key] - base[key]) - 0.4 * (two[key] - base[key]) for key in ("a.weight", "a.bias")
    }
    close(values(tmp_path / "t.safetensors"), expected | {"steps": torch.tensor(1)})


def test_ties_trims_elects_and_averages_those_that_agree(tmp_path):
    base = torch.tensor([10.0, 10.0, 10.0, 10.0])
    one = base + torch.tensor([4.0, 3.0, 0.1, -2.0])
    two = base + torch.tensor([2.0, -5.0, 3.0, 0.2])
    pairs = [({"w": one}, 1.0), ({"w": two}, 1.0)]
    merge(pairs, tmp_path / "t.safetensors", method="ties", base={"w": base}, density=0.5)
    # kept: [4, 3, 0, 0] and [0, -5, 3, 0]; the second place goes to the heavier sign
    torch.testing.assert_close(values(tmp_path / "t.safetensors")["w"] - base, torch.tensor([4.0, -5.0, 3.0, 0.0]))
    merge(
        [({"w": one}, 3.0), ({"w": two}, 1.0)], tmp_path / "t.safetensors", method="ties", base={"w": base}, density=1
    )
    expected = torch.tensor([(3 * 4 + 2) / 4, 3.0, (3 * 0.1 + 3) / 4, -2.0])
    torch.testing.assert_close(values(tmp_path / "t.safetensors")["w"] - base, expected)


@given(
    values=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=60), density=st.floats(0.01, 1), wide=st.booleans()
)
def test_the_share_that_stays_is_the_largest(values, density, wide):
    delta = torch.tensor(values, dtype=torch.float64 if wide else torch.float32)
    count = round(density * len(values))
    least = _least_kept(delta, density)
    expected = delta.abs().sort(descending=True).values
    assert least == (expected[count - 1] if count else math.inf)


def test_complex_tensors(tmp_path):
    base = {"w": torch.tensor([1 + 2j, 3 - 1j])}
    pairs = [({"w": base["w"] + 1j}, 0.5), ({"w": base["w"] + 1}, 0.5)]
    for method, expected in (("linear", base["w"] + 0.5 + 0.5j), ("task", base["w"] + 0.5 + 0.5j)):
        merge(pairs, tmp_path / "t.pt", method=method, base=base)
        torch.testing.assert_close(values(tmp_path / "t.pt")["w"], expected)
    merge(pairs, tmp_path / "t.pt", method="ties", base=base, density=1.0)
    torch.testing.assert_close(values(tmp_path / "t.pt")["w"], base["w"] + 1 + 1j)


def test_dare_drops_at_random_by_the_seed_and_keeps_the_mean(tmp_path):
    base, one = torch.zeros(40_000), torch.ones(40_000)

    def dare(seed, density=0.25):
        merge([({"w": one}, 0.5)], tmp_path / "t.pt", method="dare", base={"w": base}, seed=seed, density=density)
        return values(tmp_path / "t.pt")["w"]

    found = dare(3)
    assert set(found.tolist()) == {0.0, 2.0}
    assert abs(float(found.mean()) - 0.5) < 0.02
    assert torch.equal(found, dare(3))
    assert not torch.equal(found, dare(4))
    assert torch.equal(dare(0, density=1), one / 2)


def test_whole_numbers_are_those_of_the_first_source(files, tmp_path):
    merge({files[2]: 0.5, files[1]: 0.5}, tmp_path / "t.safetensors")
    assert values(tmp_path / "t.safetensors")["steps"] == 2


def test_only_some_keys(files, tmp_path):
    merge({files[1]: 0.5, files[2]: 0.5}, tmp_path / "t.safetensors", only="**.bias")
    found, one, two = values(tmp_path / "t.safetensors"), values(files[1]), values(files[2])
    assert torch.equal(found["a.weight"], one["a.weight"])
    torch.testing.assert_close(found["a.bias"], (one["a.bias"] + two["a.bias"]) / 2)
    with pytest.raises(MergeError, match=r"only='nothing' matches no key; nothing was written"):
        merge({files[1]: 1.0}, tmp_path / "t.safetensors", only="nothing")


def test_ties_stay_where_every_source_has_them(tmp_path):
    def net(tied):
        model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
        if tied:
            model["head"].weight = model["embed"].weight
        return model

    merge([(net(True), 0.5), (net(True), 0.5)], tmp_path / "t.safetensors")
    assert read_state(tmp_path / "t.safetensors").source.notes.ties == {"head.weight": "embed.weight"}
    merge([(net(True), 0.5), (net(False), 0.5)], tmp_path / "t.safetensors")
    assert not read_state(tmp_path / "t.safetensors").source.notes.ties


def test_a_whole_model_stays_one(tmp_path):
    models = [nn.Sequential(nn.Linear(3, 2), nn.ReLU()) for _ in range(2)]
    paths = [save_model(model, tmp_path / f"{n}.safetensors") for n, model in enumerate(models)]
    merge(dict.fromkeys(paths, 0.5), tmp_path / "t.safetensors")
    merged = load_model(tmp_path / "t.safetensors")
    torch.testing.assert_close(merged[0].weight, (models[0][0].weight + models[1][0].weight) / 2)


def test_keys_and_shapes_that_differ_are_named_before_a_byte_is_written(tmp_path):
    a = save_state(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), tmp_path / "a.safetensors")
    b = save_state(nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))}), tmp_path / "b.safetensors")
    with pytest.raises(
        MergeError, match=r"(?s)do not match; nothing was written.*Try: merge\(\.\.\., rename="
    ) as raised:
        merge({a: 0.5, b: 0.5}, tmp_path / "t.safetensors")
    rename = eval(str(raised.value).partition("rename=")[2].rstrip(")"))
    merge({a: 0.5, b: 0.5}, tmp_path / "t.safetensors", rename=rename)
    c = save_state(nn.Sequential(nn.Linear(3, 4), nn.Linear(2, 2)), tmp_path / "c.safetensors")
    os.unlink(tmp_path / "t.safetensors")
    with pytest.raises(MergeError, match=r"0\.weight  \(2, 3\), \(4, 3\)"):
        merge({a: 0.5, c: 0.5}, tmp_path / "t.safetensors")
    d = save_state(nn.Sequential(nn.Linear(3, 2)), tmp_path / "d.safetensors")
    with pytest.raises(
        MergeError, match=r"only in .*a\.safetensors: 1\.weight, 1\.bias(?s:.)*to leave keys out"
    ) as raised:
        merge({a: 0.5, d: 0.5}, tmp_path / "t.safetensors")
    assert not (tmp_path / "t.safetensors").exists()
    rename = eval(str(raised.value).partition("rename=")[2].partition(")")[0])
    merge({a: 0.5, d: 0.5}, tmp_path / "t.safetensors", rename=rename)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "mean"}, "method='mean' must be one of 'linear', 'slerp'"),
        ({"method": "task"}, r"method='task' compares the sources with a base\. Try: merge\(\.\.\., method=\"task\""),
        ({"method": "slerp"}, "two sources whose weights sum to 1, not 3 with 1"),
        ({"density": 0.5}, "density=0.5 is for method='ties'"),
        ({"method": "ties", "base": {}, "density": 0}, "must be a share"),
    ],
)
def test_options_that_can_not_be_right(files, tmp_path, options, said):
    with pytest.raises(MergeError, match=said):
        merge(dict.fromkeys(files, 1 / 3), tmp_path / "t.safetensors", **options)
    assert not (tmp_path / "t.safetensors").exists()


@pytest.mark.parametrize("sources", [{}, [1], {"a": "b"}, [(3, 1.0)], {"a": math.nan}])
def test_sources_that_are_none(sources, tmp_path):
    with pytest.raises(MergeError, match="source|weight"):
        merge(sources, tmp_path / "t.safetensors")


def test_weights_that_do_not_sum_to_one_are_told(files, tmp_path):
    with pytest.warns(ModsurgWarning, match="the weights sum to 2"):
        merge(dict.fromkeys(files[:2], 1.0), tmp_path / "t.safetensors")


def test_statistics_of_norms_are_told(tmp_path):
    with pytest.warns(ModsurgWarning, match=r"update_bn\(loader, model\)"):
        merge([(nn.BatchNorm1d(2), 0.5), (nn.BatchNorm1d(2), 0.5)], tmp_path / "t.safetensors")


class Lora(nn.Module):
    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.a = nn.Parameter(torch.randn(rank, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.a.T @ self.b.T)


def write_adapter(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_state(
        {f"base_model.model.{key}": value for key, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))
    return folder


def test_an_adapter_is_folded_in(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    tuned = nn.Sequential(Lora(base[0], 2, 4), base[1], Lora(base[2], 3, 8))
    head = torch.randn(3)
    adapter = write_adapter(
        tmp_path / "adapter",
        {
            "0.lora_A.weight": tuned[0].a,
            "0.lora_B.weight": tuned[0].b,
            "2.lora_A.weight": tuned[2].a,
            "2.lora_B.weight": tuned[2].b,
            "2.bias": head,
        },
        rank_pattern={"2": 3},
        alpha_pattern={"2": 8},
    )
    file = save_state(base, tmp_path / "base.safetensors")
    done = merge({file: 1.0}, tmp_path / "merged.safetensors", lora=adapter)
    assert done.lora == ("0.weight", "2.bias", "2.weight")
    assert "  lora  0.weight" in str(done)
    x = torch.randn(4, 6)
    expected = tuned(x) - base[2].bias + head
    load_state(base, done.target)
    torch.testing.assert_close(base(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "sets use_dora, and only plain LoRA"),
        ({"peft_type": "IA3"}, "an adapter of type 'IA3'"),
        ({"target_parameters": ["x"]}, "sets target_parameters"),
    ],
)
def test_other_adapters_are_refused_by_name(tmp_path, config, said):
    base = save_state(nn.Sequential(nn.Linear(3, 2)), tmp_path / "base.safetensors")
    factors = {"0.lora_A.weight": torch.ones(2, 3), "0.lora_B.weight": torch.ones(2, 2)}
    with pytest.raises(MergeError, match=said):
        merge({base: 1.0}, tmp_path / "t.safetensors", lora=write_adapter(tmp_path / "adapter", factors, **config))


def test_an_adapter_that_does_not_belong_here(tmp_path):
    base = save_state(nn.Sequential(nn.Linear(3, 2)), tmp_path / "base.safetensors")
    factors = {"q.lora_A.weight": torch.ones(2, 3), "q.lora_B.weight": torch.ones(2, 2)}
    with pytest.raises(MergeError, match=r"1 of 1 targets .* are not in .*; nothing was written: q\.weight"):
        merge({base: 1.0}, tmp_path / "t.safetensors", lora=write_adapter(tmp_path / "adapter", factors))
    with pytest.raises(MergeError, match="the adapter and .* in the base"):
        wrong = {"0.lora_A.weight": torch.ones(2, 4), "0.lora_B.weight": torch.ones(2, 2)}
        merge({base: 1.0}, tmp_path / "t.safetensors", lora=write_adapter(tmp_path / "adapter", wrong))
    with pytest.raises(MergeError, match="has no adapter_config"):
        merge({base: 1.0}, tmp_path / "t.safetensors", lora=tmp_path)
    with pytest.raises(MergeError, match="no target"):
        merge({base: 1.0}, tmp_path / "t.safetensors", lora=write_adapter(tmp_path / "empty", {}))


def test_a_kill_leaves_the_old_target(tmp_path):
    """The process is killed while it writes: the target is the old file, whole."""
    old = save_state({"w": torch.zeros(3)}, tmp_path / "t.safetensors").read_bytes()
    code = textwrap.dedent(f"""
        import os, signal, torch
        from modsurg import merge
        states = [{{f"w{{n}}": torch.ones(1000) for n in range(9)}} for _ in range(2)]
        def stop(done, total):
            if 2 * done > total:
                os.kill(os.getpid(), signal.SIGKILL)
        merge([(state, 0.5) for state in states], {str(tmp_path / "t.safetensors")!r}, progress=stop)
    """)
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "t.safetensors").read_bytes() == old


@pytest.mark.models
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_as_peft_merges(tmp_path, kind):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
        )
        model = transformers.LlamaForCausalLM(config)
        options = {
            "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
            "rank_pattern": {"v_proj": 3},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 7},
            "use_rslora": True,
            "modules_to_save": ["lm_head"],
            "bias": "all",
        }
    else:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50))
        options = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    file = save_state(model, tmp_path / "base.safetensors")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, **options))
    tuned.save_pretrained(tmp_path / "adapter")
    done = merge({file: 1.0}, tmp_path / "merged.safetensors", lora=tmp_path / "adapter")
    expected = tuned.merge_and_unload().state_dict()
    found = values(done.target)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=key)
