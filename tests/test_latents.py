"""latents/: codec, image folder, store and loader; and the files that they are written as."""

import itertools
import json
import os
import secrets
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import noise
from latents import codec as codec_module
from latents.codec import load_codec
from latents.images import LabelledImages, center_crop, collate
from latents.loader import LatentLoader, epoch_order
from latents.store import StoreWriter, open_latents
from models.files import remove_stale, write_json, write_whole
from training.distributed import World

N, SHARD = 11, 4
CPU = torch.device("cpu")
PINNED = [4, 2, 0, 5, 1, 7, 6, 3]  # epoch_order(8, 0, 0): a change would break every resumed run


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    )
    vae.save_pretrained(folder)
    return folder


def settings(**changes):
    return {
        "kind": "moments",
        "count": N,
        "shard_size": SHARD,
        "shape": [4, 3, 2],
        "dtype": "float16",
        "mirrors": 2,
        "vae": "ema",
        "vae_sha256": "0" * 64,
        "scale": 0.25,
        "image_size": 24,
        "crop": "adm-center",
        "class_names": ["ant", "bee", "cow"],
        **changes,
    }


def content(**changes):
    """The arrays and labels that `make_store` stores."""
    what = settings(**changes)
    C, h, w = what["shape"]
    channels = 2 * C if what["kind"] == "moments" else C
    rng = np.random.default_rng(5)
    arrays = rng.normal(size=(N, what["mirrors"], channels, h, w)).astype(np.float16)
    return arrays, np.arange(N, dtype=np.int64) % 3


def write_shards(folder, shards, **changes):
    writer = StoreWriter(folder, settings(**changes))
    writer.begin(list(shards))
    arrays, labels = content(**changes)
    for shard in shards:
        rows = writer.rows(shard)
        writer.write_shard(shard, arrays[list(rows)], labels[list(rows)], [])
    return writer


def make_store(folder, **changes):
    write_shards(folder, range(3), **changes).finish()
    return folder


def make_old(folder, mirrors=2, labels=range(5)):
    for name in ("imagenet256_features", "imagenet256_labels"):
        (folder / name).mkdir(parents=True)
    arrays = np.random.default_rng(1).normal(size=(5, mirrors, 4, 3, 2)).astype(np.float32)
    for i, label in enumerate(labels):
        np.save(folder / "imagenet256_features" / f"{i * 3}.npy", arrays[i])
        np.save(folder / "imagenet256_labels" / f"{i * 3}.npy", np.array([label]))
    return arrays


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


# Files


