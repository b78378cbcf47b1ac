"""Inception score, precision and recall, standard errors, and one pass over the images, against
definitions written out and against torch-fidelity."""

import json
import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from entries import REPOSITORY, run
from PIL import Image
from torch.nn import functional as F

import evaluate_fid
from evaluation.features import Activations, measure
from evaluation.inception import InceptionFeatures, legacy_resize, prepare
from evaluation.manifolds import precision_recall
from evaluation.metrics import (
    bootstrap_frechet,
    bootstrap_inception,
    frechet_distance,
    inception_score,
)
from evaluation.report import find_doubts


class TinyNet:
    """A FeatureNet of random projections: all that Inception gives, in no time."""

    name, metric, dim, spatial_dim, num_logits = "inception", "fid", 8, 6, 5
    minimum = 32

    def __init__(self, protocol="adm", weights=None, device="cpu"):
        self.protocol, self.sha256 = protocol, "0" * 64
        self.maps = torch.randn(19, 48, generator=torch.Generator().manual_seed(0))

    def activations(self, images):
        # in float64, so that the size of a batch does not show
        cells = F.adaptive_avg_pool2d(images.double() / 255, 4).flatten(1)  # [B, 48]
        found = torch.sin(cells @ self.maps.double().T * 3).float()
        return Activations(found[:, :8], found[:, 8:14], found[:, 14:] * 4)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(evaluate_fid, "InceptionFeatures", TinyNet)
    return TinyNet()


def pictures(count, seed, size=16, smooth=True):
    """uint8 [count, size, size, 3]"""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    if smooth:
        return np.stack([np.asarray(Image.fromarray(x).resize((size, size))) for x in small])
    return rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_pictures(folder, array):
    folder.mkdir()
    for i, pixels in enumerate(array):
        Image.fromarray(pixels).save(folder / f"{i:06d}.png")
    return folder


def evaluate(tmp_path, *words):
    """The report of the entry, run in this process."""
    output = tmp_path / "scores.json"
    words = [*words, "--device", "cpu", "--output", output]
    evaluate_fid.main(evaluate_fid.parse_args([str(word) for word in words]))
    return json.loads(output.read_text())


def draws(*shape, seed=0, scale=1.0, shift=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale + shift


# -- Inception score --------------------------------------------------------------------------


def test_inception_score_of_known_logits():
    assert inception_score(torch.full((12, 7), 3.0)) == pytest.approx(1, abs=1e-12)
    separated = 1000 * torch.eye(7).repeat(3, 1)
    assert inception_score(separated) == pytest.approx(7, rel=1e-12)
    # Two of three images say a, one says b: exp of the entropy of (2/3, 1/3)
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert inception_score(separated[[0, 0, 1]]) == pytest.approx(math.exp(entropy), rel=1e-12)


def test_inception_score_is_the_mean_over_blocks_in_order():
    logits = draws(23, 5, scale=2)
    parts = [inception_score(part) for part in (logits[:10], logits[10:20], logits[20:])]
    assert inception_score(logits, block=10) == pytest.approx(np.mean(parts), rel=1e-12)
    assert inception_score(logits.flip(0), block=10) != pytest.approx(np.mean(parts), rel=1e-6)


def test_inception_score_equals_torch_fidelity():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = draws(60, 30, scale=3)
    theirs = isc_features_to_metric(logits, splits=4, shuffle=False)["inception_score_mean"]
    assert inception_score(logits, block=15) == pytest.approx(theirs, rel=1e-12)


# -- precision and recall ---------------------------------------------------------------------


def brute_force(reference, samples, k=3):
    """Precision and recall from all distances, one by one."""
    reference, samples = reference.double().numpy(), samples.double().numpy()

    def share_inside(queries, points):
        radii = [np.sort(((points - p) ** 2).sum(1))[k] for p in points]
        return np.mean([(((points - q) ** 2).sum(1) <= radii).any() for q in queries])

    return share_inside(samples, reference), share_inside(reference, samples)


@pytest.mark.parametrize("block", [5, 32, 4096])
@pytest.mark.parametrize("shift", [0.0, 3000.0])
def test_precision_and_recall_equal_brute_force_in_any_blocks(block, shift):
    # In float32, squared distances from so far away as 3000 are rounded to multiples of 8
    reference = draws(61, 6, seed=1, shift=shift)
    samples = draws(45, 6, seed=2, scale=0.8, shift=shift + 0.7)
    samples[:9] = reference[:9]  # on centres
    samples[9:14] = samples[8]  # six alike
    expected = brute_force(reference, samples)
    assert all(0.2 < value < 0.98 for value in expected)
    assert precision_recall(reference, samples, block=block) == expected
    assert precision_recall(samples, reference, block=block) == expected[::-1]


def test_a_query_on_the_rim_is_inside():
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0]]) + 0.25  # the outer radii are 3
    edge = torch.tensor([[-3.0], [6.0], [-3.0 - 1e-5], [6.0 + 1e-5]]) + 0.25
    assert precision_recall(line, edge)[0] == brute_force(line, edge)[0] == 0.5


