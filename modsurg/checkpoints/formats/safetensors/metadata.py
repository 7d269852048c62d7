"""`Notes` as strings in a safetensors header or index, and back.

Our own names begin with `modsurg.`; everything else belongs to the user and is left as it is.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from modsurg.checkpoints.formats.documents import TIES
from modsurg.checkpoints.formats.file_io import as_plain, memory
from modsurg.checkpoints.formats.hashes import SEAL
from modsurg.checkpoints.formats.json_codec import Tensors, decode, encode
from modsurg.checkpoints.formats.source import Notes
from modsurg.errors import FormatError

HASHES = "modsurg.hashes"
EXTRA = "modsurg.extra"
VERSIONS = "modsurg.versions"
SHARDS = "modsurg.shards"
OURS = frozenset({SEAL, HASHES, TIES, EXTRA, VERSIONS, SHARDS})


def pack(notes: Notes, order: Sequence[str]) -> dict[str, str]:
    """Notes as strings.

    Args:
        notes: What to write.
        order: Every key of the state, tensors and extra state: positions are kept for those that the header lacks.

    Raises:
        SaveError: Extra state that is not plain data, named by its key.
    """
    metadata = {"format": "pt"} | {name: text for name, text in sorted(notes.metadata.items()) if name not in OURS}
    places = {key: place for place, key in enumerate(order)}
    if notes.ties:
        metadata |= {key: to for key, to in notes.ties.items() if key not in metadata}  # as safetensors notes them
        metadata[TIES] = compact([[places[key], key, to] for key, to in notes.ties.items()])
    if notes.extra:
        metadata[EXTRA] = compact([[places[key], key, _encode(key, value)] for key, value in notes.extra.items()])
    if notes.versions:
        metadata[VERSIONS] = compact(dict(notes.versions))
    return metadata


def unpack(metadata: Mapping[str, str], names: Sequence[str]) -> Notes:
    """Notes from strings.

    Args:
        metadata: As `pack` wrote it, or any other program: then there is only the user's own.
        names: The tensors of the file, in the order of the state_dict.

    Raises:
        FormatError: The strings are damaged.
    """
    own = {name: text for name, text in metadata.items() if name not in OURS}
    if own.get("format") == "pt":
        del own["format"]
    try:
        ties = json.loads(metadata.get(TIES, "[]"))
        if TIES not in metadata:  # safetensors.torch.save_model: the name that was left out, and the one that is there
            ties = [[len(names), key, to] for key, to in own.items() if to in names and key not in names]
        own = {name: text for name, text in own.items() if [name, text] not in [each[1:] for each in ties]}
        extra = json.loads(metadata.get(EXTRA, "[]"))
        versions = json.loads(metadata.get(VERSIONS, "{}"))
        order, known = list(names), set(names)
        for place, key, _ in sorted([*ties, *extra], key=lambda item: item[0]):
            if key in known or not isinstance(key, str):
                raise FormatError(f"{key!r} is there twice")
            order.insert(place, key)
        for _, key, to in ties:
            if to not in known:
                raise FormatError(f"{key!r} is tied to {to!r}, which is not there")
        values = {key: _decode(value) for _, key, value in extra}
        return Notes(own, {key: to for _, key, to in ties}, values, {key: int(n) for key, n in versions.items()}, order)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
        raise FormatError(f"the notes of modsurg in the metadata are damaged: {error}") from error


def unpack_hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Name -> hash, empty where the file has none.

    Raises:
        FormatError: The strings are damaged.
    """
    try:
        hashes = json.loads(metadata.get(HASHES, "{}"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the hashes of modsurg in the metadata are damaged: {error}") from error
    if not isinstance(hashes, dict) or not all(isinstance(text, str) for text in hashes.values()):
        raise FormatError("the hashes of modsurg in the metadata are damaged: no object of strings")
    return hashes


def compact(data: Any) -> str:
    """JSON without spaces, the same for the same data."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _encode(key: str, value: object) -> Any:
    tensors: Tensors = {}
    data = encode(value, key, tensors)
    packed = {
        name: [str(tensor.dtype), list(tensor.shape), base64.b64encode(memory(as_plain(tensor))).decode()]
        for name, tensor in tensors.items()
    }
    return [data, packed]


def _decode(value: Any) -> object:
    data, packed = value
    return decode(data, {name: _tensor(*parts) for name, parts in packed.items()})


def _tensor(dtype: str, shape: list[int], text: str) -> torch.Tensor:
    kind = getattr(torch, dtype.removeprefix("torch."))
    tensor = torch.empty(0, dtype=kind, device="cpu")
    content = base64.b64decode(text, validate=True)
    if content:
        tensor = torch.frombuffer(bytearray(content), dtype=kind)
    return tensor.reshape(shape)