def test_partials_of_killed_processes_are_removed_once_they_are_old(tmp_path):
    names = [".a.json.99.partial", ".b.json.99.partial", ".a.json.98.partial"]
    for name in names:
        (tmp_path / name).write_text("half")
    for name in names[:2]:
        os.utime(tmp_path / name, (0, time.time() - 4000))
    write_whole(tmp_path / "a.json", lambda p: p.write_text("{}"), durable=False)
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", *names}
    write_json(tmp_path / "a.json", {})
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", *names[1:]}
    remove_stale(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", names[2]}


# Store


def test_store_gives_back_what_was_written(tmp_path):
    store = open_latents(make_store(tmp_path))
    arrays, labels = content()
    index = torch.tensor([10, 0, 3, 4, 3, 7])
    assert torch.equal(store.read(index), torch.from_numpy(arrays[index]))
    assert store.read(index).dtype == torch.float16
    assert np.array_equal(store.labels, labels) and store.labels.dtype == np.int64
    assert (len(store), store.shape, store.num_mirrors, store.scale) == (N, (4, 3, 2), 2, 0.25)
    assert (store.num_classes, store.class_names) == (3, ["ant", "bee", "cow"])
    assert [s["count"] for s in store.manifest["shards"]] == [4, 4, 3]
    store.verify()
    with pytest.raises(ValueError, match="index 11..11 is outside the 11 images"):
        store.read(torch.tensor([11]))


def test_shards_are_the_same_whoever_writes_them(tmp_path):
    one = write_shards(tmp_path / "one", [0, 1, 2])
    for rank in (1, 0):
        two = write_shards(tmp_path / "two", range(3)[rank::2])
    assert one.finish() == two.finish()
    files = sorted(p.name for p in one.shards.iterdir())
    assert files == sorted(p.name for p in two.shards.iterdir()) and len(files) == 9
    for name in files:
        assert (one.shards / name).read_bytes() == (two.shards / name).read_bytes()


def test_missing_finds_absent_truncated_changed_and_foreign_shards(tmp_path):
    writer = write_shards(tmp_path, [0, 1])
    assert writer.missing(range(3)) == [2]
    array = writer.shards / "00000-moments.npy"
    whole = array.read_bytes()
    array.write_bytes(whole[:-1])
    assert writer.missing(range(3)) == [0, 2]
    array.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert writer.missing(range(3)) == [0, 2]
    array.write_bytes(whole)
    assert writer.missing(range(3)) == [2]
    (tmp_path / "settings.json").unlink()
    assert StoreWriter(tmp_path, settings(scale=0.3)).missing(range(3)) == [0, 1, 2]


def test_other_settings_are_refused_by_name(tmp_path):
    make_store(tmp_path)
    StoreWriter(tmp_path, settings(vae="/another/mount"))  # same weights: the hash decides
    with pytest.raises(ValueError, match=r"settings.json: image_size was 24 and is now 32"):
        StoreWriter(tmp_path, settings(image_size=32))


def test_writer_refuses_wrong_arrays(tmp_path):
    writer = write_shards(tmp_path, [0])
    arrays, labels = content()
    with pytest.raises(ValueError, match=r"shard 1: array float32 .* is not float16"):
        writer.write_shard(1, arrays[4:8].astype(np.float32), labels[4:8], [])
    arrays[5] = np.inf
    with pytest.raises(ValueError, match="shard 1: .* --precision fp32"):
        writer.write_shard(1, arrays[4:8], labels[4:8], [])
    with pytest.raises(ValueError, match="00001.json is missing: unfinished"):
        writer.finish()


def test_a_shard_of_unreadable_pictures_is_empty_and_listed(tmp_path):
    writer = write_shards(tmp_path, [0, 2])
    arrays, labels = content()
    writer.write_shard(1, arrays[:0], labels[:0], ["a.png cannot be read"])
    assert writer.finish()["skipped"] == ["a.png cannot be read"]
    store = open_latents(tmp_path)
    assert torch.equal(store.read(torch.arange(7))[4:], torch.from_numpy(arrays[8:]))


def test_torn_records_are_repaired_or_named(tmp_path):
    writer = write_shards(tmp_path, [0, 1, 2])
    record = writer.shards / "00001.json"
    for text in ('{"count": 4', "[]", "{}"):
        record.write_text(text)
        assert writer.missing(range(3)) == [1]
    record.write_text('{"count": 4')
    with pytest.raises(ValueError, match="00001.json is not whole JSON .* rerun extract_features"):
        writer.finish()
    (tmp_path / "settings.json").write_bytes(b"")
    with pytest.raises(ValueError, match="settings.json is not whole JSON .*: delete it"):
        StoreWriter(tmp_path, settings())


def test_no_store_without_a_whole_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist: make it with python extract"):
        open_latents(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no manifest.json, and it is empty"):
        open_latents(tmp_path)
    write_shards(tmp_path, [0, 1, 2])
    with pytest.raises(FileNotFoundError, match="manifest.json is missing: unfinished extraction"):
        open_latents(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "latent-st')
    with pytest.raises(ValueError, match="not whole JSON .* unfinished extraction"):
        open_latents(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="zip"), "format must be 'latent-store'"),
        (lambda m: m.update(version=9), "version 9 is not 1"),
        (lambda m: m.update(kind="pixels"), "kind 'pixels' is none of moments, sample"),
        (lambda m: m.pop("scale"), "lacks scale"),
        (lambda m: m.update(count=12), "count 12 is not the 11 images"),
        (lambda m: m["shards"][1]["labels"].update(file="../l.npy"), "'../l.npy' lies outside"),
        (
            lambda m: m["shards"][1]["moments"].update(file="/etc/hosts"),
            "'/etc/hosts' lies outside",
        ),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, change, message):
    edit_manifest(make_store(tmp_path), change)
    with pytest.raises(ValueError, match=message):
        open_latents(tmp_path)


def test_damaged_shards_are_named(tmp_path):
    make_store(tmp_path)
    path = tmp_path / "shards" / "00001-moments.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="00001-moments.npy differs from its sha256"):
        open_latents(tmp_path).verify()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"00001-moments.npy has \d+ bytes, its record says"):
        open_latents(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="00001-moments.npy is missing"):
        open_latents(tmp_path)


