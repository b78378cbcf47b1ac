"""The classes of sampled images, from a file."""

from pathlib import Path

import numpy as np
import torch

from models.files import read_lines

LABELS = ("random", "balanced")  # else a file


def read_labels(path: str, count: int, num_classes: int) -> torch.Tensor:
    """The classes of images 0, 1, ... in a file, one whole number a line or a .npy; int64 [N].

    Raises:
        FileNotFoundError, ValueError: no such file; something else in it; fewer labels than
            `count`, or one outside the classes.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"--labels {path}: no such file; use {', '.join(LABELS)} or a file of labels"
        )
    form = "needs one whole number a line, or a .npy of whole numbers [N]"
    binary = path.endswith(".npy")
    lines = [] if binary else read_lines(path, "--labels")
    try:
        labels = np.load(path, allow_pickle=False) if binary else np.array(list(map(int, lines)))
    except (ValueError, EOFError) as error:
        raise ValueError(f"--labels {path}: {form} ({error})") from error
    if labels.ndim != 1 or (labels.dtype.kind not in "iu" and len(labels)):
        raise ValueError(f"--labels {path}: {form}, holds {labels.dtype} {list(labels.shape)}")
    if len(labels) < count:
        raise ValueError(
            f"--labels {path}: {len(labels)} labels for {count} images: add some, or lower "
            "--num-fid-samples"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise ValueError(
            f"--labels {path}: label {labels[wrong[0]]} of image {wrong[0]} is outside the "
            f"{num_classes} classes, 0 to {num_classes - 1}"
        )
    return torch.from_numpy(labels.astype(np.int64))
