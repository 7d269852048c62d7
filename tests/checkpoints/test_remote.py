"""Files elsewhere: ranges, one version, retries, whole uploads, and no secret in any text."""

import contextlib
import http.server
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from modsurg import (
    Trainer,
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
from modsurg.errors import FormatError, MergeError, RemoteError, SaveError, TrainingError

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


def test_a_lora_adapter(memory, tmp_path):
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 300, generator=generator), torch.randn(300, 2, generator=generator)
    prefix = "base_model.model.0"
    save_state({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, "memory://lora/adapter_model.safetensors")
    memory.pipe_file("/lora/adapter_config.json", b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    save_state(net(), "memory://base.safetensors")
    found = merge({"memory://base.safetensors": 1}, tmp_path / "merged.safetensors", lora="memory://lora")
    assert found.lora == ("0.weight",)
    merged = read_state(tmp_path / "merged.safetensors")
    assert torch.allclose(merged["0.weight"], net()[0].weight + 2 * b @ a)
    memory.pipe_file("/lora/adapter_config.json", b'{"peft_type": "IA3"}')
    with pytest.raises(MergeError, match=r"^memory://lora/adapter_config\.json describes an adapter of type 'IA3'"):
        merge({"memory://base.safetensors": 1}, tmp_path / "other.safetensors", lora="memory://lora")


def test_a_directory_of_torch_distributed(memory):
    save_state(net(), "memory://a.safetensors")
    done = convert("memory://a.safetensors", "memory://runs/dcp")
    assert str(done.target) == "memory://runs/dcp"
    model = net(1)
    load_state(model, "memory://runs/dcp")
    assert same(model, net())
    with pytest.raises(SaveError, match="exists already"):
        convert("memory://a.safetensors", "memory://runs/dcp")


def fit(directory, epochs, resume=False, keep=0):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    data = [(torch.randn(4, 4), torch.randn(4, 2)) for _ in range(3)]
    trainer = Trainer(model, optimizer, nn.MSELoss(), checkpoint_dir=directory, keep=keep, progress=False)
    trainer.fit(data, data, epochs=epochs, resume=resume)
    return model


def test_the_files_of_a_trainer(memory):
    whole = fit(None, 4)
    fit("memory://run", 2, resume=True)
    assert same(fit("memory://run", 4, resume=True), whole)
    assert same(fit("memory://run", 4, resume="memory://run/last.safetensors"), whole)
    assert {"best.safetensors", "last.safetensors"} <= {path.rpartition("/")[2] for path in memory.find("/run")}
    with pytest.raises(TrainingError, match=r"resume='memory://run/gone\.safetensors': the file does not exist"):
        fit("memory://run", 4, resume="memory://run/gone.safetensors")


def test_numbered_files_of_a_trainer(memory):
    fit("memory://run", 4, keep=2)
    names = [path.rpartition("/")[2] for path in memory.glob("/run/step-*")]
    assert names == ["step-00000009.safetensors", "step-00000012.safetensors"]


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


KILLED = """
import os, signal, sys
import fsspec
from fsspec.implementations.local import LocalFileSystem
from torch import nn
from modsurg import save_state

class Slow(LocalFileSystem):
    protocol = "slow"

    def put_file(self, source, target, **options):
        with open(source, "rb") as file, open(target, "wb") as written:
            written.write(file.read(100))
            written.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("slow://"))

fsspec.register_implementation("slow", Slow)
save_state(nn.Linear(50, 50), "slow://" + sys.argv[1])
"""


def test_a_killed_upload_leaves_the_old_file_or_none(tmp_path):
    target = tmp_path / "a.safetensors"
    for before in (None, save_state(net(), tmp_path / "old.safetensors").read_bytes()):
        if before:
            target.write_bytes(before)
        done = subprocess.run([sys.executable, "-c", KILLED, str(target)], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert (target.read_bytes() if target.exists() else None) == before


def test_the_text_of_a_path_shows_no_secret(memory):
    path = remote.remote_path("https://me:secret@host/a.pt?token=abc")
    assert str(path) == "https://host/a.pt"
    assert "abc" not in repr(path) + f"{path}"
    assert os.fspath(path) == "https://me:secret@host/a.pt?token=abc"


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