def test_what_a_model_needs_is_checked(tmp_path):
    make_store(tmp_path)
    assert open_latents(tmp_path, num_classes=1000).num_classes == 1000
    with pytest.raises(
        ValueError, match="label 2 is .* the 2 classes .* num_classes to at least 3 in the"
    ):
        open_latents(tmp_path, num_classes=2)
    store = open_latents(tmp_path)
    store.check_shape((4, 3, 2), "DiT")
    with pytest.raises(ValueError, match=r"holds latents \[4, 3, 2\] .* DiT needs \[4, 8, 8\]"):
        store.check_shape((4, 8, 8), "DiT")


def test_latents_are_draws_of_the_sample(tmp_path):
    store = open_latents(make_store(tmp_path))
    index = torch.arange(N)
    moments = store.read(index)
    x = store.latents(moments, index, seed=3, epoch=2)
    mirror = noise.integers(3, noise.FLIP, index, 2, step=2)
    assert set(mirror.tolist()) == {0, 1}
    draw = noise.normal(3, noise.POSTERIOR, index, (4, 3, 2), step=2)
    for i in range(N):
        mean, logvar = moments[i, mirror[i]].float().chunk(2)
        expected = 0.25 * (mean + (0.5 * logvar).exp() * draw[i])
        assert torch.allclose(x[i], expected, atol=1e-6)
    some = torch.tensor([9, 2])
    assert torch.equal(store.latents(store.read(some), some, 3, 2), x[some])
    assert not torch.equal(store.latents(moments, index, 3, 3), x)
    assert not torch.equal(store.latents(moments, index, 4, 2), x)


def test_the_hash_of_a_store_is_of_what_trainings_read(tmp_path):
    """Not of where it lies: other latents, labels, scale."""
    first = open_latents(make_store(tmp_path / "one")).sha256
    assert open_latents(make_store(tmp_path / "two")).sha256 == first
    edit_manifest(tmp_path / "two", lambda m: m.update(class_names=["a", "b", "c"]))
    assert open_latents(tmp_path / "two").sha256 == first
    edit_manifest(tmp_path / "two", lambda m: m.update(scale=0.5))
    assert open_latents(tmp_path / "two").sha256 != first
    other = make_store(tmp_path / "three", kind="sample")
    assert open_latents(other).sha256 != first
    make_old(tmp_path / "old")
    old = open_latents(tmp_path / "old").sha256
    np.save(tmp_path / "old" / "imagenet256_labels" / "3.npy", np.array([2]))
    assert open_latents(tmp_path / "old").sha256 != old


def test_stored_samples_are_only_picked(tmp_path):
    store = open_latents(make_store(tmp_path, kind="sample"))
    index = torch.arange(N)
    rows = store.read(index)
    mirror = noise.integers(0, noise.FLIP, index, 2, step=1)
    assert rows.shape == (N, 2, 4, 3, 2) and rows.dtype == torch.float16
    assert torch.equal(store.latents(rows, index, 0, 1), rows[index, mirror].float())


def test_one_mirror_is_always_taken(tmp_path):
    store = open_latents(make_store(tmp_path, kind="sample", mirrors=1))
    index = torch.arange(N)
    assert torch.equal(
        store.latents(store.read(index), index, 0, 1), store.read(index)[:, 0].float()
    )


def test_old_layout_opens(tmp_path):
    arrays = make_old(tmp_path)
    for path in (tmp_path, tmp_path / "imagenet256_features"):
        store = open_latents(path)
        assert (len(store), store.shape, store.num_mirrors) == (5, (4, 3, 2), 2)
        assert (store.kind, store.scale, store.num_classes) == ("sample", 0.18215, 5)
        assert store.labels.tolist() == [0, 1, 2, 3, 4]
        index = torch.tensor([4, 1])
        assert torch.equal(store.read(index), torch.from_numpy(arrays[index]))
        assert store.latents(store.read(index), index, 0, 0).shape == (2, 4, 3, 2)
    store.verify()


def test_old_labels_are_read_once_while_their_files_stay(tmp_path, monkeypatch):
    make_old(tmp_path)
    folder, cache = tmp_path / "imagenet256_labels", tmp_path / "imagenet256_labels.cache.npy"
    label = folder / "6.npy"
    assert open_latents(tmp_path).labels.tolist() == [0, 1, 2, 3, 4]
    with monkeypatch.context() as patch:
        patch.setattr("latents.store._OldFiles._labels_of", None)  # not called
        assert open_latents(tmp_path / "imagenet256_features").labels.tolist() == [0, 1, 2, 3, 4]
    np.save(label, np.array([9]))
    os.utime(label, (0, time.time() + 5))
    assert open_latents(tmp_path).labels.tolist() == [0, 1, 9, 3, 4]
    cache.write_bytes(cache.read_bytes()[:100])
    assert open_latents(tmp_path).labels.tolist() == [0, 1, 9, 3, 4]
    for kind in ("features", "labels"):
        (tmp_path / f"imagenet256_{kind}" / "0.npy").unlink()
    assert open_latents(tmp_path).labels.tolist() == [1, 9, 3, 4]


