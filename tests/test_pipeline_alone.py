"""Entries that need no selection before them: distillation, and what samples are worth."""

import json
import shutil

import numpy as np
import yaml
from entries import REPOSITORY, draw_samples, finetune, run


def test_rank_one_is_heard(work):
    """A picture that only the second process reads is named."""
    folder = work / "odd"
    folder.mkdir()
    pictures = sorted((work / "images").rglob("*.png"))[:4]
    for i, picture in enumerate(pictures):
        shutil.copy(picture, folder / f"{i}.png")
    (folder / "1.png").write_bytes(b"no picture")
    command = ["evaluate_fid.py", work / "images", folder, "--feature-net", "mini"]
    assert "1.png" in run(*command, processes=2, fails=True)


def test_two_processes_distill_like_one(work):
    found = []
    for name, processes in (("distill1", 0), ("distill2", 2)):
        run(
            "distill_operators.py", "--config", "configs/mini/75p_hyena_y.yaml", "--prefix", name,
            "--data-path", work / "latents", "--results-dir", work / "runs", "--max-steps", 2,
            "--num-samples", 16, "--val-samples", 1, "--global-batch-size", 4, "--log-every", 1,
            processes=processes,
        )  # fmt: skip
        folder = work / "runs" / f"{name}-DiT-Mini-2"
        assert len(list((folder / "operators").glob("*.pt"))) == 21
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append(
            [v for line in lines for k, v in sorted(line.items()) if "loss/" in k or "/block" in k]
        )
    assert len(found[0]) == (2 + 2 * 2) * 21  # two steps, and two validations, of one rank alone
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


def test_trained_grafts_score_far_better_than_fresh_ones(work):
    """The same 50 % graft: attention inherited and finetuned a little, and operators untrained."""
    content = yaml.safe_load((REPOSITORY / "configs/mini/75p_swa.yaml").read_text())
    content["operator"]["config_filepath"] = str(REPOSITORY / "configs/mini/swa.yaml")
    content["sample_config"]["graft_indexes"] = list(range(1, 28, 2))
    score = ["evaluate_fid.py", "--feature-net", "mini"]
    run(*score, work / "all/train", "--save-stats", work / "train.npz")
    scores = {}
    for init in ("inherit", "fresh"):
        content["sample_config"]["graft_init"] = init
        path = work / f"{init}.yaml"
        path.write_text(yaml.safe_dump(content))
        weights = ["--allow-untrained"]
        if init == "inherit":
            finetune(work, "little", "--config", path, "--max-steps", 40, "--lr", 3e-4,
                     "--ema-decay", 0.9, "--global-batch-size", 9, "--log-every", 10)  # fmt: skip
            trained = work / "runs/little-DiT-Mini-2/checkpoints/0000040.pt"
            weights = ["--graft-fusion-ckpt-path", trained]
        draw_samples(work, init, "--config", path, "--num-sampling-steps", 8, *weights,
                     "--num-fid-samples", 48, "--labels", "balanced")  # fmt: skip
        run(*score, work / "train.npz", work / "samples" / init)
        metrics = json.loads((work / "samples" / init / "metrics.json").read_text())
        scores[init] = metrics["metrics"]["fd_mini"]
    assert scores["fresh"] > 2 * scores["inherit"], scores
