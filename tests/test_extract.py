"""extract_features.py on a dozen pictures and a random VAE; the scripts around the testbed."""

import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import extract_features
from diffusion import noise
from latents.codec import Codec, load_codec
from latents.images import LabelledImages
from latents.store import open_latents
from scripts import export_weights, unpack_mini

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=4,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "images" / f"class{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def extract(pictures, out, vae, *flags):
    argv = ["--data-path", str(pictures), "--features-path", str(out), "--vae", str(vae)]
    argv += ["--image-size", "16", "--num-workers", "0", "--device", "cpu"]
    argv += ["--shard-size", "5", "--global-batch-size", "3", *flags]
    extract_features.main(extract_features.parse_args(argv))


def test_store_holds_the_moments_of_image_and_mirror(pictures, tmp_path, vae):
    extract(pictures, tmp_path / "out", vae)
    store = open_latents(tmp_path / "out", num_classes=3)
    store.verify()
    assert (len(store), store.shape, store.num_mirrors, store.scale) == (12, (4, 8, 8), 2, 0.18215)
    assert store.class_names == ["class0", "class1", "class2"]
    assert store.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (store.manifest["crop"], store.manifest["image_size"]) == ("adm-center", 16)
    assert [shard["count"] for shard in store.manifest["shards"]] == [5, 5, 2]
    codec = load_codec(vae)
    assert store.manifest["vae_sha256"] == codec.sha256
    folder = LabelledImages(pictures, 16)
    for i in (0, 7, 11):
        image = folder[i][0].float() / 127.5 - 1
        expected = codec.encode(torch.stack([image, image.flip(2)]))
        assert torch.allclose(store.read(torch.tensor([i]))[0].float(), expected, atol=2e-3)


def test_rerun_repairs_and_leaves_the_rest(pictures, tmp_path, vae):
    out = tmp_path / "out"
    extract(pictures, out, vae)
    before = {path: path.read_bytes() for path in (out / "shards").iterdir()}
    manifest = (out / "manifest.json").read_bytes()
    untouched = out / "shards" / "00000-moments.npy"
    times = untouched.stat().st_mtime_ns
    damaged = out / "shards" / "00001-moments.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for name in ("00002.json", "00002-labels.npy"):
        (out / "shards" / name).unlink()
    extract(pictures, out, vae)
    assert {path: path.read_bytes() for path in (out / "shards").iterdir()} == before
    assert (out / "manifest.json").read_bytes() == manifest
    assert untouched.stat().st_mtime_ns == times


def test_any_number_of_processes_writes_the_same_bytes(pictures, tmp_path, vae, monkeypatch):
    """Each process of two is played in turn; only the collectives are replaced."""
    extract(pictures, tmp_path / "one", vae)
    distributed = extract_features.distributed
    missing = [[0, 2], [1]]
    monkeypatch.setattr(distributed, "barrier", lambda world: None)
    monkeypatch.setattr(distributed, "gather_objects", lambda world, mine: missing)
    for rank in (1, 0):  # rank 0 comes last: it writes the manifest
        world = distributed.World(rank, rank, 2, torch.device("cpu"))
        monkeypatch.setattr(distributed, "start", lambda *args, world=world, **kwargs: world)
        (tmp_path / "two" / "shards").mkdir(parents=True, exist_ok=True)
        extract(pictures, tmp_path / "two", vae)
        done = {path.name[:5] for path in (tmp_path / "two" / "shards").iterdir()}
        assert done == ({"00001"} if rank else {"00000", "00001", "00002"})
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.npy")]
    assert len(files) == 6
    for name in [*files, "manifest.json"]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_compiled_codec_is_made_for_the_largest_batch(pictures, tmp_path, vae, monkeypatch):
    """Three images and their mirrors; the batches of two that end the shards are filled up."""
    made = []

    def compiled(codec, batch, image_size):
        made.append((batch, image_size))
        return replace(codec, images=batch)

    monkeypatch.setattr(Codec, "compiled", compiled)
    for name, flags in {"plain": ["--no-compile"], "compiled": []}.items():
        extract(pictures, tmp_path / name, vae, *flags)
    assert made == [(6, 16)]
    stores = [open_latents(tmp_path / name) for name in ("plain", "compiled")]
    plain, filled = (store.read(torch.arange(12)) for store in stores)
    torch.testing.assert_close(filled, plain, rtol=0, atol=2e-3)  # rounding of float16