def test_identical_sets_and_collapsed_generators():
    reference = draws(200, 16, seed=3)
    assert precision_recall(reference, reference.clone()) == (1, 1)
    alike = reference[:1].repeat(50, 1)
    assert precision_recall(alike, alike) == (1, 1)
    collapsed = reference[5] + 1e-3 * draws(100, 16, seed=4)
    precision, recall = precision_recall(reference, collapsed)
    assert precision == 1 and recall <= 0.01
    assert precision_recall(reference, alike) == (1, 1 / 200)  # a ball of radius 0 holds its centre
    far = reference + 1000
    assert precision_recall(reference, far) == (0, 0)


def test_precision_and_recall_equal_torch_fidelity():
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    reference, samples = draws(300, 24, seed=5), draws(250, 24, seed=6, scale=0.9)
    theirs = calculate_precision_recall_full(samples.double(), reference.double())
    assert precision_recall(reference, samples) == pytest.approx(theirs, rel=1e-6)


def test_too_few_points_have_no_manifold():
    with pytest.raises(ValueError, match="3 neighbours of each of 3 images.* at least 4"):
        precision_recall(draws(3, 2), draws(9, 2))


# -- standard errors --------------------------------------------------------------------------


def test_bootstrap_rescoring_is_that_of_the_resampled_rows():
    features, logits = draws(40, 3, seed=7), draws(40, 6, seed=8)
    mu, sigma = np.ones(3), np.diag([1.0, 2, 3])
    generator = torch.Generator().manual_seed(5)
    distances, scores = [], []
    for _ in range(4):
        drawn = torch.randint(40, (40,), generator=generator)
        rows = features[drawn].double().numpy()
        distances.append(frechet_distance(mu, sigma, rows.mean(0), np.cov(rows, rowvar=False)))
        scores.append(inception_score(logits[drawn]))
    found = bootstrap_frechet(mu, sigma, features, 4, seed=5)
    np.testing.assert_allclose(found, distances, rtol=1e-10)
    np.testing.assert_allclose(bootstrap_inception(logits, 4, seed=5), scores, rtol=1e-10)


def test_bootstrap_error_is_that_of_fresh_samples():
    mu, sigma = np.zeros(2), np.eye(2)

    def distance(rows):
        rows = rows.double().numpy()
        return frechet_distance(mu, sigma, rows.mean(0), np.cov(rows, rowvar=False))

    fresh = np.std([distance(draws(300, 2, seed=s, shift=1.0)) for s in range(200)])
    error = bootstrap_frechet(mu, sigma, draws(300, 2, seed=999, shift=1.0), 200).std().item()
    assert error == pytest.approx(fresh, rel=0.25)
    # Far away the distance is about |mu|^2, whose error is 2 |mu| / sqrt(N)
    far = bootstrap_frechet(mu, sigma, draws(300, 2, seed=9, shift=50.0), 200).std().item()
    assert far == pytest.approx(2 * math.hypot(50, 50) / math.sqrt(300), rel=0.15)


