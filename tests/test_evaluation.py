"""Scores: readers, statistics, the Frechet distance, both networks and the whole entry."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import evaluate_fid
from evaluation.features import Statistics, gather_stats, load_stats, save_stats
from evaluation.inception import InceptionFeatures, find_weights, legacy_resize, prepare
from evaluation.metrics import GaussianStats, frechet_distance
from evaluation.mini_net import WEIGHTS, MiniFeatures, save_weights
from evaluation.readers import batches, conversion_note, npz_keys, open_images
from evaluation.report import check_roles, default_output
from evaluation.writers import describe_run, save_grid, save_npz, save_png
from models.provenance import environment, git_revision

REPOSITORY = Path(__file__).resolve().parent.parent


# -- material ---------------------------------------------------------------------------------


def pictures(count, size=64, seed=0, smooth=False):
    """uint8 [count, size, size, 3], noise or large soft shapes."""
    rng = np.random.default_rng(seed)
    if not smooth:
        return rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    small = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((size, size))) for x in small])


def write_pictures(folder, array, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(array, start):
        Image.fromarray(pixels).save(folder / f"{i:06d}.png")
    return folder


def covariance(dim, rank, seed, decades=0.0):
    """A covariance of the given rank whose eigenvalues span that many decades."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(dim, dim)))[0][:, :rank]
    values = 10 ** np.linspace(0, -decades, rank)
    return (basis * values) @ basis.T


def evaluate(monkeypatch, *words):
    """Runs the entry in this process with a command line."""
    monkeypatch.setattr(sys, "argv", ["evaluate_fid.py", *map(str, words)])
    evaluate_fid.main(evaluate_fid.parse_args())


# -- statistics -------------------------------------------------------------------------------


def test_statistics_do_not_depend_on_batching_and_survive_a_large_mean(monkeypatch):
    monkeypatch.setattr("evaluation.metrics.FOLD", 5)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(101, 7)) * np.arange(1, 8) + 1e7
    stats = GaussianStats(7)
    for chunk in np.array_split(features, [1, 3, 40, 90]):
        stats.update(torch.from_numpy(chunk))
    assert stats.count == 101
    np.testing.assert_allclose(stats.mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(stats.sigma, np.cov(features, rowvar=False), rtol=1e-6, atol=1e-7)


def test_statistics_of_several_processes_are_joined_by_sums():
    features = torch.randn(50, 5, dtype=torch.float64) + 3
    whole, shares = GaussianStats(5), [GaussianStats(5) for _ in range(3)]
    whole.update(features)
    shares[0].update(features[:20])
    shares[1].update(features[20:])  # the third process saw no image
    for share in shares:
        # What all_reduce would give, call by call: count, count * mean, scatter about the mean.
        mean = whole.mean
        sums = iter((
            torch.tensor(50.0, dtype=torch.float64),
            sum(s.mean * s.count for s in shares),
            sum(s.scatter + torch.outer(s.mean - mean, s.mean - mean) * s.count for s in shares),
        ))  # fmt: skip
        joined = copy.deepcopy(share)
        given = []
        joined.sum_over(
            lambda tensor, sums=sums, given=given: (given.append(tensor), next(sums))[1]
        )
        delta = share.mean - mean
        torch.testing.assert_close(
            given[2], share.scatter + torch.outer(delta, delta) * share.count
        )
        assert joined.count == 50
        torch.testing.assert_close(joined.sigma, whole.sigma)


def test_statistics_refuse_nan_and_too_few():
    stats = GaussianStats(2)
    with pytest.raises(ValueError, match="NaN"):
        stats.update(torch.tensor([[0.0, float("nan")]]))
    stats.update(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="at least 2"):
        _ = stats.sigma


# -- Frechet distance -------------------------------------------------------------------------


def test_frechet_distance_of_known_gaussians():
    zero, one = np.zeros(4), np.ones(4)
    eye = np.eye(4)
    assert frechet_distance(zero, eye, zero, eye) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(zero, eye, 2 * one, eye) == pytest.approx(16)
    # Commuting covariances: the sum of squared differences of standard deviations.
    a, b = np.diag([1.0, 4, 9, 16]), np.diag([4.0, 1, 25, 0])
    assert frechet_distance(zero, a, zero, b) == pytest.approx(1 + 1 + 4 + 16)
    # Pure directions u and v: tr(uu' + vv') - 2 |u.v|.
    u, v = np.array([3.0, 0, 0, 0]), np.array([1.0, 2, 0, 0])
    expected = 9 + 5 - 2 * 3
    assert frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v)) == pytest.approx(expected)
    assert frechet_distance(zero, 0 * eye, zero, eye) == pytest.approx(4)


