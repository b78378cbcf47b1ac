"""Fixtures shared by the test files."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from entries import encode, run

from scripts.benchmark_evaluation import write_random_inception

torch.set_num_threads(1)  # a process forked from one with OpenMP's threads would wait for them

GOLDEN = Path(__file__).parent / "golden"


def _load_fill():
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden():
    """Opens one group of golden outputs: `doc, arrays, fill = golden("hyena")`.

    doc: the group's JSON; arrays: dict of its numpy arrays (empty for `state_dicts`); fill: the
    module that draws weights and inputs by name.
    """
    fill = _load_fill()

    def open_group(group):
        doc = json.loads((GOLDEN / f"{group}.json").read_text())
        path = GOLDEN / f"{group}.npz"
        arrays = {}
        if path.exists():
            with np.load(path) as stored:
                arrays = {key: stored[key] for key in stored.files}
        return doc, arrays, fill

    return open_group


@pytest.fixture(scope="session")
def write_latents():
    """Writes random latents of 4x8x8 into a folder, in the layout of one file a picture.

    `write_latents(folder, 12, classes=3)`; image i is of class i % classes.
    """

    def write(folder, count, classes, mirrors=2):
        generator = np.random.default_rng(0)
        for name in ("imagenet256_features", "imagenet256_labels"):
            (folder / name).mkdir(parents=True)
        for i in range(count):
            latents = generator.normal(size=(mirrors, 4, 8, 8)).astype(np.float32)
            np.save(folder / "imagenet256_features" / f"{i}.npy", latents)
            np.save(folder / "imagenet256_labels" / f"{i}.npy", np.array([i % classes]))
        return folder

    return write


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with 36 pictures (4 a class) and their latents, encoded by two processes."""
    folder = tmp_path_factory.mktemp("pipeline")
    run("scripts/unpack_mini.py", "--out", folder / "all")
    for kind in sorted((folder / "all" / "train").iterdir()):
        (folder / "images" / kind.name).mkdir(parents=True)
        for picture in sorted(kind.iterdir())[:4]:
            shutil.copy(picture, folder / "images" / kind.name)
    encode(folder, "latents", processes=2)
    return folder


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """Random Inception weights that keep the signal alive through all layers."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    write_random_inception(path)
    return path
