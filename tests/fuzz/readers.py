"""Every reader of a file: what it begins with, how that is changed, and what has to hold for whatever comes out.

A reader returns, or raises an error of modsurg. Anything else, a hang or memory out of proportion is a fault.
"""

import contextlib
import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fuzz.mutation import Mutate, mutate_bytes, mutate_json, mutate_pickle
from fuzz.seeds import Net, folder, header, pickles, recipes, small
from modsurg import diff, load_checkpoint, load_model, load_state, read_state, replay, summary, verify
from modsurg.checkpoints.formats.documents import TIES
from modsurg.checkpoints.formats.safetensors.metadata import EXTRA, HASHES, VERSIONS
from modsurg.cli import main
from modsurg.errors import ModsurgError, ModsurgWarning
from modsurg.structure.schema import KEY
from modsurg.surgery.recipes.recipe import Recipe

_SPLIT = b"\n--8<--\n"
_MOST = 1 << 16


@dataclass(frozen=True)
class Reader:
    """One reader of files.

    Attributes:
        seeds: Gives valid inputs.
        read: Reads any bytes, in a directory of its own.
        mutate: Changes an input.
    """

    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], None]
    mutate: Mutate

    def __call__(self, data: bytes) -> None:
        """Read, and let pass only what a user may see."""
        with TemporaryDirectory() as name, warnings.catch_warnings():
            warnings.simplefilter("ignore", ModsurgWarning)
            self.read(data, Path(name))


def attempt(function: Callable[..., object], *args: object, **options: object) -> None:
    """Call, and take an error of modsurg for an answer."""
    with contextlib.suppress(ModsurgError):
        function(*args, **options)


def look(path: Path) -> None:
    """Read everything in a file in every way that there is."""

    def read() -> None:
        with read_state(path) as state:
            for key in state:
                attempt(state.__getitem__, key)

    def compare() -> None:
        diff(path, path)

    attempt(read)
    attempt(verify, path)
    attempt(lambda: str(summary(path)))
    attempt(compare)


def _raw(suffix: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, here: Path) -> None:
        path = here / f"a{suffix}"
        path.write_bytes(data)
        look(path)
        attempt(load_model, path, trust=Net)
        attempt(load_state, small(), path, strict=False, on_mismatch="slice")

    return read


def _with_header(text: bytes, extra: int | None = None) -> bytes:
    """A safetensors file of a header and as many bytes as it asks for."""
    try:
        ends = [item["data_offsets"][1] for item in json.loads(text).values() if "data_offsets" in item]
        size = int(min(max(ends, default=0), _MOST)) if min(ends, default=0) >= 0 else 64
    except Exception:  # the header is whatever it is
        size = 64
    return len(text).to_bytes(8, "little") + text + bytes(size)


def _header_json(data: bytes, here: Path) -> None:
    path = here / "a.safetensors"
    path.write_bytes(_with_header(data))
    look(path)


def _with_metadata(seed: bytes, metadata: dict[str, str]) -> bytes:
    """The same file with other strings in its header."""
    old = header(seed)
    text = json.dumps({**old, "__metadata__": {**old.get("__metadata__", {}), **metadata}}).encode()
    return len(text).to_bytes(8, "little") + text + seed[8 + int.from_bytes(seed[:8], "little") :]


def _tree(data: bytes, here: Path) -> None:
    path = here / "a.safetensors"
    path.write_bytes(_with_metadata(folder("model")["net.safetensors"], {KEY: data.decode(errors="replace")}))
    attempt(load_model, path, trust=Net)
    attempt(lambda: str(summary(path)))
    attempt(diff, path, path)


def _trees() -> list[bytes]:
    return [header(seed)["__metadata__"][KEY].encode() for seed in folder("model").values()]


def _notes(data: bytes, here: Path) -> None:
    try:
        notes = json.loads(data)
        strings = {str(name): json.dumps(value) for name, value in notes.items()}
    except (ValueError, AttributeError, RecursionError):
        return
    path = here / "a.safetensors"
    path.write_bytes(_with_metadata(folder("safetensors")["0.safetensors"], strings))
    look(path)
    attempt(load_state, Net(), path)


def _note_seeds() -> list[bytes]:
    found = []
    for seed in folder("safetensors").values():
        strings = header(seed)["__metadata__"]
        found.append(
            json.dumps({name: json.loads(strings.get(name, "{}")) for name in (TIES, EXTRA, VERSIONS, HASHES)})
        )
    return [text.encode() for text in found]


def _zipped(data: bytes, seed: bytes, path: Path) -> None:
    """The archive with another pickle in it, its checksums right."""
    with zipfile.ZipFile(io.BytesIO(seed)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("/data.pkl") else old.read(name))


