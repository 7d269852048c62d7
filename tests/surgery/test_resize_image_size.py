"""A vision transformer for another image size, in place."""

import copy

import pytest
import torch
from torch import nn

from modsurg import Recipe, replay, resize
from modsurg.errors import ResizeError, UndoError


class Patches(nn.Module):
    def __init__(self, size, width):
        super().__init__()
        self.img_size, self.patch_size, self.grid_size = (size, size), (4, 4), (size // 4, size // 4)
        self.num_patches = (size // 4) ** 2
        self.proj = nn.Conv2d(3, width, 4, 4)

    def forward(self, x):
        assert x.shape[-2:] == self.img_size
        return self.proj(x).flatten(2).transpose(1, 2)


class Vit(nn.Module):
    """As small as possible, with the names of timm."""

    def __init__(self, size=16, prefix=1, width=8):
        super().__init__()
        self.patch_embed = Patches(size, width)
        self.cls = nn.Parameter(torch.randn(1, prefix, width))
        self.pos_embed = nn.Parameter(torch.randn(1, prefix + self.patch_embed.num_patches, width))
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.patch_embed(x)], 1) + self.pos_embed
        return self.head(x.mean(1))


def resampled(positions, prefix, old, new):
    picture = positions[:, prefix:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(picture, new, mode="bicubic", antialias=True).permute(0, 2, 3, 1)
    return torch.cat([positions[:, :prefix], patches.flatten(1, 2)], 1)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(("size", "grid"), [(24, (6, 6)), (8, (2, 2)), ((12, 28), (3, 7)), ([8, 32], (2, 8))])
def test_positions_are_resampled_and_sizes_follow(prefix, size, grid):
    model = Vit(prefix=prefix)
    before, parameter = model.pos_embed.detach().clone(), model.pos_embed
    pixels = (size, size) if isinstance(size, int) else tuple(size)
    report = resize(model, image_size=size, example=(1, 3, *pixels))
    assert model.pos_embed is parameter
    assert torch.allclose(parameter, resampled(before, prefix, (4, 4), grid), atol=1e-6)
    assert (model.patch_embed.img_size, model.patch_embed.grid_size) == (pixels, grid)
    assert model.patch_embed.num_patches == grid[0] * grid[1]
    model(torch.randn(2, 3, *pixels)).sum().backward()
    assert "image_size 16 -> " in str(report)


def test_undo_and_replay():
    model = Vit()
    old = copy.deepcopy(model)
    report = resize(model, image_size=32)
    again = replay(copy.deepcopy(old), Recipe.from_json(report.recipe.to_json()))
    assert str(again) == str(report)
    report.undo()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), old.parameters(), strict=True))
    assert vars(model.patch_embed)["grid_size"] == (4, 4)
    report = resize(model, image_size=32)
    with torch.no_grad():
        model.pos_embed[0, -1] += 1
    with pytest.raises(UndoError, match="pos_embed"):
        report.undo()


def test_an_optimizer_goes_on():
    model = Vit()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    before = optimizer.state[model.pos_embed]["exp_avg"].clone()
    resize(model, image_size=24, optimizer=optimizer)
    after = optimizer.state[model.pos_embed]["exp_avg"]
    assert torch.equal(after[:, :1], before[:, :1])
    assert not after[:, 1:].any()
    model(torch.randn(2, 3, 24, 24)).sum().backward()
    optimizer.step()


def test_a_part_of_a_model():
    model = nn.ModuleDict({"eye": Vit(), "other": Vit()})
    resize(model, "eye", image_size=24)
    assert model["eye"].pos_embed.shape[1] == 37
    assert model["other"].pos_embed.shape[1] == 17
    resize(model, "*", image_size=8)
    assert model["other"].pos_embed.shape == model["eye"].pos_embed.shape == (1, 5, 8)


class Window(nn.Module):
    def __init__(self):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(49, 2))


def with_part(part):
    model = Vit()
    model.part = part
    return model


