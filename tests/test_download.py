"""Downloads that end early, resume, lie or fail; from a server on this machine."""

import contextlib
import hashlib
import http.server
import resource
import shutil
import socket
import threading
import time
from collections import namedtuple

import pytest

from models.config_files import REPOSITORY, read_yaml
from models.plan import plan_from_flags
from scripts import download
from training import distributed

CONTENT = bytes(range(256)) * 20_000  # 5 MB, several chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT. Paths: /file with ranges, /plain without, /torn ends after a third, /slow
    when `server.go` is set, and /page is a web page; /hub redirects to /file and states a hash,
    /wronghub a wrong one."""

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if self.path.endswith("hub"):
            self.send_response(302)
            self.send_header("Location", "/file")
            stated = SHA256 if self.path == "/hub" else "0" * 64
            self.send_header("X-Linked-Etag", f'"{stated}"')
            self.end_headers()
            return
        if self.path == "/missing":
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if self.path == "/plain" or not asked:
            start = 0
            self.send_response(200)
        elif start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.end_headers()
            return
        else:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        body = CONTENT[start:]
        kind = "text/html" if self.path == "/page" else "application/octet-stream"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/slow":
            self.server.go.wait(10)
        with contextlib.suppress(ConnectionError):  # of a client that had enough
            self.wfile.write(body[: len(body) // 3] if self.path == "/torn" else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.asked = []
    running.go = threading.Event()
    running.url = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "pretrained" / "weights.pt"


def partial(target):
    return target.with_name("weights.pt.part")


def leave_partial(target, content):
    target.parent.mkdir()
    partial(target).write_bytes(content)


def only(target):
    """The file is whole and nothing else lies beside it."""
    return target.read_bytes() == CONTENT and list(target.parent.iterdir()) == [target]


def test_file_comes_whole_and_is_not_fetched_twice(server, target):
    assert download.fetch(f"{server.url}/file", target, SHA256[:8])
    assert only(target)
    assert not download.fetch(f"{server.url}/file", target, SHA256[:8])
    assert server.asked == [None]


def test_a_connection_that_ends_early_leaves_a_part_that_the_next_call_continues(server, target):
    with pytest.raises((ValueError, FileNotFoundError), match="repeat the command"):
        download.fetch(f"{server.url}/torn", target)
    third = len(CONTENT) // 3
    assert not target.exists() and partial(target).stat().st_size == third
    assert download.fetch(f"{server.url}/file", target, SHA256)
    assert server.asked == [None, f"bytes={third}-"]
    assert only(target)


def test_server_without_ranges_starts_over(server, target):
    leave_partial(target, b"x" * 1000)
    assert download.fetch(f"{server.url}/plain", target, SHA256)
    assert server.asked == ["bytes=1000-"]
    assert only(target)


@pytest.mark.parametrize("content", [CONTENT, CONTENT + b"x"], ids=["whole", "too long"])
def test_part_that_holds_everything(server, target, content):
    leave_partial(target, content)
    assert download.fetch(f"{server.url}/file", target)
    assert only(target)
    assert len(server.asked) == (1 if content == CONTENT else 2)


def test_damaged_part_is_found_by_its_hash_and_removed(server, target):
    leave_partial(target, b"x" * 1000)
    with pytest.raises(ValueError, match=f"damaged.*should be {SHA256[:8]}"):
        download.fetch(f"{server.url}/file", target, SHA256[:8])
    assert list(target.parent.iterdir()) == []


def test_hash_that_the_hub_states_is_checked(server, target):
    with pytest.raises(ValueError, match="damaged.*should be 0000"):
        download.fetch(f"{server.url}/wronghub", target)
    assert not target.exists()
    assert download.fetch(f"{server.url}/hub", target)
    assert only(target)


def test_other_file_of_the_same_name_is_kept_and_named(server, target):
    target.parent.mkdir()
    target.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"weights.pt is not the file of .*delete it"):
        download.fetch(f"{server.url}/file", target, SHA256)
    assert target.read_bytes() == b"mine" and server.asked == []


def test_file_that_another_program_cut_short_is_named_by_its_size(server, target):
    target.parent.mkdir()
    target.write_bytes(CONTENT[:1000])
    message = f"weights.pt is not the file of .*delete it .1000 bytes, should be {len(CONTENT)}"
    with pytest.raises(ValueError, match=message):
        download.fetch(f"{server.url}/file", target)
    assert target.stat().st_size == 1000
    target.write_bytes(CONTENT)
    assert not download.fetch(f"{server.url}/file", target)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{unused.getsockname()[1]}/file"
        assert not download.fetch(gone, target)  # nobody to ask
    assert server.asked == []


def test_two_at_once_do_not_write_the_same_file(server, target):
    ends = []
    first = threading.Thread(
        target=lambda: ends.append(download.fetch(f"{server.url}/slow", target, SHA256))
    )
    first.start()
    while not server.asked:
        time.sleep(0.01)
    with pytest.raises(ValueError, match="part: another process is fetching this: wait until"):
        download.fetch(f"{server.url}/file", target, SHA256)
    server.go.set()
    first.join()
    assert ends == [True] and only(target)


def test_part_that_was_renamed_before_it_could_be_locked_is_left_alone(target, monkeypatch):
    leave_partial(target, CONTENT)

    def lock(*_):
        partial(target).rename(target)  # as a process does that ends just now
        partial(target).write_bytes(b"of the next")

    monkeypatch.setattr(download.fcntl, "flock", lock)
    with pytest.raises(ValueError, match="another process"):
        download.fetch("http://127.0.0.1:1/file", target)
    assert target.read_bytes() == CONTENT and partial(target).read_bytes() == b"of the next"


def test_full_disk_keeps_what_came(server, target, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"pt.part: .*: make room and repeat the command"):
            download.fetch(f"{server.url}/file", target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not target.exists() and partial(target).stat().st_size == 3_000_000
    usage = namedtuple("usage", "free")(len(CONTENT) - 3_000_001)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(ValueError, match="2120000 bytes are to come and 2119999 are free"):
            download.fetch(f"{server.url}/file", target)
    assert download.fetch(f"{server.url}/file", target, SHA256) and only(target)


def test_web_page_is_no_weight_file(server, target):
    with pytest.raises(ValueError, match="a web page came"):
        download.fetch(f"{server.url}/page", target)
    assert list(target.parent.iterdir()) == []


def test_missing_file_says_what_to_do(server, target):
    with pytest.raises(FileNotFoundError, match=f"missing cannot be fetched .*put it at {target}"):
        download.fetch(f"{server.url}/missing", target)


def test_offline_ends_with_one_line_and_code_2(monkeypatch, tmp_path, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/dit.pt"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setitem(download.ITEMS, "dit-xl2-256", [download.Item(url, "pretrained/d.pt")])
        with pytest.raises(SystemExit) as exit_:
            distributed.run(
                download.main, download.parse_args(["dit-xl2-256", "--to", str(tmp_path)])
            )
        said = capsys.readouterr().err
        assert exit_.value.code == 2 and said.count("\n") == 1
        assert f"curl -LO {url}" in said and str(tmp_path / "pretrained/d.pt") in said
        monkeypatch.setitem(download.ITEMS, "vae-ema", [download.Item(url, "pretrained/vae.pt")])
        with pytest.raises(FileNotFoundError, match=r"pretrained/d.pt\n.*pretrained/vae.pt$"):
            download.main(download.parse_args(["dit-xl2-256", "vae-ema", "--to", str(tmp_path)]))


def test_main_puts_files_where_the_configs_look(server, monkeypatch, tmp_path, capsys):
    item = download.Item(f"{server.url}/file", "pretrained/x/model.pt", SHA256)
    monkeypatch.setitem(download.ITEMS, "vae-ema", [item])
    for word in ("fetched", "is there already"):
        download.main(download.parse_args(["vae-ema", "--to", str(tmp_path)]))
        assert capsys.readouterr().out == f"{tmp_path / item.path}: {word}\n"
    assert only(tmp_path / "pretrained" / "x" / "model.pt")


def test_names_of_the_zoo():
    models = read_yaml(REPOSITORY / "configs" / "zoo.yaml")["models"]
    every = download.find_items("all-zoo")
    assert len(every) == 22
    assert [download.find_items(f"zoo:{m['name']}") for m in models] == [[item] for item in every]
    swa = download.find_items("zoo:dit-xl2-mha-swa-75p-fid3.09")[0]
    assert swa.path == "grafted_models/dit-xl2-mha-swa-75p-fid3.09/model.pt"
    assert swa.url.endswith("/grafting/dit-xl2-mha-swa-75p-fid3.09/resolve/main/model.pt")
    for name in ("zoo:swa", "dit-xl2-mha-swa-75p-fid3.09", "dit-xl2"):
        with pytest.raises(ValueError, match=f"'{name}' is nothing to download: .*dit-xl2-256"):
            download.find_items(name)


def test_items_are_the_public_files_in_the_places_that_the_rest_looks_in():
    items = {
        name: [(item.url, item.path) for item in items] for name, items in download.ITEMS.items()
    }
    inception = "pt_inception-2015-12-05-6726825d.pth"
    url = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{inception}"
    assert items["inception"] == [(url, f"pretrained/{inception}")]
    assert download.ITEMS["inception"][0].sha256 == "6726825d"
    vae = "https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/main"
    assert items["vae-mse"] == [
        (f"{vae}/{file}", f"pretrained/sd-vae-ft-mse/{file}")
        for file in ("diffusion_pytorch_model.safetensors", "config.json")
    ]
    for size in (256, 512):
        url = f"https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-{size}x{size}.pt"
        path = plan_from_flags(None, "DiT-XL/2", size, None).base_ckpt_path
        assert items[f"dit-xl2-{size}"] == [(url, str(path))]
