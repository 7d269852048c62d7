"""Checkpoint arithmetic and files elsewhere, beside the same by hand."""

import http.server
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.harness import Table, extra_memory, interleaved, there
from modsurg import merge, read_state, save_state


def averaging(runs: int) -> list[Table]:
    """Three files of 400 MB to one."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number in range(3):
            state = {f"layer{n}": torch.full((5_000_000,), float(number + n)) for n in range(20)}
            paths.append(str(save_state(state, f"{folder}/{number}.safetensors")))

        def by_hand() -> None:
            states = [load_file(path) for path in paths]
            mean = {key: sum(state[key] for state in states) / 3 for key in states[0]}
            save_file(mean, f"{folder}/hand.safetensors")

        def by_torch() -> None:
            states = [load_file(path) for path in paths]
            torch.save({key: sum(state[key] for state in states) / 3 for key in states[0]}, f"{folder}/hand.pt")

        def ours(method: str = "linear") -> None:
            base = paths[0] if method != "linear" else None
            merge(dict.fromkeys(paths, 1 / 3), f"{folder}/ours.safetensors", method=method, base=base)  # type: ignore[arg-type]  # a name of a method

        ways = {
            "modsurg.merge": ours,
            "load_file, mean, save_file": by_hand,
            "load_file, mean, torch.save": by_torch,
        }
        times = interleaved(ways, runs)
        memory = {name: [extra_memory(way)] for name, way in ways.items()}
        others = {f'method="{name}"': [extra_memory(lambda name=name: ours(name))] for name in ("task", "ties")}  # type: ignore[misc]  # bound now
    note = "Ours writes every byte through to the disk (fsync) and hashes it; the others leave that to the kernel."
    return [
        Table("The mean of three checkpoints of 400 MB", times, note=note),
        Table("Memory that it takes, one run", {**memory, **others}, unit="MB"),
    ]


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """A local web server with ranges; its URL, and the bytes that it sent."""
    sent = [0]

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            with open(folder / self.path.lstrip("/"), "rb") as file:
                size = file.seek(0, 2)
                found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
                start, end = (int(found[1]), int(found[2]) + 1) if found else (0, size)
                file.seek(start)
                data = file.read(end - start) if self.command == "GET" else b""
            self.send_response(206 if found else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(end - start))
            if found:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.end_headers()
            self.wfile.write(data)
            sent[0] += len(data)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", sent
    finally:
        server.shutdown()


def remote(runs: int) -> list[Table]:
    """One tensor of 4 MB out of a file of 100 MB on a local web server."""
    if not there("aiohttp"):
        return []
    import fsspec

    with tempfile.TemporaryDirectory() as folder:
        state = {f"layer{n}": torch.rand(1_000_000) for n in range(25)}
        save_state(state, f"{folder}/a.safetensors")
        with serving(Path(folder)) as (url, sent):

            def ours() -> None:
                assert read_state(f"{url}/a.safetensors", where="layer7")["layer7"] is not None

            def whole() -> None:
                local = f"{folder}/copy.safetensors"
                fsspec.filesystem("http").get_file(f"{url}/a.safetensors", local)
                with safe_open(local, "pt") as file:
                    file.get_tensor("layer7")

            ways = {"modsurg.read_state(url)": ours, "download, then safe_open": whole}
            times = interleaved(ways, runs)
            nbytes = {}
            for name, way in ways.items():
                sent[0] = 0
                way()
                nbytes[name] = [sent[0] / 1e6]
    return [
        Table("One tensor of 4 MB out of 100 MB over HTTP, local server", times),
        Table("Bytes fetched for it", nbytes, 4.2, unit="MB"),
    ]


MEASUREMENTS = (averaging, remote)
QUICK = (remote,)
