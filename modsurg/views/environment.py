"""What a bug report needs to know of a machine: versions, devices, memory, and what is missing."""

import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any, TypeVar

from modsurg.views.text import size

Value = TypeVar("Value")

PACKAGES = {
    "torchvision": "pictures and their models: pip install 'modsurg[vision]'",
    "safetensors": "required",
    "rich": "required",
    "xxhash": "required",
    "numpy": "needed by torch for arrays",
    "pillow": "pictures: pip install 'modsurg[vision]'",
    "tensorboard": "logs of a training: pip install 'modsurg[tensorboard]'",
    "timm": None,
    "transformers": None,
    "accelerate": None,
    "peft": None,
}


def environment() -> dict[str, Any]:
    """Look at the machine. Never fails: what can't be found out is None or says why.

    Returns:
        JSON-able: `modsurg`, `python`, `platform`, `cpu`, `memory` (bytes), `torch`, `devices`, `packages` (name to
        version, None where it is absent) and `missing` (name to what it is for).

    Example:
        >>> found = environment()
        >>> found["python"]["version"].count("."), found["cpu"]["cores"] > 0
        (2, True)
    """
    packages = {name: version(name) for name in PACKAGES}
    return {
        "modsurg": version("modsurg"),
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "executable": sys.executable,
        },
        "platform": platform.platform(),
        "cpu": {"name": _attempt(_cpu_name), "cores": os.cpu_count(), "usable_cores": _attempt(_usable_cores)},
        "memory": {"total": _attempt(_memory_total), "available": _attempt(_memory_available)},
        "torch": _attempt(_torch),
        "devices": _attempt(_devices),
        "packages": packages,
        "missing": {name: use for name, use in PACKAGES.items() if use and packages[name] is None},
    }


def table(found: dict[str, Any]) -> str:
    """The same for reading: two columns."""
    torch = found["torch"] if isinstance(found["torch"], dict) else {"version": found["torch"]}
    rows = [
        ("modsurg", found["modsurg"] or "a checkout"),
        ("python", f"{found['python']['version']} ({found['python']['implementation']})"),
        ("platform", found["platform"]),
        ("cpu", f"{found['cpu']['name']}, {found['cpu']['usable_cores']} of {found['cpu']['cores']} cores usable"),
        ("memory", f"{_size(found['memory']['available'])} free of {_size(found['memory']['total'])}"),
        ("torch", torch["version"]),
        *((f"  {name}", _said(value)) for name, value in torch.items() if name != "version"),
    ]
    devices = found["devices"]
    for device in devices if isinstance(devices, list) else [{"device": "devices", "name": devices}]:
        memory = f", {_size(device['memory'])}" if device.get("memory") else ""
        rows.append((device["device"], f"{device['name']}{memory}"))
    rows += [(name, text or "-") for name, text in found["packages"].items()]
    rows += [(f"missing {name}", use) for name, use in found["missing"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def version(package: str) -> str | None:
    """Version of an installed package, None where it is absent. Nothing is imported.

    Example:
        >>> version("no-such-package") is None
        True
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _attempt(look: Callable[[], Value]) -> Value | str | None:
    try:
        return look()
    except Exception as error:  # whatever is broken on that machine belongs into the report
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _torch() -> dict[str, Any]:
    import torch  # a torch that can't be imported is a finding too

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "built_for_cuda": torch.version.cuda,
        "built_for_rocm": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,  # type: ignore[no-untyped-call]  # torch's own gap
        "mps": torch.backends.mps.is_available(),
        "accelerator": None if accelerator is None else str(accelerator),
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
    }


def _devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        capability = f"{properties.major}.{properties.minor}"
        found.append(
            {
                "device": f"cuda:{number}",
                "name": properties.name,
                "memory": properties.total_memory,
                "capability": capability,
            }
        )
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU", "memory": torch.mps.recommended_max_memory()})
    return found


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_name() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _memory_total() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _memory_available() -> int | None:
    if not os.path.exists("/proc/meminfo"):
        return None
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _size(nbytes: object) -> str:
    return size(nbytes) if isinstance(nbytes, int) else "?" if nbytes is None else str(nbytes)


def _said(value: object) -> str:
    return "no" if value in (None, False) else "yes" if value is True else str(value)
