"""MultiheadAttention that is resized: by whole heads, so that each head computes what it did."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from modsurg.errors import ResizeError
from modsurg.surgery.resize.axes import Axes, Axis, fixed
from modsurg.surgery.resize.layers import Layer, Sizes


class Attention(Layer):
    """`nn.MultiheadAttention`. Its output alone is resized at its child: `resize(model, "attn.out_proj", ...)`."""

    classes = (nn.MultiheadAttention,)
    keywords = ("embed_dim", "num_heads", "kdim", "vdim")
    outputs = "embed_dim"

    def complete(self, module: nn.Module, asked: Mapping[str, object]) -> Sizes:
        """A head keeps its size: of `embed_dim` and `num_heads` one follows from the other."""
        old, new = self.sizes(module), super().complete(module, asked)
        head = old["embed_dim"] // old["num_heads"]
        if "embed_dim" not in asked:
            new["embed_dim"] = new["num_heads"] * head
        elif "num_heads" not in asked:
            new["num_heads"] = new["embed_dim"] // head
        if new["embed_dim"] != new["num_heads"] * head or new["num_heads"] < 1:
            whole = max(1, round(new["embed_dim"] / head))
            raise ResizeError(
                f"a head keeps its size of {head}, so embed_dim={new['embed_dim']} can't be with "
                f"num_heads={new['num_heads']}; nearest: embed_dim={whole * head}, num_heads={whole}."
            )
        if module._qkv_same_embed_dim:
            if any(new[name] != old[name] for name in ("kdim", "vdim") if name in asked):
                raise ResizeError("query, key and value share one weight here, so kdim and vdim follow embed_dim.")
            new["kdim"] = new["vdim"] = new["embed_dim"]
        return new

    def axes(self, module: nn.Module, old: Sizes, new: Sizes) -> dict[str, Axes]:
        """Rows run over the heads, whole ones; the fused weight over query, key and value before that."""
        head = old["embed_dim"] // old["num_heads"]
        width = Axis((old["embed_dim"],), (new["embed_dim"],))
        reads = {name: Axis((old[name],), (new[name],), reads=True) for name in ("embed_dim", "kdim", "vdim")}
        rows = Axis((old["num_heads"], head), (new["num_heads"], head))
        fused = Axis((3, *rows.old), (3, *rows.new))
        out = cast(torch.Tensor, cast(nn.Module, module.out_proj).weight)
        outputs = width if out.shape[0] == old["embed_dim"] else fixed(out.shape[0])[0]
        return {
            "in_proj_weight": (fused, reads["embed_dim"]),
            "in_proj_bias": (fused,),
            "q_proj_weight": (rows, reads["embed_dim"]),
            "k_proj_weight": (rows, reads["kdim"]),
            "v_proj_weight": (rows, reads["vdim"]),
            "bias_k": (*fixed(1, 1), rows),
            "bias_v": (*fixed(1, 1), rows),
            "out_proj.weight": (outputs, Axis(rows.old, rows.new, reads=True)),
            "out_proj.bias": (outputs,),
        }

    def place(self, module: nn.Module, size: str) -> tuple[str, int]:
        """The width of the heads is that of the input."""
        if size != "embed_dim":
            raise ResizeError(f"{size} follows embed_dim; give that.")
        return "out_proj.weight", 1

    def measure(self, module: nn.Module, shapes: Mapping[str, tuple[int, ...]], counts: Mapping[str, int]) -> Sizes:
        """A head keeps its size."""
        old, width = self.sizes(module), shapes["out_proj.weight"][1]
        heads = old["num_heads"] * width // old["embed_dim"]
        reads = [shapes.get(f"{name}_proj_weight", (width, width))[1] for name in "kv"]
        return {"embed_dim": width, "num_heads": heads, "kdim": reads[0], "vdim": reads[1]}

    def attributes(self, module: nn.Module, new: Sizes) -> list[tuple[nn.Module, str, Any]]:
        """The child that projects the output follows."""
        child = cast(nn.Linear, module.out_proj)
        outputs = new["embed_dim"] if child.out_features == module.embed_dim else child.out_features
        own = super().attributes(module, new)
        return [*own, (child, "in_features", new["embed_dim"]), (child, "out_features", outputs)]

    def initialise(self, scratch: nn.Module) -> None:
        """What the constructor does: the child's weight first, then the rest."""
        cast(nn.Linear, scratch.out_proj).reset_parameters()
        cast(nn.MultiheadAttention, scratch)._reset_parameters()