# -- one pass ---------------------------------------------------------------------------------


def measured_by(net, images, processes, batch_size, keep):
    """`measure` by threads that sum like processes; what each of them returns."""
    barrier = threading.Barrier(processes, timeout=20)
    slots, results = [None] * processes, [None] * processes

    def work(rank):
        def total(tensor):
            slots[rank] = tensor.clone()
            barrier.wait()
            summed = sum(slots[1:], slots[0])
            barrier.wait()
            return tensor.copy_(summed)

        mine = images[rank::processes].split(batch_size)
        batches = mine if len(images) > rank else ()
        results[rank] = measure(
            net, batches, len(images), "cpu", share=(rank, processes), total=total, keep=keep,
            logits=True,
        )  # fmt: skip

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("processes", [1, 2, 4, 15])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_processes_and_batches_change_nothing(processes, batch_size):
    images = torch.from_numpy(pictures(13, seed=0)).permute(0, 3, 1, 2)
    found = TinyNet().activations(images)
    for result in measured_by(TinyNet(), images, processes, batch_size, keep=5):
        assert result.count == 13
        for mu, sigma, rows in (
            (result.mu, result.sigma, found.features),
            (result.mu_s, result.sigma_s, found.spatial),
        ):
            np.testing.assert_allclose(mu, rows.double().mean(0), rtol=1e-6)
            np.testing.assert_allclose(sigma, np.cov(rows.double(), rowvar=False), rtol=1e-5)
        torch.testing.assert_close(result.features, found.features[[0, 2, 5, 7, 10]])
        torch.testing.assert_close(result.logits, found.logits)


def test_a_pass_that_ends_early_is_no_result():
    images = torch.from_numpy(pictures(5, seed=0)).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match="6 images were to come, 5 did"):
        measure(TinyNet(), [images], 6, "cpu")


# -- the entry --------------------------------------------------------------------------------


