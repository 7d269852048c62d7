"""Surgery on the models of timm and transformers: built small or on meta, nothing is downloaded."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from modsurg import remove, replace, select, wrap
from modsurg.errors import EditError
from modsurg.tracing.trace import run

pytestmark = [
    pytest.mark.models,
    pytest.mark.filterwarnings("ignore::modsurg.errors.ModsurgWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
TEXT = {"input_ids": torch.arange(8).view(1, 8)}
TRANSFORMERS = {
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}, TEXT),
    "LlamaForCausalLM": ("LlamaConfig", SMALL, TEXT),
    "MixtralForCausalLM": ("MixtralConfig", SMALL | {"num_key_value_heads": 4, "num_local_experts": 2}, TEXT),
    "BertModel": ("BertConfig", SMALL, TEXT),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99},
        TEXT | {"decoder_input_ids": torch.arange(4).view(1, 4)},
    ),
    "AlbertModel": ("AlbertConfig", SMALL | {"embedding_size": 16}, TEXT),
    "ViTModel": ("ViTConfig", SMALL | {"image_size": 32, "patch_size": 8}, {"pixel_values": torch.ones(1, 3, 32, 32)}),
    "Wav2Vec2Model": (
        "Wav2Vec2Config",
        SMALL
        | {"conv_dim": (16, 16), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_conv_pos_embeddings": 8}
        | {"num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2},
        {"input_values": torch.ones(1, 400)},
    ),
}


def build(name):
    transformers = pytest.importorskip("transformers")
    config, options, inputs = TRANSFORMERS[name]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**options)).eval(), inputs


def first(output):
    return output[0]


def leaf(path, module):
    return path != "" and not module._modules


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_copies_and_wraps_compute_the_same(name):
    model, inputs = build(name)
    with torch.no_grad():
        before = first(model(**inputs))
        replace(model, leaf, copy.deepcopy)
        assert torch.equal(first(model(**inputs)), before)
        wrap(model, nn.Linear, nn.Sequential)
        assert torch.equal(first(model(**inputs)), before)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_block_is_removed_and_brought_back(name):
    model, inputs = build(name)
    with torch.no_grad():
        before, tree = first(model(**inputs)), str(model)
        for path, module in list(model.named_modules()):
            if path and module._modules:
                with contextlib.suppress(EditError):  # where no Identity can stand for it
                    remove(model, path).undo()
                assert str(model) == tree
        assert torch.equal(first(model(**inputs)), before)


class Uninitialised(TorchFunctionMode):
    """On meta nothing is written, and saying so to torch is most of the time in which a model is made."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        writes = {"normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"}
        kwargs = kwargs or {}
        return [*args, *kwargs.values()][0] if getattr(func, "__name__", "") in writes else func(*args, **kwargs)


def families():
    """One small model of each family: those whose names say so come first."""
    timm = pytest.importorskip("timm")
    words = ("atto", "femto", "pico", "nano", "tiny", "xxs", "xs", "test", "small", "_s", "b0", "_0", "18")
    seen = {}
    for name in timm.list_models():
        seen.setdefault(timm.models._registry._model_to_module[name], []).append(name)
    return [min(names, key=lambda name: not any(word in name for word in words)) for names in seen.values()]


def test_one_of_each_timm_family_on_meta():
    timm = pytest.importorskip("timm")
    failed = []
    for name in families():
        with torch.device("meta"), Uninitialised():
            model = timm.create_model(name, pretrained=False).eval()
        tree = [(path, id(module)) for path, module in model.named_modules()]
        reports = [replace(model, leaf, copy.deepcopy)]
        if any(isinstance(module, nn.Linear) for module in model.modules()):
            reports.append(wrap(model, nn.Linear, nn.Sequential))
        trace = run(model, (1, *model.default_cfg.get("input_size", (3, 224, 224))))
        if trace.failure or trace.note:
            failed.append((name, str(trace.failure), trace.note))
        for report in reversed(reports):
            report.undo()
        assert [(path, id(module)) for path, module in model.named_modules()] == tree
    assert failed == []


def test_gpt2s_head_is_tied_and_a_new_one_is_told():
    model, inputs = build("GPT2LMHeadModel")
    report = replace(model, "lm_head", lambda old: nn.Linear(old.in_features, 7))
    assert any("lm_head.weight" in warning and "transformer.wte.weight" in warning for warning in report.warnings)
    assert first(model(**inputs)).shape[-1] == 7
    assert len(select(model, "transformer.h.*")) == 2
