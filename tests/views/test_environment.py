"""modsurg env: complete where it can be, and never failing."""

import builtins
import json
import sys
from importlib import metadata

import torch

from modsurg.views import environment as module
from modsurg.views.environment import PACKAGES, environment, table


def test_what_is_there():
    found = environment()
    json.dumps(found, allow_nan=False)
    assert found["torch"]["version"] == torch.__version__
    assert found["torch"]["cuda"] is None or torch.cuda.is_available()
    assert found["memory"]["total"] > 2**28
    assert found["packages"]["safetensors"] == metadata.version("safetensors")
    assert list(found["packages"]) == list(PACKAGES)


def test_packages_that_are_absent(monkeypatch):
    def version(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    found = environment()
    assert set(found["packages"].values()) == {None}
    assert "pip install 'modsurg[vision]'" in found["missing"]["torchvision"]
    assert "missing torchvision" in table(found)


def test_a_broken_torch_is_a_finding(monkeypatch):
    real = builtins.__import__

    def broken(name: str, *rest):
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    found = environment()
    assert found["torch"] == found["devices"] == "OSError: libcudart.so.13: cannot open shared object file"
    assert "libcudart" in table(found)


def test_a_machine_without_proc(monkeypatch):
    monkeypatch.setattr(module.os.path, "exists", lambda path: False)
    monkeypatch.setattr(module.os, "sysconf", lambda name: 1 / 0)
    found = environment()
    assert found["memory"] == {"total": "ZeroDivisionError: division by zero", "available": None}
    assert "ZeroDivisionError" in table(found)


def test_devices_are_listed(monkeypatch):
    class Properties:
        name, total_memory, major, minor = "Test GPU", 16 * 2**30, 8, 9

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: Properties)
    text = table(environment())
    assert "cuda:0" in text
    assert "Test GPU, 16.0 GiB" in text
    assert sys.version.split()[0] in text