def test_all_scores_of_folders_archives_and_statistics_agree(tmp_path, tiny):
    reference = write_pictures(tmp_path / "reference", pictures(40, seed=1))
    samples = write_pictures(tmp_path / "samples", pictures(37, seed=2) // 4 * 3)
    ours = tmp_path / "ours.npz"
    first = evaluate(tmp_path, reference, samples, "--protocol", "adm", "--save-stats", ours)
    assert list(first["metrics"]) == ["fid", "sfid", "is", "precision", "recall"]
    one, two = (
        TinyNet().activations(torch.from_numpy(array).permute(0, 3, 1, 2))
        for array in (pictures(40, seed=1), pictures(37, seed=2) // 4 * 3)
    )
    moments = [
        [rows.double().mean(0).numpy(), np.cov(rows.double(), rowvar=False)]
        for rows in (one.features, two.features, one.spatial, two.spatial)
    ]
    precision, recall = brute_force(one.features, two.features)
    assert 0 < precision < 1 and 0 < recall < 1 and precision != recall
    assert first["metrics"] == pytest.approx(
        {
            "fid": frechet_distance(*moments[0], *moments[1]),
            "sfid": frechet_distance(*moments[2], *moments[3]),
            "is": inception_score(two.logits),
            "precision": precision,
            "recall": recall,
        },
        rel=1e-5,
    )
    # Our statistics file stands for the folder, and so does an archive as ADM's are.
    adm = tmp_path / "adm.npz"
    with np.load(ours) as made:
        moments = {name: made[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(adm, **moments, arr_0=pictures(40, seed=1))
    for file in (ours, adm):
        again = evaluate(tmp_path, file, samples, "--protocol", "adm", "--batch-size", 7)
        assert again["metrics"] == pytest.approx(first["metrics"], rel=1e-6)
        assert again["why_null"] == {} and again["num_reference_manifold"] == 40
    # Swapped, precision and recall change places; fewer reference images are spread evenly.
    swapped = evaluate(tmp_path, samples, reference, "--manifold-images", 20)["metrics"]
    assert swapped["fid"] == pytest.approx(first["metrics"]["fid"], rel=1e-6)
    swapped = evaluate(tmp_path, samples, reference)["metrics"]
    assert (swapped["precision"], swapped["recall"]) == (recall, precision)
    half = evaluate(tmp_path, reference, samples, "--manifold-images", 20)
    assert half["num_reference_manifold"] == 20
    expected = brute_force(one.features[::2], two.features)
    assert (half["metrics"]["precision"], half["metrics"]["recall"]) == expected


def test_what_a_reference_cannot_tell_is_null_and_says_why(tmp_path, tiny, capsys):
    samples = write_pictures(tmp_path / "samples", pictures(9, seed=2))
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(8), sigma=np.eye(8))
    report = evaluate(tmp_path, tmp_path / "foreign.npz", samples, "--protocol", "pytorch-fid")
    assert [name for name, value in report["metrics"].items() if value is None] == [
        "sfid", "precision", "recall",
    ]  # fmt: skip
    assert report["num_reference"] is None and report["num_reference_manifold"] is None
    out = capsys.readouterr().out
    for name, word in (("sfid", "no mu_s"), ("precision", "no images"), ("recall", "no images")):
        assert word in report["why_null"][name] and f"no {name}: " in out
    few = write_pictures(tmp_path / "few", pictures(3, seed=2))
    report = evaluate(tmp_path, samples, few)
    assert report["metrics"]["precision"] is None and "at least 4" in report["why_null"]["recall"]
    np.savez(tmp_path / "odd.npz", mu=np.zeros(8), sigma=np.eye(8), mu_s=np.zeros(7), sigma_s=1)
    with pytest.raises(ValueError, match=r"odd.npz: mu_s and sigma_s have .*\[6\] and \[6, 6\]"):
        evaluate(tmp_path, tmp_path / "odd.npz", samples)


def test_standard_errors_are_reported_beside_the_scores(tmp_path, tiny, capsys):
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(8), sigma=np.eye(8))
    samples = write_pictures(tmp_path / "samples", pictures(30, seed=2))
    report = evaluate(tmp_path, tmp_path / "foreign.npz", samples, "--bootstrap", 8)
    assert set(report["standard_errors"]) == {"fid", "is"} and report["bootstrap"] == 8
    assert all(0 < error < 1 for error in report["standard_errors"].values())
    out = capsys.readouterr().out
    assert f"{report['metrics']['is']:.4f} ± {report['standard_errors']['is']:.4f}" in out
    with pytest.raises(SystemExit):
        evaluate(tmp_path, tmp_path / "foreign.npz", samples, "--bootstrap", 1)


def test_small_and_odd_counts_are_doubted():
    net = TinyNet()
    assert not find_doubts(net, 40, 10_000, None)
    assert any("31 samples for 8 features" in line for line in find_doubts(net, 40, 31, None))
    assert any("the last of which has 1," in line for line in find_doubts(net, 40, 5001, None))
    assert not find_doubts(net, None, 4999, None)


# -- Inception against torch-fidelity ----------------------------------------------------------


def test_legacy_resize_equals_torch_fidelity_and_differs_from_half_pixel():
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x,
    )

    for height, width in ((256, 256), (37, 64), (512, 300)):
        x = torch.from_numpy(
            np.random.default_rng(0).integers(0, 256, (1, 3, height, width), dtype=np.uint8)
        ).float()
        theirs = interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False)
        torch.testing.assert_close(legacy_resize(x, 299), theirs, rtol=0, atol=1e-4)
    # On a ramp of one level a pixel, half-pixel sampling reads (1 - 256 / 299) / 2 levels lower
    ramp = torch.arange(256.0).expand(1, 1, 256, 256)
    other = F.interpolate(ramp, (299, 299), mode="bilinear", align_corners=False)
    difference = (legacy_resize(ramp, 299) - other)[0, 0, :, 1:-2]
    expected = torch.full_like(difference, (1 - 256 / 299) / 2)
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-4)


