"""Fetches published weights to where the configs look for them.

    python scripts/download.py dit-xl2-256 vae-ema
    python scripts/download.py zoo:dit-xl2-mha-swa-75p-fid3.09

What there is: dit-xl2-256, dit-xl2-512 (the DiTs that are grafted, 2.7 GB each), vae-ema, vae-mse,
pixart-sigma-512, -1024, -2048 (the transformers, 2.4 GB each) and their vae-sdxl,
inception (for evaluate_fid.py), adm-reference-256 (its reference batch of ImageNet), zoo:<name> (a
released graft of configs/zoo.yaml) and all-zoo. A download that was cut short goes on when the
command is repeated; a file has its final name only when it is whole, and, where a hash is known,
right. Proxies are taken from the environment.
"""

import argparse
import contextlib
import errno
import fcntl
import http.client
import os
import re
import shutil
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.inception import FILE_NAME, HASH_PREFIX
from latents.codec import CONFIG, HUB_NAMES, WEIGHTS
from models.config_files import REPOSITORY, read_yaml
from models.files import file_sha256, write_whole
from training import arguments, distributed

ZOO = REPOSITORY / "configs" / "zoo.yaml"
CHUNK = 1 << 20  # bytes
TIMEOUT = 60.0  # seconds without a byte
SIZE_TIMEOUT = 10.0  # seconds to ask for the size of a file that is there already
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)

AGENT = {"User-Agent": "grafting-download"}
BAR = {"unit": "B", "unit_scale": True, "disable": None}

DIT = "https://dl.fbaipublicfiles.com/DiT/models"
HUB = "https://huggingface.co"
INCEPTION_RELEASE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"


@dataclass(frozen=True)
class Item:
    """One file: its URL, its place below --to, and the start of its sha256 where it is known."""

    url: str
    path: str
    sha256: str = ""


def _vae(kind: str) -> list[Item]:
    folder = f"pretrained/{HUB_NAMES[kind].rpartition('/')[2]}"
    return [
        Item(f"{HUB}/{HUB_NAMES[kind]}/resolve/main/{file}", f"{folder}/{file}")
        for file in (WEIGHTS, CONFIG)
    ]


def _pixart(size: str) -> list[Item]:
    name = f"PixArt-Sigma-XL-2-{size}-MS"
    return [
        Item(
            f"{HUB}/PixArt-alpha/{name}/resolve/main/transformer/{file}",
            f"pretrained/{name}/transformer/{file}",
        )
        for file in (WEIGHTS, CONFIG)
    ]


ITEMS: dict[str, list[Item]] = {
    "dit-xl2-256": [Item(f"{DIT}/DiT-XL-2-256x256.pt", "pretrained/DiT-XL-2-256x256.pt")],
    "dit-xl2-512": [Item(f"{DIT}/DiT-XL-2-512x512.pt", "pretrained/DiT-XL-2-512x512.pt")],
    "vae-ema": _vae("ema"),
    "vae-mse": _vae("mse"),
    "vae-sdxl": _vae("sdxl"),
    "pixart-sigma-512": _pixart("512"),
    "pixart-sigma-1024": _pixart("1024"),
    "pixart-sigma-2048": _pixart("2K"),
    "inception": [Item(f"{INCEPTION_RELEASE}/{FILE_NAME}", f"pretrained/{FILE_NAME}", HASH_PREFIX)],
    "adm-reference-256": [
        Item(
            f"{ADM}/256/VIRTUAL_imagenet256_labeled.npz",
            "pretrained/VIRTUAL_imagenet256_labeled.npz",
        )
    ],
}


def find_items(name: str) -> list[Item]:
    """The files that a name on the command line stands for. ValueError for any other name."""
    if name in ITEMS:
        return ITEMS[name]
    zoo = {m["name"]: m["checkpoint"] for m in read_yaml(ZOO)["models"]}
    wanted = list(zoo) if name == "all-zoo" else [name.removeprefix("zoo:")]
    if name != "all-zoo" and (wanted[0] not in zoo or not name.startswith("zoo:")):
        legal = [*ITEMS, "all-zoo", *(f"zoo:{model}" for model in zoo)]
        raise ValueError(f"{name!r} is nothing to download: choose from {', '.join(legal)}")
    return [Item(f"{HUB}/grafting/{model}/resolve/main/model.pt", zoo[model]) for model in wanted]


def fetch(url: str, path: Path, sha256: str = "") -> bool:
    """Downloads `url` to `path`; False when it was there already.

    What has come so far lies in `<path>.part`, from which a later call goes on where the server can
    (HTTP ranges); only one process at a time writes it. `sha256`: what the file's hash must begin
    with; the hub's files are checked against the hash that the hub sends along. Of a file that is
    there already and whose hash is not known, the size is compared, where the server answers.

    Raises:
        FileNotFoundError: the server cannot be reached, or has no such file; says what to do.
        ValueError: the connection ended too early, the hash or the size is wrong, the disk is full,
            or another process is at it.
    """
    redirects = _Redirects()
    opener = urllib.request.build_opener(redirects)
    if path.is_file():
        other = f"{path} is not the file of {url}: delete it"
        _check_hash(path, sha256, other)
        size = None if sha256 else _size(opener, url)
        if size not in (None, path.stat().st_size):
            raise ValueError(f"{other} ({path.stat().st_size} bytes, should be {size})")
        return False
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _claimed(part) as file:
        if path.is_file():  # another process was faster
            return False
        try:
            total = _receive(opener, url, file)
        except NETWORK_ERRORS as error:
            reason = getattr(error, "reason", None) or error
            raise FileNotFoundError(
                f"{url} cannot be fetched ({reason}): repeat the command, or fetch it where there "
                f"is a network (curl -LO {url}) and put it at {path}"
            ) from error
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise ValueError(
                f"{part}: {error.strerror}: make room and repeat the command to go on"
            ) from error
        size = part.stat().st_size
        if total is not None and size != total:
            raise ValueError(
                f"{url}: the connection ended after {size} of {total} bytes: repeat the command to "
                "go on"
            )
        try:
            _check_hash(
                part, sha256 or redirects.sha256, f"{url}: what came is damaged: repeat the command"
            )
        except ValueError:
            part.unlink()
            raise
        write_whole(path, lambda whole: os.replace(part, whole))
    return True


