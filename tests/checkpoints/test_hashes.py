"""Hashes of tensors and of the header."""

import xxhash

from modsurg.checkpoints.formats.file_io import Region
from modsurg.checkpoints.formats.hashes import STEP, hash_region, hash_through, seal


def test_hashing_in_step_is_hashing_at_once(tmp_path):
    content = bytes(range(256)) * (3 * STEP // 256) + b"tail"
    pieces = []
    assert hash_through(memoryview(content), lambda piece: pieces.append(bytes(piece))) == xxhash.xxh3_64_hexdigest(
        content
    )
    assert b"".join(pieces) == content
    (tmp_path / "a").write_bytes(b"before" + content)
    with open(tmp_path / "a", "rb") as file:
        assert hash_region(Region(file.fileno(), 6, len(content))) == xxhash.xxh3_64_hexdigest(content)
        assert hash_region(Region(file.fileno(), 0, 0)) == xxhash.xxh3_64_hexdigest(b"")


def test_a_seal_does_not_depend_on_itself():
    header = b'{"a":"b","modsurg.header":"%s"}'
    assert seal(header % (b"0" * 16)) == seal(header % b"0123456789abcdef")
    assert seal(header % (b"0" * 16)) != seal(header % (b"g" * 16))
    assert seal(header.replace(b"b", b"c") % (b"0" * 16)) != seal(header % (b"0" * 16))