def test_an_interrupted_extraction_is_no_store_and_goes_on(pictures, tmp_path, vae, monkeypatch):
    out = tmp_path / "out"
    write = extract_features.StoreWriter.write_shard

    def crash(self, shard, *args):
        if shard == 1:
            raise KeyboardInterrupt
        write(self, shard, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(extract_features.StoreWriter, "write_shard", crash)
        extract(pictures, out, vae)
    with pytest.raises(FileNotFoundError, match="unfinished extraction, rerun"):
        open_latents(out)
    first = (out / "shards" / "00000.json").stat().st_mtime_ns
    extract(pictures, out, vae)
    assert (out / "shards" / "00000.json").stat().st_mtime_ns == first
    open_latents(out).verify()


def test_unreadable_pictures_end_the_run_or_are_listed(pictures, tmp_path, vae):
    bad = pictures / "class1" / "04.png"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"class1/04.png cannot .* --on-error skip \(what is enc"):
        extract(pictures, tmp_path / "out", vae)
    extract(pictures, tmp_path / "out", vae, "--on-error", "skip")
    store = open_latents(tmp_path / "out")
    assert store.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    (sentence,) = store.manifest["skipped"]
    assert "class1/04.png" in sentence


def test_storage_sample_is_a_frozen_draw_of_each_mirror(pictures, tmp_path, vae):
    extract(pictures, tmp_path / "moments", vae)
    extract(pictures, tmp_path / "sample", vae, "--storage", "sample", "--global-seed", "4")
    index = torch.arange(12)
    mean, logvar = open_latents(tmp_path / "moments").read(index).float().chunk(2, dim=2)
    store = open_latents(tmp_path / "sample")
    for mirror in range(2):
        draw = noise.normal(4, noise.POSTERIOR, index, (4, 8, 8), step=mirror)
        expected = (mean[:, mirror] + torch.exp(0.5 * logvar[:, mirror]) * draw) * store.scale
        assert torch.allclose(store.read(index)[:, mirror].float(), expected, atol=2e-3)


def test_verify_finds_a_flipped_byte(pictures, tmp_path, vae, capsys, monkeypatch):
    out = tmp_path / "out"
    extract(pictures, out, vae)
    check = extract_features.parse_args(["--verify", "--features-path", str(out)])
    extract_features.main(check)
    assert "all shards are whole (12 images)" in capsys.readouterr().out
    for name in ("00000-moments.npy", "00002-labels.npy"):
        path = out / "shards" / name
        whole = bytearray(path.read_bytes())
        whole[-1] ^= 1
        path.write_bytes(whole)
    with pytest.raises(ValueError, match="00000-moments.npy differs from its sha256"):
        extract_features.main(check)
    distributed = extract_features.distributed
    second = distributed.World(0, 0, 2, torch.device("cpu"))  # its share: the shards 0 and 2
    monkeypatch.setattr(distributed, "start", lambda *args, **kwargs: second)
    monkeypatch.setattr(distributed, "gather_objects", lambda world, fault: [fault, "of rank 1"])
    with pytest.raises(ValueError, match="00000-moments.npy differs .*; of rank 1"):
        extract_features.main(check)
    with pytest.raises(SystemExit):
        extract_features.parse_args([])


def test_no_mirror_stores_one_view(pictures, tmp_path, vae):
    extract(pictures, tmp_path / "out", vae, "--no-mirror")
    assert open_latents(tmp_path / "out").read(torch.tensor([3])).shape == (1, 1, 8, 8, 8)


def test_impossible_settings_are_named(pictures, tmp_path, vae):
    with pytest.raises(ValueError, match="3 class folders, more than --num-classes 2"):
        extract(pictures, tmp_path / "out", vae, "--num-classes", "2")
    with pytest.raises(ValueError, match="--image-size 15 is not divisible by 2"):
        extract(pictures, tmp_path / "out", vae, "--image-size", "15")
    for flag, value in (("--max-tokens", "3"), ("--text-encoder", "t5")):
        with pytest.raises(ValueError, match=f"{flag} {value} is of captions: add --captions"):
            extract(pictures, tmp_path / "out", vae, flag, value)
    with pytest.raises(FileNotFoundError, match="below it, or --captions for pictures without"):
        extract(pictures / "class0", tmp_path / "out", vae)
    extract(pictures, tmp_path / "out", vae)
    Image.new("RGB", (16, 16)).save(pictures / "class0" / "new.png")
    with pytest.raises(ValueError, match="count was 12 and is now 13; choose another"):
        extract(pictures, tmp_path / "out", vae)


