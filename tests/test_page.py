"""The report page: what it finds, its tables beside published scores, and that it is one file."""

import html.parser
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from evaluation.page import curves_of, find_results
from evaluation.writers import save_png
from scripts import report


def write_run(folder, losses, probabilities=()):
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": 10 * i, "loss": x, "lr": 1e-4}) for i, x in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99, "lo')  # being written
    if probabilities:
        lines = [json.dumps({"step": i, "probabilities": p}) for i, p in enumerate(probabilities)]
        (folder / "trajectory.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_scores(folder, scores, protocol="adm", count=5, config="a.yaml", **more):
    """A sample folder of flat pictures with its metrics.json."""
    folder.mkdir(parents=True)
    for i in range(count):
        save_png(folder / f"{i:06d}.png", np.full((16, 16, 3), 40 * i % 256, np.uint8))
    plan = {"model_name": "DiT-XL/2", "grafts": [
        {"slot": "mha", "operator": "swa", "blocks": [1, 2, 3]},
    ]}  # fmt: skip
    settings = {"plan": plan, "config": config, "checkpoint": {"grafted": "b.pt", "base": None}}
    settings |= {"sampler": "ddpm", "steps": 250, "cfg_scale": 1.5, "seed": 0, "labels": "random"}
    settings |= {"vae": "ema", "precision": "bfloat16", "num_samples": count}
    content = {
        "protocol": protocol, "metrics": scores, "why_null": {}, "standard_errors": {},
        "num_samples": count, "num_reference": None, "notes": [], "warnings": ["<few> samples"],
        "feature_net": {"name": "inception", "protocol": protocol, "sha256": "ab" * 32},
        "reference": {"path": "r.npz"}, "samples": {"path": str(folder)},
        "samples_json": {"settings": settings}, "git_revision": "c0ffee", "torch": "2",
        "time": "now", **more,
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder


def make(tmp_path, *places):
    report.main(report.parse_args([*map(str, places), "--out", str(tmp_path / "page")]))
    page = tmp_path / "page"
    return (page / "report.html").read_text(), (page / "report.md").read_text()


def rows_of(text):
    """Tables of the Markdown, row by row, as lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def test_the_page_shows_scores_beside_published_ones(tmp_path):
    name = "dit-xl2-mha-swa-50p-fid2.67"
    scores = {"fid": 2.71234, "sfid": None, "is": 280.0, "precision": 0.83, "recall": 0.56}
    write_scores(
        tmp_path / "samples" / "one", scores, config=f"plans/{name}.yaml",
        standard_errors={"fid": 0.031}, why_null={"sfid": "the reference holds no mu_s"},
    )  # fmt: skip
    write_scores(tmp_path / "samples" / "two", {"fd_mini": 9.5, "precision": 0.5}, "mini")
    page, text = make(tmp_path, tmp_path / "samples")
    table = rows_of(text)
    head = ["samples", "model", "N", "FID", "fd_mini", "sFID", "IS", "precision", "recall"]
    assert table[0] == [*head, "protocol"]
    model = "DiT-XL/2, swa in mha of 3 blocks"
    measured = ["2.71 ± 0.03", "", "-", "280.00", "0.830", "0.560", "adm"]
    assert table[2] == ["samples/one", model, "5", *measured]
    published = ["50 000", "2.67", "-", "4.90", "280.62", "0.83", "0.56", "adm"]
    assert table[3] == [f"published: {name}", "swa, 50 %", *published]
    assert (
        table[4][:3] == ["samples/two", model, "5"]
        and table[4][4] == "9.50"
        and table[4][-1] == "mini"
    )
    assert "The reference is r.npz (count not stated)." in text and "± is the standard" in text
    assert "- no sFID: the reference holds no mu_s" in text
    assert "cannot be compared with published scores" in text
    others = [row[0] for row in table if row[0].startswith("dit-xl2")]
    assert name in others and all("-swa-" in other for other in others)
    assert f'<tr class="published"><td>published: {name}</td>' in page
    assert "&lt;few&gt; samples" in page and "<few>" not in page


class Pictures(html.parser.HTMLParser):
    """Collects where a page's pictures come from, and checks that tags are closed in order."""

    def __init__(self, page):
        super().__init__()
        self.sources, self.open, self.others = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "img":
            self.sources.append(found["src"])
        elif tag != "meta":
            self.open.append(tag)
        legal = ("src",) if tag == "img" else ()
        self.others += [k for k in ("src", "href", "srcset") if k in found and k not in legal]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_file_with_grids_losses_and_gates(tmp_path):
    run = write_run(tmp_path / "runs" / "train", [0.5, None, 0.25, 0.3])
    write_run(tmp_path / "runs" / "other", [0.5, 0.75])
    write_run(tmp_path / "runs" / "gates", [1.0], [[[0.2, 0.8], [0.5, 0.5]], [[0.1, 0.9]] * 2])
    finished = write_run(tmp_path / "runs" / "done", [1.0], [[[0.2, 0.8]]])
    Image.new("RGB", (8, 8)).save(finished / "trajectory.png")
    answer = {"kept": [0, 2], "grafted": [1, 3], "groups": [{"confidence": 0.875}]}
    (finished / "selection.json").write_text(json.dumps(answer))
    (tmp_path / "runs" / "latents").mkdir()
    (tmp_path / "runs" / "latents" / "metrics.jsonl").write_text('{"step": 1, "images": 3}\n')
    write_scores(tmp_path / "runs" / "samples", {"fid": 3.0})
    page, text = make(tmp_path, tmp_path / "runs")
    found = Pictures(page)
    assert not found.open and not found.others and "url(" not in page
    kinds = [re.match(r"data:image/([a-z+]+);base64,", source)[1] for source in found.sources]
    assert sorted(kinds) == ["jpeg", "png", *["svg+xml"] * 7]
    linked = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(linked) == 9 and all((tmp_path / "page" / name).is_file() for name in linked)
    grid = Image.open(tmp_path / "page" / "images" / "samples-1.jpg")
    assert grid.size == (48, 32)  # five pictures of 16 pixels in rows of three
    assert abs(grid.getpixel((24, 24))[0] - 160) < 4  # the fifth
    assert curves_of(run) == {"loss": [(10, 0.5), (30, 0.25), (40, 0.3)]}
    assert "- loss: 0.3 at step 40, lowest 0.25" in text
    assert "- kept blocks: 0 2" in text and "lowest confidence of a group: 0.88" in text
    assert "latents" not in text and "all 5 samples" in text
    table = {row[0]: row[1:] for row in rows_of(text)}
    assert table["runs/train"] == ["40", "0.3000", "0.2500", "-", "-"]
    drawn = (tmp_path / "page" / "images" / "losses-2.svg").read_text()
    assert "runs/train" in drawn and "runs/other" in drawn and "runs/gates" not in drawn
    assert "losses of the runs over" in text and "losses of the selections over" in text


def test_different_references_are_said(tmp_path):
    write_scores(tmp_path / "a" / "one", {"fid": 3.0}, num_reference=12_000)
    write_scores(tmp_path / "a" / "two", {"fid": 3.0}, reference={"path": "s.npz"}, count=65)
    text = make(tmp_path, tmp_path / "a")[1]
    assert "The references differ" in text
    assert "at an equal one only: r.npz (12 000 images); s.npz (count not stated)." in text
    assert "the first 64 of 65 samples" in text


def test_samples_that_moved_are_found_and_lost_ones_said(tmp_path):
    folder = write_scores(tmp_path / "old", {"fid": 3.0})
    moved = folder.rename(tmp_path / "new")
    assert "images/samples-1.jpg" in make(tmp_path, moved / "metrics.json")[1]
    shown = (tmp_path / "page" / "images" / "samples-1.jpg").read_bytes()
    shutil.copytree(moved, folder)
    for file in folder.glob("*.png"):  # of another run, where the first one was
        Image.new("RGB", Image.open(file).size, "red").save(file)
    make(tmp_path, moved / "metrics.json")
    assert (tmp_path / "page" / "images" / "samples-1.jpg").read_bytes() == shown
    shutil.rmtree(folder)
    for file in moved.glob("*.png"):
        file.unlink()
    assert f"The samples are no longer at {folder}" in make(tmp_path, moved)[1]
    # An archive and its scores side by side
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    (moved / "metrics.json").rename(tmp_path / "x.metrics.json")
    assert "images/samples-1.jpg" in make(tmp_path, tmp_path / "x.metrics.json")[1]


def test_large_pictures_are_shrunk(tmp_path):
    folder = write_scores(tmp_path / "large", {"fid": 3.0}, count=1)
    Image.new("RGB", (512, 256), "red").save(folder / "000000.png")
    make(tmp_path, folder)
    content = (tmp_path / "page" / "images" / "samples-1.jpg").read_bytes()
    assert Image.open(io.BytesIO(content)).size == (128, 64)


def test_places_without_results_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        find_results([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds neither scores"):
        find_results([tmp_path / "empty"])
    (tmp_path / "torn.metrics.json").write_text('{"metr')
    with pytest.raises(ValueError, match="torn.metrics.json is not whole JSON.*score the samples"):
        find_results([tmp_path])
