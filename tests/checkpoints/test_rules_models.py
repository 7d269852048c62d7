"""Rules between real projects: equal outputs, both ways."""

import pytest
import torch
from torch import nn

from modsurg import convert, load_state, read_state, save_state
from modsurg.errors import LoadError
from modsurg.rules import Concat, Interpolate, Split, Transpose

pytestmark = pytest.mark.models


def test_gpt2_and_linear():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16)
    old = transformers.GPT2Model(config).eval()
    rule = Transpose(["h.*.attn.c_*.weight", "h.*.mlp.c_*.weight"])
    conv1d = transformers.pytorch_utils.Conv1D

    def linear():
        new = transformers.GPT2Model(config).eval()
        for name, module in list(new.named_modules()):
            if isinstance(module, conv1d):
                new.set_submodule(name, nn.Linear(*module.weight.shape))
        return new

    new = linear()
    load_state(new, old.state_dict(), rules=[rule])
    tokens = torch.arange(10)[None]
    wanted = old(tokens).last_hidden_state
    assert torch.allclose(new(tokens).last_hidden_state, wanted, atol=1e-5)
    again = transformers.GPT2Model(config).eval()
    load_state(again, new.state_dict(), rules=[rule.inverse()])
    assert torch.equal(again(tokens).last_hidden_state, wanted)


def test_llama_and_a_packed_projection(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=9,
    )
    old = transformers.LlamaModel(config).eval()
    rule = Concat(
        [f"layers.*.self_attn.{name}_proj" for name in "qkv"], "layers.*.self_attn.qkv_proj", sizes=(16, 8, 8)
    )
    packed = convert(save_state(old, tmp_path / "a.safetensors"), tmp_path / "b.safetensors", rules=[rule]).target
    state = read_state(packed)
    assert state["layers.1.self_attn.qkv_proj.weight"].shape == (32, 16)
    x = torch.randn(3, 16)
    attention = old.layers[1].self_attn
    apart = [getattr(attention, f"{name}_proj")(x) for name in "qkv"]
    assert torch.allclose(x @ state["layers.1.self_attn.qkv_proj.weight"].t(), torch.cat(apart, -1), atol=1e-6)
    again = transformers.LlamaModel(config).eval()
    load_state(again, packed, rules=[rule.inverse()])
    tokens = torch.arange(8)[None]
    assert torch.equal(again(tokens).last_hidden_state, old(tokens).last_hidden_state)


def vits():
    transformers, timm = pytest.importorskip("transformers"), pytest.importorskip("timm")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
        num_labels=5,
    )
    theirs = transformers.ViTForImageClassification(config).eval()
    ours = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2, num_classes=5
    ).eval()
    return theirs, ours


def test_transformers_vit_and_timm(tmp_path):
    theirs, ours = vits()
    nn.init.normal_(theirs.vit.embeddings.cls_token)
    state = theirs.state_dict()
    prefix = next(key.split(".0.")[0] for key in state if ".0." in key and ".q" in key)
    names = sorted(
        {key.removeprefix(f"{prefix}.0.").rsplit(".", 1)[0] for key in state if key.startswith(f"{prefix}.0.")}
    )
    q, k, v = (next(n for n in names if n.split(".")[-1].startswith(letter)) for letter in "qkv")
    proj = next(n for n in names if n.startswith("attention") and n not in (q, k, v))
    first = next(n for n in names if state[f"{prefix}.0.{n}.weight"].shape == (64, 32))
    second = next(n for n in names if state[f"{prefix}.0.{n}.weight"].shape == (32, 64))
    rules = [Concat([f"{prefix}.*.{name}" for name in (q, k, v)], "blocks.*.attn.qkv")]
    number = prefix.replace(".", r"\.")
    renames = {
        "vit.embeddings.cls_token": "cls_token",
        "vit.embeddings.position_embeddings": "pos_embed",
        "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
        rf"re:{number}\.(\d+)\.{proj}\.(.*)": r"blocks.\1.attn.proj.\2",
        rf"re:{number}\.(\d+)\.{first}\.(.*)": r"blocks.\1.mlp.fc1.\2",
        rf"re:{number}\.(\d+)\.{second}\.(.*)": r"blocks.\1.mlp.fc2.\2",
        rf"re:{number}\.(\d+)\.layernorm_before\.(.*)": r"blocks.\1.norm1.\2",
        rf"re:{number}\.(\d+)\.layernorm_after\.(.*)": r"blocks.\1.norm2.\2",
        "vit.layernorm": "norm",
        "classifier": "head",
    }
    load_state(ours, save_state(theirs, tmp_path / "theirs.safetensors"), rules=rules, rename=renames)
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(ours(x), theirs(x).logits, atol=1e-5)
    again, _ = vits()
    back = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        r"re:blocks\.(\d+)\.attn\.proj\.(.*)": rf"{prefix}.\1.{proj}.\2",
        r"re:blocks\.(\d+)\.mlp\.fc1\.(.*)": rf"{prefix}.\1.{first}.\2",
        r"re:blocks\.(\d+)\.mlp\.fc2\.(.*)": rf"{prefix}.\1.{second}.\2",
        r"re:blocks\.(\d+)\.norm1\.(.*)": rf"{prefix}.\1.layernorm_before.\2",
        r"re:blocks\.(\d+)\.norm2\.(.*)": rf"{prefix}.\1.layernorm_after.\2",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    load_state(again, ours.state_dict(), rules=[rule.inverse() for rule in rules], rename=back)
    assert torch.equal(again(x).logits, theirs(x).logits)