def test_old_commands_parse_and_abbreviations_do_not(capsys):
    argv = "--data-path d --model DiT-XL/2 --results-dir r --epochs 3 --ckpt-every 9 --vae mse"
    args = extract_features.parse_args(argv.split())
    assert (args.features_path, args.image_size, args.num_classes) == ("features", 256, 1000)
    assert (args.global_batch_size, args.global_seed, args.num_workers) == (256, 0, 4)
    assert (args.vae, args.log_every, args.shard_size) == ("mse", 100, 8192)
    with pytest.raises(SystemExit):
        extract_features.parse_args(["--data", "d"])
    assert "unrecognized arguments: --data d" in capsys.readouterr().err
    for flags, message in (
        (["--num-workers", "-1"], "'-1' is not a whole number of at least 0"),
        (["--global-seed", "-1"], "'-1' is not a whole number from 0"),
        (["--image-size", "0"], "'0' is not a whole number of at least 1"),
    ):
        with pytest.raises(SystemExit):
            extract_features.parse_args(["--data-path", "d", *flags])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("extract_features.py", ["--data-path", "no", "--device", "cpu"], "folder no does not"),
        (
            "evaluate_fid.py",
            ["no", "gone", "--feature-net", "mini", "--device", "cpu"],
            "gone does",
        ),
        ("scripts/unpack_mini.py", ["--sheets", "no"], "no/labels.csv is missing"),
        (
            "scripts/export_weights.py",
            ["no.pt", "--out", "x.safetensors"],
            "weights no.pt: no such",
        ),
        (
            "scripts/train_mini_vae.py",
            ["--data-path", "no", "--device", "cpu"],
            "no/train holds no",
        ),
        ("scripts/train_mini_features.py", ["--labels", "no", "--device", "cpu"], "no is missing"),
    ],
)
def test_bad_input_ends_an_entry_with_one_line(
    tmp_path, monkeypatch, capsys, script, flags, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_cores_are_counted_where_the_system_tells_no_affinity(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert extract_features.usable_cpus() == 1


def test_exported_weights_are_the_averaged_ones_in_half_precision(tmp_path):
    ema, raw = {"a": torch.tensor([0.25, 3.0])}, {"a": torch.zeros(2)}
    torch.save({"model": raw, "ema": ema}, tmp_path / "c.pt")
    out = tmp_path / "new" / "dit.safetensors"
    export_weights.main(export_weights.parse_args([str(tmp_path / "c.pt"), "--out", str(out)]))
    state = load_file(out)
    assert state["a"].dtype == torch.float16 and torch.equal(state["a"].float(), ema["a"])


def test_log_is_kept_beside_the_shards(pictures, tmp_path, vae):
    extract(pictures, tmp_path / "out", vae, "--log-every", "1")
    text = (tmp_path / "out" / "log.txt").read_text()
    assert "images 12, classes 3, shards 3, of these to do 3" in text
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["rank_0_images"] == 12


def test_unpacked_testbed_is_the_image_folder_of_labels_csv(tmp_path):
    rows = unpack_mini.read_rows(unpack_mini.SHEETS)
    counts = unpack_mini.unpack(unpack_mini.SHEETS, tmp_path)
    assert sum(counts.values()) == len(rows) == 1892
    for split in ("train", "heldout"):
        folder = LabelledImages(tmp_path / split, 64)
        expected = {(r["filename"], int(r["class_id"])) for r in rows if r["split"] == split}
        found = zip(folder.paths, folder.labels.tolist(), strict=True)
        assert {(path.split("/")[1], label) for path, label in found} == expected
    first, second = sorted((tmp_path / "train").glob("*/*.png"))[:2]
    whole, kept = first.read_bytes(), second.stat().st_mtime_ns
    first.write_bytes(whole[:100])
    unpack_mini.unpack(unpack_mini.SHEETS, tmp_path)
    assert first.read_bytes() == whole and second.stat().st_mtime_ns == kept


def test_a_changed_sheet_is_noticed(tmp_path):
    shutil.copytree(unpack_mini.SHEETS, tmp_path / "sheets")
    labels = tmp_path / "sheets" / "labels.csv"
    text = labels.read_text(encoding="utf-8")
    digest = unpack_mini.read_rows(tmp_path / "sheets")[0]["sha256_12"]
    labels.write_text(text.replace(digest, "0" * 12), encoding="utf-8")
    with pytest.raises(ValueError, match="0_smileys_emotion.webp: picture 1f600.png differs"):
        unpack_mini.unpack(tmp_path / "sheets", tmp_path / "out")