def test_old_labels_without_a_place_for_their_cache(tmp_path, caplog):
    make_old(tmp_path)
    (tmp_path / "imagenet256_labels.cache.npy").mkdir()  # so that no file can be put there
    assert open_latents(tmp_path).labels.tolist() == [0, 1, 2, 3, 4]
    (record,) = caplog.records
    assert "imagenet256_labels.cache.npy cannot be written" in record.getMessage()


def test_old_layout_errors_name_the_file(tmp_path):
    make_old(tmp_path, labels=[0, 1, 2, 3, 1000])
    with pytest.raises(ValueError, match="label 1000 is outside the 1000 classes"):
        open_latents(tmp_path, num_classes=1000)
    np.save(tmp_path / "imagenet256_features" / "6.npy", np.zeros((2, 4, 8, 8)))
    with pytest.raises(ValueError, match=r"6.npy is \[2, 4, 8, 8\], the first file \[2, 4, 3, 2\]"):
        open_latents(tmp_path).verify()
    (tmp_path / "imagenet256_labels" / "9.npy").unlink()
    with pytest.raises(ValueError, match="imagenet256_labels/9.npy cannot be read"):
        open_latents(tmp_path)
    shutil.rmtree(tmp_path / "imagenet256_labels")
    with pytest.raises(FileNotFoundError, match="imagenet256_labels is missing"):
        open_latents(tmp_path)


# Loader


def world(rank=0, size=1):
    return World(rank, rank, size, CPU)


def take(loader, count):
    batches = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == count:
            return batches


def test_epoch_order_is_pinned():
    assert epoch_order(8, seed=0, epoch=0).tolist() == PINNED
    for epoch in range(3):
        order = epoch_order(100, 1, epoch)
        assert order.dtype == torch.int64
        assert torch.equal(order.sort().values, torch.arange(100))
    orders = {tuple(epoch_order(100, s, e).tolist()) for s in (1, 2) for e in (0, 1)}
    assert len(orders) == 4


def test_epoch_order_is_uniform():
    places = torch.stack([epoch_order(4, 0, epoch) for epoch in range(2000)])
    for place in range(4):
        counts = torch.bincount(places[:, place], minlength=4)
        assert (counts - 500).abs().max() < 80  # four standard deviations of a fair draw


@pytest.mark.parametrize("size", [1, 2, 4])
def test_loader_gives_the_same_batches_to_any_world(tmp_path, size):
    store = open_latents(make_store(tmp_path))
    ranks = [take(LatentLoader(store, 4, world(r, size), seed=7), 5) for r in range(size)]
    for step in range(5):
        epoch, k = divmod(step, 2)
        parts = [batches[step] for batches in ranks]
        assert all((p.step, p.epoch) == (step, epoch) for p in parts)
        index = torch.cat([p.index for p in parts])
        assert torch.equal(index, epoch_order(N, 7, epoch)[4 * k : 4 * k + 4])
        assert torch.equal(torch.cat([p.moments for p in parts]), store.read(index))
        assert torch.cat([p.labels for p in parts]).tolist() == store.labels[index].tolist()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_loader_resumes_where_it_was(tmp_path, workers):
    store = open_latents(make_store(tmp_path))
    whole = take(LatentLoader(store, 4, world(), seed=1), 7)
    rest = take(LatentLoader(store, 4, world(), 1, start_step=3, num_workers=workers), 4)
    for a, b in zip(whole[3:], rest, strict=True):
        assert (a.step, a.epoch) == (b.step, b.epoch)
        assert torch.equal(a.index, b.index) and torch.equal(a.moments, b.moments)
        assert torch.equal(a.labels, b.labels)


def test_loader_refuses_impossible_batches(tmp_path):
    store = open_latents(make_store(tmp_path))
    assert LatentLoader(store, 5, world(), 0).steps_per_epoch == 2
    with pytest.raises(ValueError, match="--global-batch-size 6 is not divisible by the 4"):
        LatentLoader(store, 6, world(0, 4), 0)
    with pytest.raises(ValueError, match="holds 11 images, fewer than --global-batch-size 12"):
        LatentLoader(store, 12, world(), 0)