def _pickle(data: bytes, here: Path) -> None:
    path = here / "a.pt"
    _zipped(data, folder("torch")["1.pt"], path)
    look(path)


def _model_pickle(data: bytes, here: Path) -> None:
    path = here / "a.pt"
    _zipped(data, folder("torch_model")["model.pt"], path)
    attempt(load_model, path)
    look(path)


def _index(data: bytes, here: Path) -> None:
    for name, content in folder("shards").items():
        (here / name).write_bytes(content)
    path = here / "net.safetensors.index.json"
    path.write_bytes(data)
    look(path)
    attempt(load_state, Net(), path)


def _distributed(name: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, here: Path) -> None:
        (here / "dcp").mkdir()
        for path, content in folder("distributed").items():
            (here / path).write_bytes(data if path == name else content)
        look(here / "dcp")
        attempt(load_state, Net(), here / "dcp")

    return read


def _piece() -> str:
    return next(name for name in folder("distributed") if name.endswith(".distcp"))


def _recipe(data: bytes, here: Path) -> None:
    if re.search(rb"[0-9]{5}", data):  # an honest recipe may ask for a layer that large, too
        return
    attempt(lambda: replay(small(), Recipe.from_json(data.decode(errors="replace"))))


def _run(data: bytes, here: Path) -> None:
    path = here / "run.safetensors"
    path.write_bytes(_with_metadata(folder("run")["run.safetensors"], {"modsurg.run": data.decode(errors="replace")}))
    model = small()
    kept = torch.get_rng_state()
    things: dict[str, object] = {}
    attempt(load_checkpoint, path, model=model, optimizer=torch.optim.Adam(model.parameters()), things=things)
    attempt(load_checkpoint, path, things=things)
    torch.set_rng_state(kept)


def _run_seeds() -> list[bytes]:
    return [header(folder("run")["run.safetensors"])["__metadata__"]["modsurg.run"].encode()]


_SUFFIXES = (".safetensors", ".pt", ".safetensors.index.json", ".bin", ".ckpt", ".txt")


def _command_line(data: bytes, here: Path) -> None:
    """The first byte chooses what the file is called."""
    path = here / f"a{_SUFFIXES[data[0] % len(_SUFFIXES)] if data else '.pt'}"
    path.write_bytes(data[1:])
    for arguments in (["summary", path], ["summary", "--json", path], ["verify", path], ["diff", path, path]):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            status = main([str(argument) for argument in arguments])
        assert status in (0, 1, 2), status
        assert "Traceback" not in said.getvalue(), said.getvalue()


def _command_seeds() -> list[bytes]:
    kinds = (("safetensors", 0), ("model", 0), ("torch", 1), ("legacy", 1), ("torch_model", 1))
    return [bytes([number]) + data for kind, number in kinds for data in folder(kind).values()]


def _files(*kinds: str) -> Callable[[], list[bytes]]:
    return lambda: [data for kind in kinds for data in folder(kind).values()]


READERS = {
    "safetensors": Reader(_files("safetensors", "model"), _raw(".safetensors"), mutate_bytes),
    "header": Reader(
        lambda: [json.dumps(header(data)).encode() for data in _files("safetensors")()], _header_json, mutate_json
    ),
    "notes": Reader(_note_seeds, _notes, mutate_json),
    "tree": Reader(_trees, _tree, mutate_json),
    "zip": Reader(_files("torch", "torch_model"), _raw(".pt"), mutate_bytes),
    "pickle": Reader(lambda: pickles(model=False), _pickle, mutate_pickle),
    "model_pickle": Reader(lambda: pickles(model=True), _model_pickle, mutate_pickle),
    "legacy": Reader(_files("legacy"), _raw(".pth"), mutate_pickle),
    "index": Reader(lambda: [folder("shards")["net.safetensors.index.json"]], _index, mutate_json),
    "metadata": Reader(lambda: [folder("distributed")["dcp/.metadata"]], _distributed("dcp/.metadata"), mutate_pickle),
    "piece": Reader(
        lambda: [folder("distributed")[_piece()]], lambda data, here: _distributed(_piece())(data, here), mutate_bytes
    ),
    "beside": Reader(
        lambda: [folder("distributed")["dcp/modsurg.json"]], _distributed("dcp/modsurg.json"), mutate_json
    ),
    "recipe": Reader(recipes, _recipe, mutate_json),
    "run": Reader(_run_seeds, _run, mutate_json),
    "command": Reader(_command_seeds, _command_line, mutate_bytes),
}