def wide():
    model = Vit()
    model.pos_embed = nn.Parameter(torch.zeros(1, 16, 16, 8))
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Linear(2, 2), {"image_size": 8}, "Linear without position embeddings"),
        (Vit, {"image_size": 0}, r"must be a positive integer, or height and width"),
        (Vit, {"image_size": (1, 2, 3)}, r"must be a positive integer, or height and width"),
        (Vit, {"image_size": 18}, r"\(18, 18\) are not whole patches of \(4, 4\). Try: image_size=16"),
        (Vit, {"image_size": 16, "out_features": 3}, "is resized alone"),
        (Vit, {"image_size": 16, "follow": True}, "is resized alone"),
        (lambda: with_part(Window()), {"image_size": 8}, r'"part" is a Window.*relative_position_bias_table depends'),
        (wide, {"image_size": 8}, r'"pos_embed" is \(1, 16, 16, 8\).*can\'t follow'),
    ],
)
def test_what_can_not_follow_is_refused(make, options, message):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ResizeError, match=message):
        resize(model, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_model_itself_without_where():
    model = nn.Linear(4, 2)
    resize(model, out_features=3)
    assert model.weight.shape == (3, 4)


def vits():
    timm, torchvision, transformers = map(pytest.importorskip, ("timm", "torchvision", "transformers"))

    def theirs(config, model, **more):
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 1}
        return lambda size: model(config(image_size=size, patch_size=8, **sizes, **more))

    def by_timm(**options):
        return lambda size: timm.models.VisionTransformer(
            img_size=size, patch_size=8, embed_dim=32, depth=1, num_heads=4, **options
        )

    return {
        "timm": by_timm(),
        "timm registers": by_timm(reg_tokens=4),
        "timm apart": by_timm(no_embed_class=True, reg_tokens=4),
        "timm no class": by_timm(class_token=False, global_pool="avg"),
        "torchvision": lambda size: torchvision.models.VisionTransformer(size, 8, 1, 4, 32, 64),
        "vit": theirs(transformers.ViTConfig, transformers.ViTModel),
        "deit": theirs(transformers.DeiTConfig, transformers.DeiTModel),
        "dinov2": theirs(transformers.Dinov2Config, transformers.Dinov2Model),
        "clip": theirs(transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
        "siglip": theirs(transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
    }


NAMES = [
    "timm",
    "timm registers",
    "timm apart",
    "timm no class",
    "torchvision",
    "vit",
    "deit",
    "dinov2",
    "clip",
    "siglip",
]


@pytest.mark.models
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [48, 16])
def test_models_of_libraries(name, size):
    """Afterwards the model has all that one built for the new size has."""
    make = vits()[name]
    model, wanted = make(32).eval(), make(size).eval()
    report = resize(model, image_size=size)
    for path, module in wanted.named_modules():
        mine = vars(model.get_submodule(path))
        for key, value in vars(module).items():
            if type(value) is int or (isinstance(value, tuple) and "size" in key):
                assert mine[key] == value, f"{path}.{key}"
    assert {k: v.shape for k, v in model.named_buffers()} == {k: v.shape for k, v in wanted.named_buffers()}
    wanted.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        ours, theirs = model(x), wanted(x)
    if not isinstance(ours, torch.Tensor):
        ours, theirs = ours.last_hidden_state, theirs.last_hidden_state
        assert f"model.config.image_size = {size}" in str(report)
    assert torch.equal(ours, theirs)


@pytest.mark.models
def test_models_that_can_not_follow():
    timm = pytest.importorskip("timm")
    swin = timm.models.SwinTransformer(img_size=32, window_size=4, embed_dim=16, depths=(1,), num_heads=(4,))
    with pytest.raises(ResizeError, match="SwinTransformer without position embeddings"):
        resize(swin, image_size=64)
    eva = timm.models.Eva(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4, use_rot_pos_emb=True)
    with pytest.raises(ResizeError, match="rotary"):
        resize(eva, image_size=64)