def test_the_error_proposes_all_that_is_needed():
    theirs, ours = vits()
    again, _ = vits()
    nn.init.normal_(theirs.vit.embeddings.cls_token)
    x = torch.randn(2, 3, 32, 32)
    for model, state in ((ours, theirs.state_dict()), (again, ours.state_dict)):
        state = state() if callable(state) else state
        with pytest.raises(LoadError, match="They match with") as caught:
            load_state(model, state)
        arguments = str(caught.value).split("They match with load_state(..., ")[1].split(") (from modsurg.rules)")[0]
        load_state(model, state, **eval(f"dict({arguments})"))
    assert torch.allclose(ours(x), theirs(x).logits, atol=1e-5)
    assert torch.equal(again(x).logits, theirs(x).logits)


class OpenClipBlock(nn.Module):
    """A block of OpenCLIP's visual tower, with its names."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)})

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class OpenClipTower(nn.Module):
    """OpenCLIP's visual tower, with its names and shapes."""

    def __init__(self, image_size, patch_size, width, layers, heads, output):
        super().__init__()
        self.image_size, self.patch_size = image_size, patch_size
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((image_size // patch_size) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.ModuleList(OpenClipBlock(width, heads) for _ in range(layers))}
        )
        self.proj = nn.Parameter(torch.randn(width, output))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


@pytest.mark.parametrize("packed", ["safetensors", "pt"])
def test_clips_visual_tower_and_openclips(tmp_path, packed):
    transformers = pytest.importorskip("transformers")

    def clip():
        config = transformers.CLIPVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            projection_dim=16,
            hidden_act="gelu",
        )
        return transformers.CLIPVisionModelWithProjection(config).eval()

    theirs, ours = clip(), OpenClipTower(32, 8, 32, 2, 4, 16).eval()
    layers, blocks = "vision_model.encoder.layers", "transformer.resblocks"
    rules = [
        Concat([f"{layers}.*.self_attn.{name}_proj.{kind}" for name in "qkv"], f"{blocks}.*.attn.in_proj_{kind}")
        for kind in ("weight", "bias")
    ] + [Transpose("visual_projection")]
    names = {
        "vision_model.embeddings.class_embedding": "class_embedding",
        "vision_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.embeddings.patch_embedding": "conv1",
        "vision_model.pre_layrnorm": "ln_pre",
        "vision_model.post_layernorm": "ln_post",
        "visual_projection.weight": "proj",
    }
    parts = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    parts |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}

    def numbered(old, new, pairs):
        return {rf"re:{old}\.(\d+)\.{a}\.(.*)": rf"{new}.\1.{b}.\2" for a, b in pairs}

    there = names | numbered(layers, blocks, parts.items())
    back = {new: old for old, new in names.items()} | numbered(blocks, layers, [(b, a) for a, b in parts.items()])
    load_state(ours, save_state(theirs, tmp_path / f"theirs.{packed}"), rules=rules, rename=there)
    x = torch.randn(2, 3, 32, 32)
    wanted = theirs(x).image_embeds
    assert torch.allclose(ours(x), wanted, atol=1e-5)
    inverse = [rule.inverse() for rule in rules[:-1]] + [Transpose("proj")]
    again = clip()
    load_state(again, ours.state_dict(), rules=inverse, rename=back)
    assert torch.equal(again(x).image_embeds, wanted)
    large = OpenClipTower(48, 8, 32, 2, 4, 16)
    assert list(load_state(large, ours.state_dict(), on_mismatch="interpolate").resampled) == ["positional_embedding"]


