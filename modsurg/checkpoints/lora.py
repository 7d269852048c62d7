"""A LoRA adapter as PEFT saves it, and what it adds to the weights of its base model.

The format: a folder with `adapter_config.json` and `adapter_model.safetensors` or `.bin`, whose keys are
`base_model.model.<path>.lora_A.weight`. The formula is W + (alpha / r) B A (Hu et al., "LoRA: Low-Rank Adaptation of
Large Language Models", 2021); with `use_rslora` it is alpha / sqrt(r) (Kalajdzievski, 2023).
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modsurg.checkpoints.formats.registry import open_source
from modsurg.checkpoints.formats.remote import Mirror, local_path, remote_path, shown, url_of
from modsurg.checkpoints.formats.source import Source
from modsurg.errors import FormatError, MergeError, listed

_PREFIX = "base_model.model."
_FACTORS = re.compile(r"(?P<path>.+)\.(?P<factor>lora_(?:embedding_)?[AB])(?:\.(?P<kind>weight|bias))?")
# Options under which the weights are not W + s B A, or which change the layers themselves.
_OTHER_FORMULAS = (
    *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
)
_PAIRS = ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})
_CHANGED_BASES = ("pissa", "olora", "loftq", "corda", "lora_ga")


class LoraAdapter:
    """An opened adapter folder.

    Attributes:
        targets: The keys of the base that the adapter changes, sorted.

    Raises:
        MergeError: Not a folder with a LoRA adapter, or a variant whose weights are computed otherwise, by its name.
        FormatError: The files are not what their names say.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        url = url_of(folder)
        self.folder = local_path(folder) if url is None else remote_path(shown(url))
        self._mirror = Mirror(url) if url is not None else None
        local = self._mirror.path if self._mirror else self.folder
        try:
            self._config = _read_config(local)
            self._source = _open_weights(local)
        except (MergeError, FormatError) as error:
            raise type(error)(str(error).replace(str(local), str(self.folder))) from None
        self._factors: dict[str, dict[str, str]] = {}
        self._whole: dict[str, str] = {}
        for key in self._source:
            self._sort_key(key)
        for path, factors in self._factors.items():
            if not (
                {"lora_A", "lora_B"} <= factors.keys() or {"lora_embedding_A", "lora_embedding_B"} <= factors.keys()
            ):
                raise MergeError(f"{self.folder}: {path} has {listed(sorted(factors), 4)}, and LoRA needs A and B")
        self.targets = sorted({*map(_weight, self._factors), *self._whole, *self._biases()})
        if not self.targets:
            raise MergeError(f"{self.folder} has no target: nothing can be folded in, and nothing was written")

    @property
    def changed_base(self) -> str:
        """How the base was changed before training, as in `"pissa"`; `""` where it was not."""
        init = self._config.get("init_lora_weights")
        found = (name for name in _CHANGED_BASES if isinstance(init, str) and init.startswith(name))
        return next(found, "")

    def check(self, base: Source) -> None:
        """Check that every target is in the base and has the right shape.

        Raises:
            MergeError: The message names what does not match.
        """
        missing = [key for key in self.targets if key not in base]
        if missing:
            raise MergeError(
                f"{len(missing)} of {len(self.targets)} targets of {self.folder} are not in {base.path or 'the base'}; "
                f"nothing was written: {listed(missing, 3)}. Its keys are like {listed(list(base)[:3], 3)}. "
                'Try: merge(..., rename={"old": "new"})'
            )
        tied = [key for key in self.targets if key in base.notes.ties or key in base.notes.ties.values()]
        if tied:
            raise MergeError(
                f"{tied[0]} is tied to another tensor, which the adapter would change too; nothing was written. "
                f"Try: load_state(model, {str(base.path)!r}) and merge the adapter in the model"
            )
        for key in self.targets:
            shape = self._shape(key)
            if shape != base[key].shape:
                raise MergeError(
                    f"{self.folder}: {key} is {shape} in the adapter and {base[key].shape} in the base; "
                    "nothing was written"
                )

    def apply(self, key: str, value: Tensor) -> Tensor:
        """Return what the adapter makes of a tensor of the base, in the dtype of that tensor.

        Args:
            key: The key in the base.
            value: What the base has there.
        """
        if key in self._whole:
            value = self._source.read(self._whole[key]).to(value.dtype)
        path, _, kind = key.rpartition(".")
        factors = self._factors.get(path)
        if factors is None or (kind == "bias" and "lora_B.bias" not in factors):
            return value
        accumulator = torch.float64 if value.dtype == torch.float64 else torch.float32
        if kind == "bias":
            delta = self._scale(path) * self._source.read(factors["lora_B.bias"]).to(accumulator)
        else:
            delta = self._delta(path, accumulator)
        return (value.to(accumulator) + delta).to(value.dtype)

    def close(self) -> None:
        """Close the file."""
        self._source.close()
        if self._mirror:
            self._mirror.close()

    def _sort_key(self, key: str) -> None:
        if not key.startswith(_PREFIX):
            raise MergeError(f"{self.folder}: the key {key!r} does not begin with {_PREFIX!r}: not a PEFT adapter")
        name = key.removeprefix(_PREFIX)
        found = _FACTORS.fullmatch(name)
        if found and found["kind"] == "bias":
            self._factors.setdefault(found["path"], {})[f"{found['factor']}.bias"] = key
        elif found:
            self._factors.setdefault(found["path"], {})[found["factor"]] = key
        elif "lora_" in name or "token_adapter" in name:
            raise MergeError(f"{self.folder}: {key!r} is not part of plain LoRA; nothing was written")
        else:
            self._whole[name.replace(".base_layer.", ".")] = key  # the base that the adapter was trained on

    def _biases(self) -> Iterator[str]:
        return (f"{path}.bias" for path, factors in self._factors.items() if "lora_B.bias" in factors)

    def _pair(self, path: str) -> tuple[str, str]:
        factors = self._factors[path]
        kind = "lora_A" if "lora_A" in factors else "lora_embedding_A"
        return factors[kind], factors[kind[:-1] + "B"]

    def _shape(self, key: str) -> tuple[int, ...]:
        if key in self._whole:
            return self._source[self._whole[key]].shape
        path, _, kind = key.rpartition(".")
        if kind == "bias":
            return self._source[self._factors[path]["lora_B.bias"]].shape
        first, second = self._pair(path)
        a, b = self._source[first].shape, self._source[second].shape
        whole = (b[0], *a[1:])
        return whole[::-1] if self._is_transposed(path) else whole

    def _is_transposed(self, path: str) -> bool:
        return "lora_embedding_A" in self._factors[path] or bool(self._config.get("fan_in_fan_out"))

    def _delta(self, path: str, dtype: torch.dtype) -> Tensor:
        first, second = self._pair(path)
        a, b = self._source.read(first).to(dtype), self._source.read(second).to(dtype)
        groups = a.shape[0] // b.shape[1] if a.ndim > 2 else 1
        blocks = [x.flatten(1) @ y.flatten(1) for x, y in zip(b.chunk(groups), a.chunk(groups), strict=True)]
        delta = torch.cat(blocks).reshape(b.shape[0], *a.shape[1:])
        return self._scale(path) * (delta.T if self._is_transposed(path) else delta)

    def _scale(self, path: str) -> float:
        rank = self._source[self._pair(path)[0]].shape[0]
        alpha = float(_by_pattern(self._config.get("alpha_pattern"), path, self._config.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)


def _read_config(folder: Path) -> Mapping[str, Any]:
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise MergeError(f"lora={str(folder)!r} is not the folder of a PEFT adapter: it has no adapter_config.json")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file} is not valid JSON ({error!s:.100})") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(config, dict) or kind != "LORA":
        raise MergeError(f"{file} describes an adapter of type {kind!r}; only LORA can be folded into weights")
    for name in _OTHER_FORMULAS:
        if config.get(name):
            raise MergeError(f"{file} sets {name}, and only plain LoRA can be folded into weights; nothing was written")
    for name, kinds in (("lora_alpha", (int, float)), ("alpha_pattern", (dict,)), ("fan_in_fan_out", (bool,))):
        if not isinstance(config.get(name, kinds[0]()), kinds):
            raise FormatError(f"{file}: {name} is {config[name]!r:.50}")
    return dict(config)


def _open_weights(folder: Path) -> Source:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return open_source(folder / name)
    raise MergeError(f"lora={str(folder)!r} has neither adapter_model.safetensors nor adapter_model.bin")


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Return the value whose key is the end of the path, in whole segments, or a regular expression of that end."""
    for pattern, value in (patterns or {}).items():
        if path == pattern or path.endswith(f".{pattern}"):
            return value
    for pattern, value in (patterns or {}).items():
        if _is_simple(pattern) and re.fullmatch(rf"(?:.*\.)?(?:{pattern})", path):
            return value
    return default


def _is_simple(pattern: str) -> bool:
    """Whether a pattern of a file takes linear time: at most one repetition, and no group that repeats."""
    return len(pattern) < 200 and not re.search(r"\)[*+?{]", pattern) and len(re.findall(r"[*+{]", pattern)) <= 2


def _weight(path: str) -> str:
    return f"{path}.weight"