def test_a_loader_checks_a_shard_at_the_start(tmp_path, monkeypatch):
    """Another one at every start, of one run too: of three, each comes up within a few."""
    chance = itertools.count()
    monkeypatch.setattr(secrets, "randbits", lambda bits: next(chance))
    store = open_latents(make_store(tmp_path))
    for shard in range(3):
        path = tmp_path / "shards" / f"0000{shard}-moments.npy"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        found = 0
        for _ in range(12):
            try:
                LatentLoader(store, 4, world(), 0)
            except ValueError as error:
                assert f"0000{shard}-moments.npy differs from its sha256" in str(error)
                found += 1
        assert 0 < found < 12
        path.write_bytes(whole)


def test_a_read_error_reaches_the_training_loop(tmp_path):
    make_old(tmp_path)
    store = open_latents(tmp_path)
    (tmp_path / "imagenet256_features" / "6.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="6.npy cannot be read"):
        take(LatentLoader(store, 5, world(), 0), 1)


# Images


def test_center_crop_keeps_the_middle():
    pixels = np.zeros((6, 10, 3), np.uint8)
    pixels[:, 2:8] = np.arange(1, 7, dtype=np.uint8)[None, :, None]
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(pixels), 6)), pixels[:, 2:8])


@pytest.mark.parametrize("shape", [(64, 64), (65, 131), (200, 70), (40, 50)])
def test_center_crop_follows_adm(shape):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    result = np.asarray(center_crop(image, 32))
    assert result.shape == (32, 32, 3)
    while min(image.size) >= 64:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.BOX)
    short = min(image.size)
    image = image.resize(tuple(round(side * 32 / short) for side in image.size), Image.BICUBIC)
    array = np.asarray(image)
    y, x = (array.shape[0] - 32) // 2, (array.shape[1] - 32) // 2
    assert np.array_equal(result, array[y : y + 32, x : x + 32])


def test_image_folder_agrees_with_torchvision(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    names = ["b/2.PNG", "b/10.png", "a/x.png", "a/sub/y.jpeg", "a/A.png", "B/z.png"]
    names += [f"a/{folder}/p.png" for folder in "zkcxaqm"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 7), 128).save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    (tmp_path / "labels.csv").write_text("no folder")
    ours, theirs = LabelledImages(tmp_path, 4), torchvision.datasets.ImageFolder(tmp_path)
    assert ours.class_names == theirs.classes
    assert [(str(tmp_path / p), int(k)) for p, k in zip(ours.paths, ours.labels, strict=True)] == (
        theirs.samples
    )
    image, label, place, error = ours[3]
    assert (image.shape, image.dtype, label, place) == ((3, 4, 4), torch.uint8, 1, 3)
    assert error is None and image.unique().tolist() == [128]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_image_folder_reports_unreadable_files_as_data(tmp_path, suffix):
    first, cut, text = (tmp_path / "a" / f"{i}.{suffix}" for i in range(3))
    first.parent.mkdir()
    noisy = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noisy).save(first)
    whole = first.read_bytes()
    text.write_text("not an image")
    for length in (len(whole) // 2, len(whole) - 40):
        cut.write_bytes(whole[:length])
        folder = LabelledImages(tmp_path, 8)
        images, labels, places, errors = collate([folder[i] for i in range(3)])
        assert images.shape == (1, 3, 8, 8) and labels.tolist() == [0] and places.tolist() == [0]
        assert len(errors) == 2 and f"{cut} cannot be read" in errors[0] and f"{text} " in errors[1]
        assert len(collate([folder[1]])[0]) == 0


def test_image_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        LabelledImages(tmp_path / "nowhere", 8)
    with pytest.raises(FileNotFoundError, match="holds no class folders"):
        LabelledImages(tmp_path, 8)
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError, match="no picture in them"):
        LabelledImages(tmp_path, 8)
    (tmp_path / "b").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "0.png")
    with pytest.raises(FileNotFoundError, match="no picture in a: finish the copy, or remove"):
        LabelledImages(tmp_path, 8)


# Codec