@contextlib.contextmanager
def _claimed(part: Path) -> Iterator[RawIOBase]:
    """`part`, opened for writing by this process alone; removed where nothing came.

    Raises:
        ValueError: another process has it.
    """
    with open(part, "ab", buffering=0) as file:  # unbuffered: closing it cannot fail
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # it may have become whole, and got its own name, between opening and locking
            mine = part.is_file() and os.path.samestat(os.fstat(file.fileno()), part.stat())
        except BlockingIOError:
            mine = False
        except OSError:  # a file system without locks
            mine = True
        if not mine:
            raise ValueError(f"{part}: another process is fetching this: wait until it has ended")
        try:
            yield file
        finally:
            if part.is_file() and part.stat().st_size == 0:
                part.unlink()


def _size(opener: urllib.request.OpenerDirector, url: str) -> int | None:
    """The size of a file on its server, or None where it does not say."""
    request = urllib.request.Request(url, headers=AGENT, method="HEAD")
    try:
        with opener.open(request, timeout=SIZE_TIMEOUT) as response:
            size = response.headers.get("Content-Length")
            page = response.headers.get_content_type() == "text/html"
            return None if size is None or page else int(size)
    except NETWORK_ERRORS:
        return None


def _receive(opener: urllib.request.OpenerDirector, url: str, file: RawIOBase) -> int | None:
    """Appends the rest of `url` to `file`; returns the whole's size where it is known."""
    start = file.tell()
    headers = {**AGENT, "Range": f"bytes={start}-"} if start else AGENT
    try:
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not start:
            raise
        if error.headers.get("Content-Range") == f"bytes */{start}":
            return start  # it had come whole before
        _empty(file)
        return _receive(opener, url, file)
    with response:
        if response.headers.get_content_type() == "text/html":
            raise ValueError(
                f"{url}: a web page came instead of the file: is there a proxy's login?"
            )
        total = response.headers.get("Content-Length")
        total = None if total is None else int(total)
        if response.status == http.client.PARTIAL_CONTENT:
            first, total = _content_range(url, response.headers.get("Content-Range"))
            if first != start:
                raise ValueError(f"{url}: asked for bytes from {start}, got them from {first}")
        else:
            start = 0  # no ranges here: from the beginning
            _empty(file)
        free = shutil.disk_usage(Path(file.name).parent).free
        if total is not None and total - start > free:
            raise ValueError(
                f"{url}: {total - start} bytes are to come and {free} are free at {file.name}: "
                "make room, or name another folder with --to"
            )
        bar = tqdm(total=total, initial=start, desc=Path(file.name).stem, **BAR)
        with bar:
            while chunk := memoryview(response.read(CHUNK)):
                bar.update(len(chunk))
                while chunk:
                    chunk = chunk[file.write(chunk) :]
    return total


def _empty(file: RawIOBase) -> None:
    file.seek(0)
    file.truncate()


def _content_range(url: str, header: str | None) -> tuple[int, int | None]:
    """First byte and size of the whole of a Content-Range like "bytes 100-199/200" or ".../*"."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", header or "")
    if not found:
        raise ValueError(f"{url}: a part came with Content-Range {header!r}: repeat the command")
    return int(found[1]), None if found[2] == "*" else int(found[2])


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and remembers the sha256 that the hub states on the first of them."""

    sha256 = ""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        stated = headers.get("X-Linked-Etag", "").strip('"')
        if re.fullmatch(r"[0-9a-f]{64}", stated):
            self.sha256 = stated
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_hash(path: Path, sha256: str, what: str) -> None:
    """Raises ValueError(`what` and the two hashes) unless the file's hash begins with `sha256`."""
    if not sha256:
        return
    found = file_sha256(path)
    if not found.startswith(sha256):
        raise ValueError(f"{what} (sha256 {found[: len(sha256)]}, should be {sha256})")


def main(args: argparse.Namespace) -> None:
    out_of_reach = []
    for item in [item for name in args.names for item in find_items(name)]:
        path = (args.to or REPOSITORY) / item.path
        try:
            fetched = fetch(item.url, path, item.sha256)
        except FileNotFoundError as error:
            out_of_reach.append(str(error))
        else:
            print(f"{path}: {'fetched' if fetched else 'is there already'}", flush=True)
    if out_of_reach:
        raise FileNotFoundError("\n".join(out_of_reach))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.parser(__doc__, "NAME [NAME ...]")
    parser.add_argument("names", nargs="+", metavar="name", help="what to fetch, see above")
    parser.add_argument(
        "--to",
        type=Path,
        metavar="DIR",
        help="pretrained/ and grafted_models/ are made here (unset: the repository)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    distributed.run(main, parse_args())
