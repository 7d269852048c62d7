"""Changes that keep the form of what they change, so that they get past the first check of a reader."""

import json
import pickletools
from collections.abc import Callable
from random import Random

Mutate = Callable[[bytes, Random], bytes]
_NUMBERS = (0, 1, -1, 2, 7, 63, 255, 65536, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64, 10**30, 0.5)
_TEXTS = (
    "",
    ".",
    "a",
    "..",
    "/",
    "\0",
    "\ud800",
    "weight",
    "__class__",
    "builtins:list",
    "torch:nn",
    "$tensor",
    "$tuple",
)
_TAGS = (
    *("list", "dict", "items", "object", "name", "module", "tensor", "method", "partial", "enum", "eval_lock"),
    *("weakref", "set", "float", "complex", "bytes", "size", "device", "dtype", "shared"),
)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Bytes flipped, cut out, doubled, moved, or set to a length that may matter."""
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        if not data:
            return bytes([random.randrange(256)])
        at, length = random.randrange(len(data)), random.choice((1, 1, 2, 4, 8, 32, 200))
        match random.randrange(6):
            case 0:
                data[at] ^= 1 << random.randrange(8)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length]
            case 3:
                number = int(random.choice(_NUMBERS)) % 2 ** (8 * min(length, 8))
                data[at : at + length] = number.to_bytes(length, random.choice(("little", "big")))
            case 4:
                other = random.randrange(len(data))
                data[at : at + length] = data[other : other + length]
            case 5:
                data[at] = random.randrange(256)
    return bytes(data)


def mutate_json(data: bytes, random: Random) -> bytes:
    """Values of a JSON text replaced, removed, doubled, wrapped or moved; now and then only its bytes."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, random)
    if not isinstance(value, dict | list) or random.randrange(20) == 0:
        return mutate_bytes(data, random)
    for _ in range(random.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return data
        holder, key = random.choice(places)
        _change(holder, key, random, places)
    try:
        return json.dumps(value).encode()
    except (RecursionError, ValueError):
        return data


def mutate_pickle(data: bytes, random: Random) -> bytes:
    """Operations of a pickle removed, doubled or moved, or its bytes changed."""
    if random.randrange(3) == 0:
        return mutate_bytes(data, random)
    try:
        starts = [at for _, _, at in pickletools.genops(data)]
    except Exception:  # pickletools says anything about a pickle that is none
        return mutate_bytes(data, random)
    parts = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(random.choice((1, 1, 2, 3))):
        at, other = random.randrange(len(parts)), random.randrange(len(parts))
        match random.randrange(4):
            case 0:
                parts[at] = b""
            case 1:
                parts.insert(at, parts[other])
            case 2:
                parts[at], parts[other] = parts[other], parts[at]
            case 3:
                parts[at] = mutate_bytes(parts[at], random)
    return b"".join(parts)


def _places(value, depth=0):
    if depth > 40:
        return
    for key, item in list(value.items()) if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item, depth + 1)


def _change(holder, key, random, places):
    if (isinstance(holder, list) and key >= len(holder)) or (isinstance(holder, dict) and key not in holder):
        return
    other, at = random.choice(places)
    is_there = at in other if isinstance(other, dict) else at < len(other)
    borrowed = json.loads(json.dumps(other[at])) if is_there else None
    match random.randrange(10):
        case 0 | 1:
            holder[key] = random.choice((None, True, [], {}, *_TEXTS, *_NUMBERS))
        case 2 | 3:
            holder[key] = borrowed
        case 4:
            del holder[key]
        case 5:
            holder[key] = {random.choice(_TAGS): holder[key]}
        case 6:
            holder[key] = [holder[key], borrowed]
        case 7 if isinstance(holder, dict):
            holder[random.choice((*_TEXTS[:-2], str(at)))] = holder.pop(key)
        case 8 if type(holder[key]) is int:
            holder[key] += random.choice((-1, 1, 8))
        case _:
            holder[key] = random.choice(_NUMBERS) if type(holder[key]) is int else random.choice(_TEXTS)