def test_frechet_distance_of_two_dimensions_is_the_closed_form():
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    # In two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    cross = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    expected = np.trace(a) + np.trace(b) - 2 * cross
    assert frechet_distance(np.zeros(2), a, np.zeros(2), b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("rank1", "rank2", "decades", "tolerance"),
    [(60, 60, 1, 1e-9), (60, 60, 12, 1e-6), (20, 60, 2, 1e-5), (20, 25, 1, 1e-5)],
)
def test_frechet_distance_agrees_with_pytorch_fid(rank1, rank2, decades, tolerance):
    from pytorch_fid.fid_score import calculate_frechet_distance

    rng = np.random.default_rng(3)
    one = rng.normal(size=60), covariance(60, rank1, 1, decades)
    two = rng.normal(size=60), 2 * covariance(60, rank2, 2, decades)
    expected = calculate_frechet_distance(*one, *two)
    assert frechet_distance(*one, *two) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance(*two, *one) == pytest.approx(frechet_distance(*one, *two), rel=1e-7)
    assert frechet_distance(*one, *one) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_refuses_what_is_no_pair_of_gaussians():
    eye = np.eye(3)
    with pytest.raises(ValueError, match=r"mu2 has shape \[2\], expected \[3\]"):
        frechet_distance(np.zeros(3), eye, np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(np.zeros(3), eye * np.nan, np.zeros(3), eye)
    with pytest.raises(ValueError, match="not a covariance"):
        frechet_distance(np.zeros(3), np.diag([1.0, 1, -1]), np.zeros(3), eye)


# -- readers ----------------------------------------------------------------------------------


def test_folder_is_read_nested_in_sorted_order_and_shared_out(tmp_path):
    array = pictures(7, 8)
    write_pictures(tmp_path / "b", array[3:])
    write_pictures(tmp_path / "a", array[:3])
    (tmp_path / "b" / ".000000.png").write_bytes(b"unfinished")
    (tmp_path / "samples.json").write_text("{}")
    write_pictures(tmp_path / "a" / ".thumbs", array[:2])
    (tmp_path / "c.png").mkdir()
    images = open_images(tmp_path)
    assert len(images) == 7 and images.size == (8, 8)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "to").symlink_to(tmp_path / "b")
    assert len(open_images(tmp_path / "linked")) == 4
    shutil.rmtree(tmp_path / "linked")
    read = torch.cat(list(batches(images, 3, num_workers=2)))
    assert torch.equal(read, torch.from_numpy(array).permute(0, 3, 1, 2))
    share = torch.cat(list(batches(images, 2, share=(1, 3))))
    assert torch.equal(share, read[1::3])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_gives_the_same_images_as_the_folder(tmp_path, save):
    array = pictures(5, 8)
    save(tmp_path / "x.npz", other=np.zeros(3), arr_0=array)
    images = open_images(tmp_path / "x.npz")
    assert isinstance(images.array, np.memmap) == (save is np.savez)
    read = torch.cat(list(batches(images, 2)))
    assert torch.equal(read, torch.from_numpy(array).permute(0, 3, 1, 2))


def test_bad_folders_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no images"):
        open_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_images(tmp_path / "none")
    write_pictures(tmp_path, pictures(3, 8))
    write_pictures(tmp_path, pictures(1, 9), start=5)
    with pytest.raises(ValueError, match=r"000005.png is 9x9 but .*000000.png is 8x8"):
        list(batches(open_images(tmp_path), 2))
    torn = (tmp_path / "000001.png").read_bytes()[:60]
    short = torn[:11] + b"\x05" + torn[12:]  # of a header that ends early Pillow names no file
    for damaged in (torn, short):
        (tmp_path / "000005.png").write_bytes(damaged)
        with pytest.raises(ValueError, match="000005.png cannot be read"):
            list(batches(open_images(tmp_path), 2))
    (tmp_path / "000005.png").unlink()
    for mode, kind in (("I;16", np.uint16), ("F", np.float32)):
        name = "deep.png" if mode == "I;16" else "deep.webp"
        deep = Image.fromarray(np.zeros((8, 8), kind))
        deep.save(tmp_path / name, format="PNG" if mode == "I;16" else "TIFF")
        with pytest.raises(ValueError, match=f"{name} has"):
            list(batches(open_images(tmp_path), 8))
        (tmp_path / name).unlink()


