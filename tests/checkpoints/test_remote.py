"""Files elsewhere: ranges, one version, retries, whole uploads, and no secret in any text."""

import contextlib
import http.server
import os
import re
import sys
import threading

import pytest
import torch
from torch import nn

from modsurg import (
    convert,
    diff,
    load_checkpoint,
    load_model,
    load_state,
    merge,
    read_state,
    save_checkpoint,
    save_model,
    save_state,
    summary,
    verify,
)
from modsurg.checkpoints.formats import remote
from modsurg.cli import main
from modsurg.errors import FormatError, RemoteError

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


class Server(http.server.ThreadingHTTPServer):
    """Serves one directory, by ranges; counts bytes and requests, and can fail or change a file midway."""

    daemon_threads = True

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.sent, self.requests, self.drop, self.on_range = root, 0, [], 0, None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, body):
        path = self.server.root / self.path.partition("?")[0].lstrip("/")
        self.server.requests.append((self.command, self.headers.get("Range")))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        ranged = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        piece = data[int(ranged[1]) : int(ranged[2]) + 1] if ranged else data
        self.send_response(206 if ranged else 200)
        self.send_header("ETag", f'"{hash(data)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(piece)))
        if ranged:
            self.send_header("Content-Range", f"bytes {ranged[1]}-{ranged[2]}/{len(data)}")
        self.end_headers()
        if body:
            if self.server.drop > 0:
                self.server.drop -= 1
                self.wfile.write(piece[: len(piece) // 2])
                self.close_connection = True
                self.connection.close()
                return
            self.server.sent += len(piece)
            self.wfile.write(piece)
            if self.server.on_range:
                self.server.on_range(path)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    pytest.importorskip("aiohttp")
    (tmp_path / "served").mkdir()
    with contextlib.closing(Server(tmp_path / "served")) as found:
        found.close = found.server_close
        yield found
        found.shutdown()


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 4))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.safetensors.index.json"])
def test_a_state_goes_to_memory_and_back(memory, name):
    options = {"shard_size": 100_000} if name.endswith("json") else {}
    path = save_state(net(), f"memory://folder/{name}", **options)
    assert str(path) == os.fspath(path) == f"memory://folder/{name}"
    model = net(1)
    assert load_state(model, path).loaded
    assert same(model, net())
    assert torch.equal(read_state(f"memory://folder/{name}")["2.bias"], net()[2].bias)
    assert "300" in str(summary(path))
    assert not diff(path, model)
    assert verify(path)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_a_whole_model(memory, name):
    path = save_model(net(), f"memory://{name}")
    assert same(load_model(path), net())
    assert "Linear" in str(summary(f"memory://{name}"))
    assert list(memory.ls("/", detail=False)) == [f"/{name}"]


def test_a_run(memory):
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    path = save_checkpoint("memory://run.safetensors", step=7, model=model, optimizer=optimizer)
    other = net(1)
    assert load_checkpoint(path, model=other) == 7
    assert same(other, model)


def test_convert_and_merge(memory, tmp_path):
    save_state(net(), "memory://a.pt")
    save_state(net(1), tmp_path / "b.safetensors")
    done = convert("memory://a.pt", "memory://a.safetensors", dtype=torch.float16)
    assert str(done.source) == "memory://a.pt"
    assert read_state(done.target)["0.weight"].dtype is torch.float16
    found = merge({"memory://a.pt": 0.5, tmp_path / "b.safetensors": 0.5}, "memory://soup.safetensors")
    assert torch.allclose(read_state(found.target)["2.bias"], (net()[2].bias + net(1)[2].bias) / 2)


def test_the_command_line(memory, capsys):
    save_state(net(), "memory://a.safetensors")
    assert main(["summary", "memory://a.safetensors"]) == 0
    assert main(["verify", "memory://a.safetensors"]) == 0
    assert main(["convert", "memory://a.safetensors", "memory://b.pt"]) == 0
    assert main(["diff", "memory://a.safetensors", "memory://b.pt"]) == 0
    assert memory.exists("/b.pt")


def test_only_what_is_asked_for_is_fetched(server):
    state = {"small": torch.ones(1000, 100), "large": torch.zeros(3_000_000), "last": torch.ones(3)}
    path = save_state(state, server.root / "a.safetensors")
    found = read_state(f"{server.url}/a.safetensors", where="small")
    header = len(server.requests)
    assert header <= 3
    assert server.sent < 20_000
    assert torch.equal(found["small"], state["small"])
    assert server.sent < 1.05 * state["small"].nbytes + 8192
    assert server.sent < path.stat().st_size / 20


def test_one_tensor_of_a_pickle(server):
    state = {"small": torch.ones(1000, 100), "large": torch.zeros(3_000_000)}
    torch.save(state, server.root / "a.pt")
    assert torch.equal(read_state(f"{server.url}/a.pt", where="small")["small"], state["small"])
    assert server.sent < 2_000_000


def test_a_dropped_connection_is_tried_again(server):
    save_state(net(), server.root / "a.safetensors")
    source = read_state(f"{server.url}/a.safetensors")
    server.drop = 2
    assert torch.equal(source["0.weight"], net()[0].weight)


def test_a_server_that_is_gone(server):
    save_state(net(), server.root / "a.safetensors")
    model = net(1)
    before = [p.clone() for p in model.parameters()]
    source = read_state(f"{server.url}/a.safetensors")
    server.drop = 1000
    with pytest.raises(RemoteError, match=r"a\.safetensors can't be reached \(\w+, 4 times\)"):
        load_state(model, source)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_file_that_is_exchanged_midway(server):
    save_state(net(), server.root / "a.safetensors")
    model = net(1)
    before = [p.clone() for p in model.parameters()]
    source = read_state(f"{server.url}/a.safetensors")
    other = save_state(net(2), server.root / "b.safetensors").read_bytes()
    server.on_range = lambda path: path.write_bytes(other)
    with pytest.raises(RemoteError, match=r"a\.safetensors changed while it was being read"):
        load_state(model, source)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_what_is_not_there(server, memory):
    with pytest.raises(FileNotFoundError, match=r"there is no file memory://gone\.safetensors"):
        load_state(net(), "memory://gone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"there is no file http"):
        read_state(f"{server.url}/gone.safetensors")
    with pytest.raises(RemoteError, match=r"the web takes no uploads"):
        save_state(net(), f"{server.url}/new.safetensors")


def test_no_secret_is_shown(server):
    (server.root / "a.safetensors").write_bytes(b"<html>sign in</html>")
    host = server.url.removeprefix("http://")
    with pytest.raises(FormatError) as caught:
        read_state(f"http://me:secret@{host}/a.safetensors?token=abcdef")
    assert "secret" not in str(caught.value) + repr(caught.value.__context__)
    assert "abcdef" not in str(caught.value)
    with pytest.raises(FileNotFoundError) as gone:
        read_state(f"http://{host}/gone.safetensors?token=abcdef")
    assert "abcdef" not in str(gone.value)


def test_a_failed_upload_leaves_the_old_file(memory, monkeypatch):
    save_state(net(), "memory://a.safetensors")
    before = memory.cat_file("/a.safetensors")
    monkeypatch.setattr(type(memory), "put_file", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(RemoteError, match="can't be reached"):
        save_state(net(1), "memory://a.safetensors")
    assert memory.cat_file("/a.safetensors") == before


def test_without_fsspec(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(RemoteError, match=r"needs fsspec, .*Try: pip install 'modsurg\[remote\]'"):
        read_state("s3://bucket/a.safetensors")


def test_a_file_url_is_the_local_path(tmp_path):
    path = save_state(net(), f"file://{tmp_path}/a.safetensors")
    assert path == tmp_path / "a.safetensors"
    assert load_state(net(1), f"file://{tmp_path}/a.safetensors")


def test_nothing_is_left_behind(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(remote.tempfile, "tempdir", str(tmp_path))
    before = len(remote._mirrors)
    save_state(net(), "memory://a.safetensors")
    load_state(net(1), "memory://a.safetensors")
    load_model(save_model(net(), "memory://m.pt"))
    source = read_state("memory://a.safetensors")
    assert source["0.bias"] is not None
    del source
    assert list(tmp_path.iterdir()) == []
    assert len(remote._mirrors) == before


@pytest.fixture
def s3(monkeypatch):
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    system.mkdir("bucket")
    yield system
    server.stop()


def test_a_bucket(s3):
    save_state(net(), "s3://bucket/a.safetensors")
    model = net(1)
    assert load_state(model, "s3://bucket/a.safetensors")
    assert same(model, net())
    save_state(net(2), "s3://bucket/set.safetensors", shard_size=100_000)
    assert load_state(model, "s3://bucket/set.safetensors.index.json")
    assert same(model, net(2))
    assert same(load_model(save_model(net(), "s3://bucket/m.pt")), net())
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/gone\.pt"):
        load_state(model, "s3://bucket/gone.pt")
