"""How long evaluate_fid.py takes from end to end, on images and weights that are made here.

    python scripts/benchmark_evaluation.py --json evaluation.json
    python scripts/benchmark_evaluation.py --samples 200 --reference 100 --device cpu

Makes --samples PNGs as sampling writes them, the .npz of the same images, and a REFERENCE with mu,
sigma, mu_s, sigma_s and arr_0, as ADM's is; then scores the folder and the .npz, one command each
and all five scores, and prints the seconds by the clock from the start of a command to its end.
Random numbers stand in for Inception's weights: the time is the same, the scores mean nothing.
50 000 images of 256 pixels and 10 000 of the reference take 18 GB in --folder, which is deleted at
the end.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.inception import PROTOCOLS, REPOSITORY, InceptionFeatures
from evaluation.writers import save_npz, save_png
from models.files import write_whole
from models.provenance import environment
from training import arguments, distributed

# Sizes of the patches of a picture, and how far their grey levels reach: a PNG then has about as
# many bytes as one of a photograph of that size
PATCHES = ((4, 60), (16, 35), (64, 15))
NOISE = 6


def main(args: argparse.Namespace) -> None:
    work = args.folder
    if work.exists():
        raise ValueError(f"--folder {work} is there already: delete it, or choose another")
    seconds = {}

    def timed(name: str, job: Callable):
        began = time.perf_counter()
        result = job()
        seconds[name] = round(time.perf_counter() - began, 2)
        print(f"{name:30s} {seconds[name]:8.2f} s", flush=True)
        return result

    try:
        samples, weights, size = work / "samples", work / "random.pth", args.image_size
        packed = samples.with_suffix(".npz")

        def make(place: Path, count: int, seed: int) -> list[Path]:
            place.mkdir(parents=True)
            with multiprocessing.get_context("fork").Pool(args.processes) as pool:
                pool.map(partial(write_picture, place, size, seed), range(count), chunksize=32)
            return sorted(place.iterdir())

        files = timed("making the PNGs", lambda: make(samples, args.samples, 0))
        timed("packing them into the .npz", lambda: save_npz(packed, files, args.num_workers))
        others = timed("making PNGs of the reference", lambda: make(work / "r", args.reference, 1))
        timed("its .npz", lambda: write_reference(work / "r.npz", others))
        write_random_inception(weights)
        command = [sys.executable, str(REPOSITORY / "evaluate_fid.py"), str(work / "r.npz")]
        flags = ["--inception-weights", weights, "--protocol", args.protocol]
        flags += ["--num-workers", args.num_workers]
        flags += ["--device", args.device] if args.device else []
        reports = []
        for place in (samples, packed):
            output = work / f"{place.name}.json"
            ran = [*command, str(place), *map(str, flags), "--output", str(output)]
            timed(f"evaluate_fid.py, {place.name}", partial(subprocess.run, ran, check=True))
            reports.append(json.loads(output.read_text())["metrics"])
        for name, value in reports[0].items():
            if not math.isclose(value, reports[1][name], rel_tol=1e-6):
                raise RuntimeError(f"{name}: {value} of the folder, {reports[1][name]} of the .npz")
        result = {
            "samples": args.samples,
            "reference": args.reference,
            "image_size": size,
            "png_bytes": round(sum(f.stat().st_size for f in files) / len(files)),
            "protocol": args.protocol,
            "cores": os.cpu_count(),
            "num_workers": args.num_workers,
            "device": args.device or "unset",
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "seconds": seconds,
            "metrics": reports[0],
            **environment(),
        }
        print(json.dumps(result))
        if args.json:
            args.json.write_text(json.dumps(result, indent=2) + "\n")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_picture(folder: Path, size: int, seed: int, number: int) -> None:
    """One PNG of soft patches and a little noise, a function of seed and number."""
    generator = np.random.default_rng((seed, number))
    total = np.full((size, size, 3), 127.5, np.float32)
    for side, reach in PATCHES:
        patches = Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
        smooth = patches.resize((size, size), Image.Resampling.BICUBIC)
        total += (np.asarray(smooth, np.float32) / 127.5 - 1) * reach
    total += generator.integers(-NOISE, NOISE + 1, (size, size, 3), dtype=np.int8)
    save_png(folder / f"{number:06d}.png", total.clip(0, 255).astype(np.uint8))


def write_reference(path: Path, files: list[Path]) -> None:
    """An .npz with the images, and random means and covariances of Inception's sizes."""
    packed = path.with_name("images.npz")
    save_npz(packed, files)
    arrays, generator = {}, torch.Generator().manual_seed(0)
    sizes = (("", InceptionFeatures.dim), ("_s", InceptionFeatures.spatial_dim))
    for suffix, dim in sizes:
        root = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
        arrays["mu" + suffix] = torch.rand(dim, generator=generator).numpy()
        arrays["sigma" + suffix] = (root @ root.T).numpy()
    with np.load(packed, allow_pickle=False) as images:
        np.savez(path, **arrays, arr_0=images["arr_0"])
    packed.unlink()


def write_random_inception(path: Path, seed: int = 0) -> None:
    """A weight file of pytorch-fid's network with random weights that keep the signal alive."""
    from pytorch_fid import inception

    torch.manual_seed(seed)
    blank = mock.Mock(return_value=None)
    with (
        mock.patch.object(inception, "load_state_dict_from_url", blank),
        mock.patch.object(torch.nn.Module, "load_state_dict", lambda *_: None),
    ):
        net = inception.fid_inception_v3()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    net.fc.weight.data *= 200  # so that images differ in their likeliest class
    write_whole(path, partial(torch.save, net.state_dict()))


def parse_args() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    cores = os.cpu_count() or 1
    add = parser.add_argument
    add("--samples", type=arguments.positive, default=50_000, help="images to be scored")
    add("--reference", type=arguments.positive, default=10_000, help="images of the reference")
    add("--image-size", type=arguments.positive, default=256, help="pixels")
    add("--protocol", choices=PROTOCOLS, default="adm", help="of Inception")
    add("--device", help="cuda, cuda:1 or cpu (unset: CUDA where there is any)")
    add("--num-workers", type=arguments.positive, default=min(8, cores), help="reading threads")
    add("--processes", type=arguments.positive, default=cores, help="that make the pictures")
    add("--folder", type=Path, default=Path("runs/benchmark_evaluation"), help="to be made")
    add("--json", type=Path, help="the figures as a file (unset: none)")
    return parser.parse_args()


if __name__ == "__main__":
    distributed.run(main, parse_args())