def test_positions_of_a_transformers_clip():
    transformers = pytest.importorskip("transformers")

    def clip(image):
        vision = {"image_size": image, "patch_size": 8, "hidden_size": 32, "num_attention_heads": 4}
        text = {"max_position_embeddings": 16, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 9}
        layers = {"num_hidden_layers": 1, "intermediate_size": 32}
        return transformers.CLIPModel(transformers.CLIPConfig(text_config=text | layers, vision_config=vision | layers))

    old, new = clip(32), clip(48)
    report = load_state(new, old.state_dict(), on_mismatch="interpolate")
    assert list(report.resampled) == ["vision_model.embeddings.position_embedding.weight"]
    longer = clip(32)
    longer.text_model.embeddings.position_embedding = nn.Embedding(36, 32)
    with pytest.raises(LoadError, match=r"text_model.*file \(16, 32\), model \(36, 32\)"):
        load_state(longer, old.state_dict(), on_mismatch="interpolate")


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}])
@pytest.mark.parametrize("size", [(48, 48), (32, 64), (16, 16)])
def test_position_embeddings_as_timm_resamples_them(options, size):
    timm = pytest.importorskip("timm")
    from timm.layers import resample_abs_pos_embed

    def vit(image):
        return timm.models.VisionTransformer(
            img_size=image, patch_size=8, embed_dim=32, depth=1, num_heads=4, **options
        )

    old, new = vit((32, 32)), vit(size)
    load_state(new, old.state_dict(), on_mismatch="interpolate")
    grid = [each // 8 for each in size]
    wanted = resample_abs_pos_embed(old.pos_embed, grid, [4, 4], num_prefix_tokens=new.num_prefix_tokens)
    assert torch.allclose(new.pos_embed, wanted, atol=1e-5)
    load_state(new, old.state_dict(), rules=[Interpolate("pos_embed", grid=tuple(grid), old_grid=(4, 4))])
    assert torch.allclose(new.pos_embed, wanted, atol=1e-5)


def test_a_windowed_table_as_timm_resamples_it():
    timm = pytest.importorskip("timm")
    from timm.layers import resize_rel_pos_bias_table_simple

    def swin(window):
        return timm.models.SwinTransformer(
            img_size=window * 8, window_size=window, embed_dim=16, depths=(1,), num_heads=(4,), patch_size=4
        )

    old, new = swin(4), swin(6)
    for parameter in old.parameters():
        nn.init.normal_(parameter)
    load_state(new, old.state_dict(), on_mismatch="interpolate", strict=False)
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    wanted = resize_rel_pos_bias_table_simple(old.get_parameter(name), (6, 6), (121, 4))
    assert torch.allclose(new.get_parameter(name), wanted, atol=1e-5)


def test_a_table_with_rows_for_the_class_token():
    timm = pytest.importorskip("timm")
    from timm.layers import resize_rel_pos_bias_table_simple

    def beit(size):
        return timm.models.Beit(
            img_size=size,
            patch_size=8,
            embed_dim=16,
            depth=1,
            num_heads=4,
            use_rel_pos_bias=True,
            use_abs_pos_emb=False,
        )

    old, new = beit(32), beit(48)
    name = "blocks.0.attn.relative_position_bias_table"
    nn.init.normal_(old.get_parameter(name))
    report = load_state(new, old.state_dict(), on_mismatch="interpolate")
    assert list(report.resampled) == [name]
    table = old.get_parameter(name)
    wanted = resize_rel_pos_bias_table_simple(table[:-3], (6, 6), (121, 4))
    assert torch.allclose(new.get_parameter(name), torch.cat([wanted, table[-3:]]), atol=1e-5)


def test_split_is_the_inverse():
    rule = Concat(["a", "b"], "c", dim=1, sizes=(1, 2))
    assert rule.inverse() == Split("c", ["a", "b"], 1, (1, 2))
    assert rule.inverse().inverse() == rule