def test_adm_features_and_logits_equal_torch_fidelity(inception_weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = torch.from_numpy(pictures(3, seed=0, size=40, smooth=False)).permute(0, 3, 1, 2)
    theirs = FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=inception_weights
    )
    features, logits = theirs(images)
    net = InceptionFeatures("adm", inception_weights)
    ours = net.activations(images)
    for mine, other in ((ours.features, features), (ours.logits, logits)):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
    # The spatial features are rows, columns, 7 channels of Mixed_6d.branch1x1
    seen = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda *parts: seen.append(parts[2]))
    theirs(images)
    assert seen[0].shape == (3, 192, 17, 17) and ours.spatial.shape == (3, 2023)
    at = ours.spatial.reshape(3, 17, 17, 7)
    expected = seen[0][:, :7].permute(0, 2, 3, 1)
    torch.testing.assert_close(at, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert prepare(images, "adm").shape == (3, 3, 299, 299)


@pytest.mark.slow
def test_scores_of_folders_equal_both_other_tools(tmp_path, inception_weights, monkeypatch):
    """FID and Inception score of torch-fidelity, FID of pytorch-fid, end to end."""
    import torch_fidelity
    from pytorch_fid import fid_score, inception

    reference = write_pictures(tmp_path / "reference", pictures(14, seed=1, size=48))
    samples = write_pictures(tmp_path / "samples", pictures(12, seed=2, size=48) // 4 * 3)
    common = ("--inception-weights", inception_weights)
    ours = evaluate(tmp_path, reference, samples, "--protocol", "adm", *common)["metrics"]
    theirs = torch_fidelity.calculate_metrics(
        input1=str(samples), input2=str(reference), cuda=False, isc=True, fid=True,
        isc_splits=1, feature_extractor_weights_path=str(inception_weights), cache=False,
        verbose=False, batch_size=4, samples_shuffle=False,
    )  # fmt: skip
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert ours["is"] > 1.2
    state = torch.load(inception_weights, weights_only=True)
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: state)
    expected = fid_score.calculate_fid_given_paths(
        [str(reference), str(samples)], 4, "cpu", 2048, num_workers=0
    )
    found = evaluate(tmp_path, reference, samples, "--protocol", "pytorch-fid", *common)["metrics"]
    assert found["fid"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_inception_scores_do_not_depend_on_processes(tmp_path, inception_weights, processes):
    reference = write_pictures(tmp_path / "reference", pictures(9, seed=1, size=48))
    samples = write_pictures(tmp_path / "samples", pictures(7, seed=2, size=48))
    flags = ("--inception-weights", inception_weights, "--protocol", "adm")
    one = evaluate(tmp_path, reference, samples, *flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", REPOSITORY / "evaluate_fid.py", reference, samples]
    command += [*flags, "--device", "cpu", "--batch-size", "2", "--output", tmp_path / "many.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([str(word) for word in command], check=True, env=environment, cwd=tmp_path)
    many = json.loads((tmp_path / "many.json").read_text())
    assert many["metrics"] == pytest.approx(one["metrics"], rel=1e-6)


@pytest.mark.slow
def test_benchmark_of_an_evaluation_scores_what_it_makes(tmp_path):
    folder, figures = tmp_path / "made", tmp_path / "figures.json"
    flags = ["--samples", 9, "--reference", 6, "--image-size", 32, "--device", "cpu"]
    run("scripts/benchmark_evaluation.py", *flags, "--folder", folder, "--json", figures)
    found = json.loads(figures.read_text())
    assert found["metrics"].keys() == {"fid", "sfid", "is", "precision", "recall"}
    assert all(isinstance(value, float) for value in found["metrics"].values())
    assert {"evaluate_fid.py, samples", "evaluate_fid.py, samples.npz"} < found["seconds"].keys()
    assert not folder.exists()
    (folder / "earlier").mkdir(parents=True)
    error = run("scripts/benchmark_evaluation.py", "--folder", folder, fails=True)
    assert "made is there already" in error and (folder / "earlier").is_dir()