def test_bad_archives_are_refused_by_name(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(ValueError, match="no array named arr_0"):
        open_images(path)
    np.savez(path, arr_0=np.zeros((2, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="float32"):
        open_images(path)
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match="neither an image folder"):
        npz_keys(path)


def test_damaged_archives_are_one_error_that_names_them(tmp_path):
    """A byte in each tenth of the file changes; what is still read is what was written."""
    path, array, net = tmp_path / "x.npz", pictures(5, 8), MiniFeatures()
    stats = Statistics(torch.zeros(64).double(), torch.eye(64).double(), 5)
    refused = 0
    for write, read in (
        (lambda: np.savez_compressed(path, arr_0=array), lambda: open_images(path).array),
        (lambda: save_stats(path, stats, net, "x"), lambda: load_stats(path, net).sigma),
    ):
        write()
        whole, expected = path.read_bytes(), np.asarray(read())
        for place in range(0, len(whole), len(whole) // 10):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
            try:
                assert np.array_equal(read(), expected)
            except ValueError as error:
                assert str(path) in str(error)
                refused += 1
    assert refused > 10
    np.savez(path, arr_0=np.array([{}]), mu=np.array([{}]), sigma=np.eye(2))
    for call in (lambda: open_images(path), lambda: load_stats(path, net)):
        with pytest.raises(ValueError, match="x.npz is damaged or no .npz of plain arrays"):
            call()


def test_grey_and_alpha_are_converted_and_said_once(tmp_path):
    array = pictures(3, 8)
    Image.fromarray(array[0]).save(tmp_path / "0.png")
    Image.fromarray(array[1, ..., 0]).save(tmp_path / "1.png")
    Image.fromarray(np.dstack([array[2], np.zeros((8, 8), np.uint8)])).save(tmp_path / "2.png")
    modes = Counter()
    read = torch.cat(list(batches(open_images(tmp_path), 2, modes=modes)))
    assert torch.equal(
        read[1], torch.from_numpy(array[1, ..., :1]).permute(2, 0, 1).expand(3, 8, 8)
    )
    assert torch.equal(read[2], torch.from_numpy(array[2]).permute(2, 0, 1))
    assert "1 of mode L, 1 of mode RGBA" in conversion_note(modes)
    assert conversion_note(Counter(RGB=5)) is None


# -- networks ---------------------------------------------------------------------------------


def test_legacy_resize_follows_its_rule():
    rng = np.random.default_rng(0)
    for height, width in ((256, 256), (64, 100), (400, 299)):
        x = rng.integers(0, 256, (height, width)).astype(np.float32)
        ours = legacy_resize(torch.from_numpy(x)[None, None], 299)[0, 0].numpy()
        assert ours.shape == (299, 299)
        for i, j in [(0, 0), (298, 298), (150, 3), *rng.integers(0, 299, (200, 2)).tolist()]:
            y, z = np.float32(i) * np.float32(height / 299), np.float32(j) * np.float32(width / 299)
            y0, z0 = int(y), int(z)
            y1, z1 = min(y0 + 1, height - 1), min(z0 + 1, width - 1)
            top = x[y0, z0] + (x[y0, z1] - x[y0, z0]) * (z - z0)
            bottom = x[y1, z0] + (x[y1, z1] - x[y1, z0]) * (z - z0)
            assert ours[i, j] == pytest.approx(top + (bottom - top) * (y - y0), abs=1e-3)


def test_the_protocols_differ_in_resize_and_range():
    ramp = torch.arange(256, dtype=torch.uint8).expand(1, 3, 256, 256)
    adm, other = prepare(ramp, "adm"), prepare(ramp, "pytorch-fid")
    middle = slice(10, 280)
    # adm: source column i * 256 / 299, then (x - 128) / 128.
    column = torch.arange(299) * (256 / 299)
    torch.testing.assert_close(adm[0, 0, 5, middle], (column[middle] - 128) / 128)
    # pytorch-fid: half a pixel of shift, (i + 0.5) * 256 / 299 - 0.5, then 2 x / 255 - 1.
    column = (torch.arange(299) + 0.5) * (256 / 299) - 0.5
    torch.testing.assert_close(
        other[0, 0, 5, middle], 2 * column[middle] / 255 - 1, atol=1e-5, rtol=0
    )


def test_inception_fid_equals_pytorch_fid(tmp_path, inception_weights, monkeypatch):
    from pytorch_fid import fid_score, inception

    folders = [
        write_pictures(tmp_path / "reference", pictures(6, 48)),
        write_pictures(tmp_path / "samples", pictures(5, 48, seed=1, smooth=True)),
    ]
    state = torch.load(inception_weights, weights_only=True)
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: state)
    theirs = inception.InceptionV3([3])
    moments = [
        fid_score.calculate_activation_statistics(
            sorted(folder.iterdir()), theirs, 4, num_workers=0
        )
        for folder in folders
    ]
    # Their matrix root takes a minute for 2048 dimensions. All the variance of 11 images lies in
    # a space of 11, to which both Gaussians can be turned without changing their distance.
    columns = np.hstack(
        [moments[0][0][:, None], moments[1][0][:, None], moments[0][1], moments[1][1]]
    )
    sketch = np.random.default_rng(0).normal(size=(columns.shape[1], 11))
    basis = np.linalg.qr(columns @ sketch)[0]  # [2048, 11]
    expected = fid_score.calculate_frechet_distance(
        *(part for mu, sigma in moments for part in (mu @ basis, basis.T @ sigma @ basis))
    )
    evaluate(
        monkeypatch, *folders, "--inception-weights", inception_weights, "--device", "cpu",
        "--batch-size", 4,
    )  # fmt: skip
    report = json.loads((tmp_path / "samples.metrics.json").read_text())
    assert report["metrics"]["fid"] == pytest.approx(expected, rel=1e-4)
    assert report["metrics"]["fid"] > 1e-3
    assert report["protocol"] == "pytorch-fid"
    assert report["num_samples"] == 5 and report["num_reference"] == 6
    assert len(report["feature_net"]["sha256"]) == 64
    assert any("5 samples for 2048 features" in line for line in report["warnings"])


def test_adm_features_differ_from_pytorch_fid_features(inception_weights):
    images = torch.from_numpy(pictures(1, 48, smooth=True)).permute(0, 3, 1, 2)
    one = InceptionFeatures("pytorch-fid", inception_weights)(images)
    two = InceptionFeatures("adm", inception_weights)(images)
    assert one.shape == (1, 2048)
    assert 1e-4 < (one - two).norm() / one.norm() < 0.5
    with pytest.raises(ValueError, match="protocol 'clean'"):
        InceptionFeatures("clean", inception_weights)


def test_inception_weights_are_looked_for_and_checked(tmp_path, monkeypatch):
    name = "pt_inception-2015-12-05-6726825d.pth"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("evaluation.inception.REPOSITORY", tmp_path)
    with pytest.raises(FileNotFoundError, match="other.pth does not exist"):
        find_weights("other.pth")
    with (
        mock.patch("torch.hub.download_url_to_file", side_effect=OSError("no network")),
        pytest.raises(FileNotFoundError, match=f"https://.*{name} .*pretrained/{name}"),
    ):
        find_weights()
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / name).write_bytes(b"x")
    assert find_weights() == Path("pretrained") / name
    with pytest.raises(ValueError, match="is damaged"):
        InceptionFeatures()


def test_weights_that_are_not_inception_are_one_line(tmp_path, inception_weights):
    state = torch.load(inception_weights, weights_only=True)
    path = tmp_path / "w.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)  # as the published file is
    InceptionFeatures(weights=path)
    whole = path.read_bytes()
    torch.save({"blocks.0.attn.qkv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    for content, message in (
        (b"Gone", "w.pth is torn or no weight file"),  # to a pickle: G and half a number
        (whole[:14], "w.pth is torn or no weight file"),
        (whole[: len(whole) // 2], "w.pth is torn or no weight file"),
        ((tmp_path / "other.pth").read_bytes(), "w.pth is not the Inception .*Missing key"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            InceptionFeatures(weights=path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_mini_net_is_read_back_and_takes_its_own_size_only(tmp_path):
    net = MiniFeatures()
    images = torch.from_numpy(pictures(4)).permute(0, 3, 1, 2)
    features = net(images)
    assert features.shape == (4, 64) and features.dtype == torch.float32
    torch.testing.assert_close(net(images[2:3])[0], features[2], rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in net.net.parameters()) < 600_000
    save_weights(net.net, tmp_path / "copy.safetensors", seed=0)
    assert torch.equal(MiniFeatures(tmp_path / "copy.safetensors")(images), features)
    with pytest.raises(ValueError, match="64x64 images, not 32x48"):
        net(torch.zeros(1, 3, 48, 32, dtype=torch.uint8))
    with pytest.raises(FileNotFoundError, match="train_mini_features.py"):
        MiniFeatures(tmp_path / "none.safetensors")


def test_mini_record_belongs_to_the_weights_and_promises_hold():
    record = json.loads(WEIGHTS.with_suffix(".json").read_text())
    assert record["sha256"] == MiniFeatures().sha256
    assert record["checks"] and all(record["checks"].values())


def test_mini_distance_sees_damage_and_missing_kinds():
    sheets = sorted((WEIGHTS.parent / "images").glob("*.webp"))
    images = torch.cat([contact_sheet(path)[:40] for path in sheets])  # [360, 3, 64, 64]
    one, two = images[::2], images[1::2]
    net = MiniFeatures()
    reference = gather_stats(net, one.split(48), "cpu")

    def distance(samples):
        stats = gather_stats(net, samples.split(48), "cpu")
        return frechet_distance(reference.mean, reference.sigma, stats.mean, stats.sigma)

    pooled = F.interpolate(F.avg_pool2d(two.float(), 2), scale_factor=2).to(torch.uint8)
    coarse = F.interpolate(F.avg_pool2d(two.float(), 4), scale_factor=4).to(torch.uint8)
    dice = torch.Generator().manual_seed(0)
    noisy = (two + 60 * torch.randn(two.shape, generator=dice)).clamp(0, 255).to(torch.uint8)
    rolled = torch.cat([two[:, :, :, 32:], two[:, :, :, :32]], 3)
    clean = distance(two)
    assert clean < distance(pooled) < distance(coarse)
    assert 2 * clean < min(map(distance, (coarse, noisy, rolled, two[:36].repeat(5, 1, 1, 1))))


def contact_sheet(path):
    """uint8 [cells, 3, 64, 64] of one sheet of 24 columns."""
    sheet = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
    cells = sheet.unflatten(0, (-1, 64)).unflatten(2, (-1, 64))  # [rows, 64, columns, 64, 3]
    return cells.permute(0, 2, 4, 1, 3).flatten(0, 1)


# -- the entry --------------------------------------------------------------------------------


def test_mini_scores_are_reported_with_their_origin(tmp_path, monkeypatch, capsys):
    reference = write_pictures(tmp_path / "reference", pictures(30))
    samples = write_pictures(tmp_path / "samples", pictures(30, seed=1, smooth=True))
    record = {"complete": True, "settings": {"num_samples": 30, "seed": 5}}
    (samples / "samples.json").write_text(json.dumps(record))
    stats = tmp_path / "stats" / "reference.npz"
    common = ("--feature-net", "mini", "--device", "cpu")

    evaluate(monkeypatch, reference, samples, *common, "--save-stats", stats)
    first = json.loads((samples / "metrics.json").read_text())
    assert list(first["metrics"]) == ["fd_mini", "precision", "recall"]
    assert first["protocol"] == "mini" and first["num_reference_manifold"] == 30
    assert first["metrics"]["fd_mini"] > 1
    assert first["samples_json"] == record
    assert first["reference"] == {"path": str(reference), "kind": "folder", "files": 30}
    assert "| fd_mini" in capsys.readouterr().out

    # The same from saved statistics and from an .npz of the samples, in other batches.
    archive = tmp_path / "samples.npz"
    np.savez(archive, arr_0=pictures(30, seed=1, smooth=True))
    evaluate(monkeypatch, stats, archive, *common, "--batch-size", 7)
    second = json.loads((tmp_path / "samples.metrics.json").read_text())
    assert second["metrics"] == pytest.approx(first["metrics"], rel=1e-6)
    assert second["num_reference"] == second["num_reference_manifold"] == 30
    assert second["samples_json"] == record and len(second["reference"]["sha256"]) == 64

    # A set against itself, to a place of the caller's.
    evaluate(monkeypatch, archive, samples, *common, "--output", tmp_path / "self.json")
    itself = json.loads((tmp_path / "self.json").read_text())
    assert itself["metrics"]["fd_mini"] == pytest.approx(0, abs=1e-6)
    assert itself["metrics"]["precision"] == itself["metrics"]["recall"] == 1
    (samples / "samples.json").write_text('{"complete": tr')
    with pytest.raises(ValueError, match="samples.json is not whole JSON .*: repeat the sampling"):
        evaluate(monkeypatch, reference, samples, *common)


def test_a_folder_that_is_not_ours_is_left_as_it_is(tmp_path, monkeypatch):
    samples = write_pictures(tmp_path / "theirs.v1", pictures(3))
    write_pictures(tmp_path / "reference", pictures(4, seed=1))
    before = sorted(samples.iterdir())
    monkeypatch.chdir(samples)
    words = ("../reference", ".", "--feature-net", "mini", "--device", "cpu")
    evaluate(monkeypatch, *words)
    assert sorted(samples.iterdir()) == before
    assert (tmp_path / "theirs.v1.metrics.json").is_file()
    assert default_output("theirs.v1.npz") == Path("theirs.v1.metrics.json")


def test_equal_arguments_are_refused_and_swapped_ones_said(tmp_path, monkeypatch, capsys):
    samples = write_pictures(tmp_path / "samples", pictures(4))
    (samples / "samples.json").write_text("{}")
    others = write_pictures(tmp_path / "others", pictures(4, seed=1))
    stats, batch = tmp_path / "stats.npz", tmp_path / "batch.npz"
    np.savez(stats, mu=np.zeros(64), sigma=np.eye(64))
    np.savez(batch, mu=np.zeros(64), sigma=np.eye(64), arr_0=pictures(4, seed=2))
    common = ("--feature-net", "mini", "--device", "cpu")
    for reference, scored, why in (
        (samples, others, "samples has a samples.json"),
        (others, batch, "batch.npz holds the statistics"),
    ):
        evaluate(monkeypatch, reference, scored, *common, "--output", tmp_path / "scores.json")
        (said,) = (
            w for w in json.loads((tmp_path / "scores.json").read_text())["warnings"] if why in w
        )
        assert "look swapped" in said and f"warning: {said}" in capsys.readouterr().out
    monkeypatch.setattr(evaluate_fid, "MiniFeatures", None)  # not reached
    for reference, scored, message in (
        (others, stats, "look swapped .*stats.npz holds the statistics of a reference and no im"),
        (samples, tmp_path / "others" / ".." / "samples", "are both .*samples"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(monkeypatch, reference, scored, *common)
    (others / "samples.json").write_text("{}")
    assert not check_roles(samples, others)  # two sets of samples may be compared


def test_statistics_of_an_unstated_protocol_bring_one_warning(
    tmp_path, monkeypatch, capsys, inception_weights
):
    archive, samples = tmp_path / "adm.npz", write_pictures(tmp_path / "samples", pictures(2, 48))
    np.savez(archive, mu=np.zeros(2048), sigma=np.eye(2048))
    common = ("--inception-weights", inception_weights, "--device", "cpu")
    # The distance needs an eigendecomposition of 2048 dimensions, which is beside the point here.
    monkeypatch.setattr("evaluation.scores.frechet_distance", lambda *_: 1.0)
    for flags, warned in (((), True), (("--protocol", "adm"), False)):
        evaluate(monkeypatch, archive, samples, *common, *flags)
        lines = [line for line in capsys.readouterr().out.splitlines() if "its protocol" in line]
        report = json.loads((tmp_path / "samples.metrics.json").read_text())
        assert (
            len(lines) == warned and sum("its protocol" in w for w in report["warnings"]) == warned
        )
        assert all("by pytorch-fid" in line and "--protocol adm" in line for line in lines)


def test_images_of_two_sizes_are_scored_with_a_warning(
    tmp_path, monkeypatch, inception_weights, capsys
):
    monkeypatch.setattr("evaluation.scores.frechet_distance", lambda *_: 1.0)
    samples = write_pictures(tmp_path / "samples", pictures(3))
    common = ("--inception-weights", inception_weights, "--device", "cpu")
    for size, warned in ((64, 0), (32, 1)):
        reference = write_pictures(tmp_path / f"reference{size}", pictures(3, size=size))
        evaluate(monkeypatch, reference, samples, *common)
        sentence = "the reference has images of 32x32 pixels, the samples of 64x64"
        assert capsys.readouterr().out.count(f"warning: {sentence}") == warned
        report = json.loads((tmp_path / "samples.metrics.json").read_text())
        assert sum(sentence in w for w in report["warnings"]) == warned


def test_two_processes_give_the_score_of_one(tmp_path, monkeypatch):
    reference = write_pictures(tmp_path / "reference", pictures(9))
    samples = write_pictures(tmp_path / "samples", pictures(7, seed=1, smooth=True))
    evaluate(monkeypatch, reference, samples, "--feature-net", "mini", "--device", "cpu")
    one = json.loads((tmp_path / "samples.metrics.json").read_text())
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += [
        REPOSITORY / "evaluate_fid.py",
        reference,
        samples,
        "--feature-net",
        "mini",
        "--device",
        "cpu",
    ]
    words += ["--output", tmp_path / "two.json", "--batch-size", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([str(word) for word in words], check=True, env=environment, cwd=tmp_path)
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["num_samples"] == 7 and two["num_reference"] == 9
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-6)


def test_entry_refuses_arguments_that_do_not_fit(tmp_path, monkeypatch):
    samples = write_pictures(tmp_path / "samples", pictures(2))
    others = write_pictures(tmp_path / "others", pictures(2))
    mini = (others, samples, "--feature-net", "mini", "--device", "cpu")
    with pytest.raises(ValueError, match="--protocol"):
        evaluate(monkeypatch, *mini, "--protocol", "adm")
    with pytest.raises(ValueError, match="SAMPLES is missing"):
        evaluate(monkeypatch, samples, "--device", "cpu")
    archive = tmp_path / "adm.npz"
    np.savez(archive, mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float32)[:1])
    with pytest.raises(ValueError, match="2048 features, --feature-net mini has 64"):
        evaluate(monkeypatch, archive, *mini[1:])
    # Before any image is scored
    monkeypatch.setattr(evaluate_fid, "measure", mock.Mock(side_effect=AssertionError))
    for flag in ("--output", "--save-stats"):
        with pytest.raises(FileExistsError, match="adm.npz"):
            evaluate(monkeypatch, *mini, flag, archive / "x.npz")


def test_statistics_files_of_another_space_are_refused(tmp_path):
    net = MiniFeatures()
    path = tmp_path / "stats.npz"
    stats = Statistics(
        torch.arange(64.0, dtype=torch.float64),
        torch.eye(64, dtype=torch.float64),
        12,
        features=torch.rand(5, 64),
    )
    save_stats(path, stats, net, "somewhere")
    back = load_stats(path, net)
    assert back.count == 12 and back.mu_s is None
    assert torch.equal(back.mu, stats.mu) and torch.equal(back.features, stats.features)
    net.sha256 = "0" * 64
    with pytest.raises(ValueError, match="was made with sha256"):
        load_stats(path, net)
    # ADM's and pytorch-fid's files do not say how many images they stand for.
    np.savez(path, mu=stats.mu, sigma=stats.sigma)
    foreign = load_stats(path, net)
    assert foreign.count is None and back.known_space and not foreign.known_space


# -- writers ----------------------------------------------------------------------------------


def settings(**changes):
    return {
        "plan": {"model": "DiT-Mini/2"},
        "config": "a.yaml",
        "checkpoint": "a.pt",
        "checkpoint_sha256": {"trained": "11"},
        "seed": 0,
        "vae": "ema",
        "vae_sha256": "22",
        "num_samples": 3,
        **changes,
    }


def test_a_sample_folder_takes_more_of_the_same_run_only(tmp_path):
    folder = tmp_path / "run"
    record = folder / "samples.json"

    def complete():
        return json.loads(record.read_text())["complete"]

    describe_run(folder, settings(), complete=False)
    assert not complete()
    write_pictures(folder, pictures(3, 8))
    describe_run(folder, settings(), complete=True)
    text = record.read_text()
    assert complete()
    # Nothing is missing, and the files have only moved: nothing changes.
    moved = settings(config="b.yaml", checkpoint="/mnt/a.pt", vae="/mnt/vae")
    describe_run(folder, moved, complete=False)
    describe_run(folder, moved, complete=True)
    assert record.read_text() == text
    for changes, message in (
        ({"seed": 1}, "seed = 0, this run has 1"),
        ({"checkpoint_sha256": {"trained": "12"}}, "checkpoint_sha256 = .*'11'.* has .*'12'"),
        ({"checkpoint": "b.pt", "checkpoint_sha256": {}}, "checkpoint = 'a.pt', this"),
        ({"num_samples": 2}, "images up to 000002.png, this run makes 2: ask for at least 3"),
    ):
        with pytest.raises(ValueError, match=message):
            describe_run(folder, settings(**changes), complete=False)
    assert record.read_text() == text
    stale = folder / ".000003.png.1.partial"
    stale.write_bytes(b"")
    os.utime(stale, (0, 0))
    describe_run(folder, settings(num_samples=4), complete=False)
    assert not complete() and not stale.exists()
    describe_run(folder, settings(), complete=True)
    assert complete()
    (folder / "000001.png").unlink()
    describe_run(folder, settings(), complete=False)
    assert not complete()
    record.write_text(text[:50])
    with pytest.raises(ValueError, match="samples.json is not whole JSON"):
        describe_run(folder, settings(), complete=False)


def test_images_are_packed_and_laid_out_in_their_order(tmp_path):
    array = pictures(131, 8)[:, :, :4]
    files = [tmp_path / f"{130 - i:03d}.png" for i in range(131)]  # not the order of the names
    for file, pixels in zip(files, array, strict=True):
        save_png(file, pixels)
    save_npz(tmp_path / "all.npz", files, num_workers=3)
    assert np.array_equal(np.load(tmp_path / "all.npz")["arr_0"], array)
    save_grid(tmp_path / "grid.png", files[:7])
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (24, 12, 3) and np.array_equal(sheet[8:16, 4:8], array[4])
    assert (sheet[16:, 4:] == 255).all()
    files[3].write_bytes(b"torn")
    for write in (save_npz, save_grid):
        with pytest.raises(ValueError, match="127.png cannot .* format is unknown; delete that"):
            write(tmp_path / "none", files)
    assert not (tmp_path / "none").exists()


def test_environment_names_the_device_of_a_result(monkeypatch):
    assert "hardware" not in environment()
    cores = len(os.sched_getaffinity(0))
    assert environment(torch.device("cpu"))["hardware"] == f"{cores} processors (cpu)"
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"Card {device.index}")
    assert environment(torch.device("cuda", 1))["hardware"] == "Card 1 (cuda)"


def test_git_revision_counts_tracked_changes_only(tmp_path, monkeypatch):
    monkeypatch.setattr("models.provenance.REPOSITORY", tmp_path)
    assert git_revision() is None
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], [*names, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    (tmp_path / "new.txt").write_text("untracked")
    revision = git_revision()
    assert len(revision) == 40
    subprocess.run(["git", "-C", str(tmp_path), "add", "new.txt"], check=True)
    assert git_revision() == f"{revision}-dirty"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "result.json").write_text("1")
    subprocess.run(["git", "-C", str(tmp_path), "add", "docs"], check=True)
    subprocess.run(["git", "-C", str(tmp_path), *names, "commit", "-qm", "y"], check=True)
    revision = git_revision()
    assert len(revision) == 40
    (tmp_path / "docs" / "result.json").write_text("2")  # as a study that is made anew writes
    assert git_revision() == revision
    (tmp_path / "new.txt").write_text("tracked by now")
    assert git_revision() == f"{revision}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision() is None
