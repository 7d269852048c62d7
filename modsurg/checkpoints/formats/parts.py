"""The state of one module in a file of `save_checkpoint`, seen as a state like any other."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from modsurg.checkpoints.formats.derived import DerivedSource
from modsurg.checkpoints.formats.documents import RUN, UNREADABLE, is_state
from modsurg.checkpoints.formats.json_codec import decode
from modsurg.checkpoints.formats.source import Source
from modsurg.checkpoints.formats.torch_save.find_state import STATE_NAMES
from modsurg.errors import FormatError


class RunPart(DerivedSource):
    """What a run holds under one name, by the keys that it has in its own state_dict.

    Args:
        source: The run; closed with this one.
        document: What the run says of itself.
        part: The name.
    """

    def __init__(self, source: Source, document: Mapping[str, Any], part: str) -> None:
        state = document["states"][part]
        strings = {name: text for name, text in source.notes.metadata.items() if name != RUN}
        names = {key: value["$tensor"] for key, value in state.items() if set(value or ()) == {"$tensor"}}
        super().__init__(source, names=names, metadata=strings)
        tensors = _Tensors(source)
        extra = {key: decode(value, tensors) for key, value in state.items() if key not in names}
        known = document.get("versions") or {}
        versions = {path[len(part) + 1 :]: n for path, n in known.items() if path.startswith(f"{part}.")}
        self.notes = replace(self.notes, extra=extra, versions=versions, order=list(state))
        self.taken = part
        self.left = [name for name in document["states"] if name != part]


def run_part(source: Source, part: str | None = None) -> Source:
    """The state of a module in a run.

    Args:
        source: Any state. One that is not a run is given back as it is.
        part: Its name. By default that of the model: `"model"` or one of the names that are usual, or the only one.

    Raises:
        FormatError: There is no such part, or it is not a state of a module; several, none of which is called model; or
            what the run says of itself can't be read.
    """
    if RUN not in source.notes.metadata:
        return source
    try:
        document = json.loads(source.notes.metadata[RUN])
        states = document["states"]
        found = [name for name, state in states.items() if is_state(state, source)]
        usual = [name for name in STATE_NAMES if name in found]
        chosen = part if part is not None else next(iter(usual or found), None)
        if chosen in found and (usual or part is not None or len(found) == 1):
            return RunPart(source, document, str(chosen))
    except UNREADABLE as error:
        raise FormatError(f"{source.path}: its run metadata is corrupt ({error!r:.200}).") from error
    if part is None and not found:
        return source
    if part is None:
        raise FormatError(
            f"{source.path} is a run with {', '.join(found)}: choose one, read_state(path, part={json.dumps(chosen)})"
        )
    if part in states:
        line = f"load_checkpoint(path, {part}={part})"
        raise FormatError(f"{source.path}: its {part!r} is not the state of a module. Try: {line}")
    raise FormatError(f"{source.path} is a run with {', '.join(states)}, and no {part!r}")


class _Tensors(dict[str, Any]):
    """The tensors of a source, each read when it is asked for."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __missing__(self, key: str) -> Any:
        return self._source.read(key)