def test_codec_is_the_vae(vae_folder, monkeypatch):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    codec = load_codec(str(vae_folder))
    assert (codec.scale, codec.downsample, codec.channels) == (0.5, 2, 4)
    assert codec.id == str(vae_folder) and len(codec.sha256) == 64
    images = torch.rand(5, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        moments = codec.encode(images)
        assert torch.allclose(moments, torch.cat((posterior.mean, posterior.logvar), 1), atol=1e-5)
        expected = vae.decode(posterior.mean).sample
        decoded = codec.decode(posterior.mean * codec.scale)
    assert decoded.shape == (5, 8, 8, 3) and decoded.dtype == torch.uint8
    expected = (expected.clamp(-1, 1) + 1) * 127.5  # unrounded uint8 values
    assert (decoded.permute(0, 3, 1, 2).float() - expected).abs().max() < 0.51
    monkeypatch.setattr(codec_module, "PASS_PIXELS", 2 * 64)  # three passes: 2, 2 and 1 images
    assert torch.allclose(codec.encode(images), moments, atol=1e-5)
    assert codec.decode(posterior.mean * codec.scale).shape == decoded.shape
    with pytest.raises(ValueError, match="9x8 pixels: VAE .* divisible by 2"):
        codec.encode(torch.zeros(1, 3, 9, 8))


def test_a_compiled_codec_sees_batches_of_one_size(vae_folder, monkeypatch):
    """They are cut evenly and filled up, and what fills them does not come out."""
    codec = load_codec(str(vae_folder))
    assert codec.compiled(6, 8) is codec  # on the CPU
    images = torch.rand(5, 3, 8, 8) * 2 - 1
    moments = codec.encode(images)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    monkeypatch.setattr(codec_module, "PASS_PIXELS", 4 * 64)
    made = replace(codec, device=torch.device("cuda")).compiled(6, 8)
    made, seen = replace(made, device=codec.device), []
    made.vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    torch.testing.assert_close(made.encode(images), moments, rtol=0, atol=1e-5)
    assert seen == [3, 3]


def test_codec_reads_fp16_weights_as_fp32(vae_folder, tmp_path):
    from diffusers import AutoencoderKL

    AutoencoderKL.from_pretrained(vae_folder).half().save_pretrained(tmp_path)
    codec = load_codec(tmp_path)
    assert {p.dtype for p in codec.vae.parameters()} == {torch.float32}
    bf16 = load_codec(tmp_path, dtype=torch.bfloat16)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    exact, rough = codec.encode(images), bf16.encode(images)
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough) and torch.allclose(exact, rough, atol=0.05)


def test_codec_names_what_is_missing(vae_folder, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(codec_module, "REPOSITORY", tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="VAE mse: pretrained/sd-vae-ft-mse does not exist"):
        load_codec("mse")
    with pytest.raises(FileNotFoundError, match="VAE emma: no such folder; use ema, mse, sdxl or"):
        load_codec("emma")
    local = tmp_path / "pretrained" / "sd-vae-ft-ema"
    shutil.copytree(vae_folder, local)
    assert load_codec("ema").id == "ema"
    (local / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model.safetensors is missing"):
        load_codec("ema")
    config = vae_folder / "config.json"
    shutil.copytree(vae_folder, tmp_path / "shifted")
    shifted = json.loads(config.read_text()) | {"shift_factor": 0.1}
    (tmp_path / "shifted" / "config.json").write_text(json.dumps(shifted))
    with pytest.raises(ValueError, match="shift_factor 0.1"):
        load_codec(tmp_path / "shifted")


def test_torn_or_mismatched_vaes_are_one_line(vae_folder, tmp_path):
    weights = "diffusion_pytorch_model.safetensors"
    config = json.loads((vae_folder / "config.json").read_text())
    whole = (vae_folder / weights).read_bytes()
    cases = [
        ("config.json", b'{"in_channels": 3', "config.json is not whole JSON"),
        (weights, whole[:5000], f"{weights} cannot be read"),
        (weights, b"no weights", f"{weights} cannot be read"),
        ("config.json", config | {"latent_channels": 8}, r"does not fit .*\(size mismatch for"),
        ("config.json", config | {"layers_per_block": 2}, "does not fit .*only"),
        ("config.json", config | {"block_out_channels": 3}, "does not fit"),
    ]
    for i, (name, content, message) in enumerate(cases):
        folder = shutil.copytree(vae_folder, tmp_path / str(i))
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            load_codec(folder)
        assert f"VAE {folder}" in str(caught.value) and "\n" not in str(caught.value)
    assert load_codec(vae_folder, name="../vae").id == "../vae"
