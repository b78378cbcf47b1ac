r"""Measures how many images a second the latent loader delivers alone, from disk and from memory.

Inputs:  a latent store; or --make N, which first writes one of N random images at --data-path:
         moments [2, 8, 32, 32] in float16, 32 KiB an image, as DiT at 256 pixels has them.
Outputs: one line a pass: cold, once the system has been asked to forget the files, and warm.

    python scripts/loader_speed.py --data-path /tmp/latents --make 65536 --global-batch-size 256
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from latents.codec import PUBLISHED_SCALE
from latents.loader import LatentLoader
from latents.store import StoreWriter, open_latents
from training import arguments, distributed

SHARD = 8192  # images, as extract_features.py has it


def main(args: argparse.Namespace) -> None:
    world = distributed.start("cpu")
    folder = Path(args.data_path)
    if args.make is not None:
        make(folder, args.make)
    store = open_latents(folder)
    for state in ("cold", "warm"):
        loader = LatentLoader(
            store, args.global_batch_size, world, args.global_seed, num_workers=args.num_workers
        )
        if state == "cold":
            forget(folder)
        steps = loader.steps_per_epoch if args.max_steps is None else args.max_steps
        began, size = time.perf_counter(), 0
        for batch in loader:
            if batch.step == steps:
                break
            size += batch.moments.nbytes
        took = time.perf_counter() - began
        images = steps * args.global_batch_size
        print(
            f"{state}: {images / took:,.0f} images/s, {size / took / 2**20:,.0f} MiB/s ({images:,} "
            f"images in random order, {args.num_workers} threads, batch {args.global_batch_size})"
        )
    distributed.stop()


def make(folder: Path, images: int) -> None:
    """Writes a store of random moments, a shard at a time."""
    settings = {
        "kind": "moments",
        "count": images,
        "shard_size": SHARD,
        "shape": [4, 32, 32],
        "dtype": "float16",
        "mirrors": 2,
        "vae": "random numbers",
        "vae_sha256": "",
        "scale": PUBLISHED_SCALE,
        "image_size": 256,
        "crop": "none",
        "class_names": [str(i) for i in range(1000)],
    }
    writer = StoreWriter(folder, settings)
    missing = writer.missing(range(writer.num_shards))
    writer.begin(missing)
    for shard in missing:
        rows = np.arange(len(writer.rows(shard)))
        moments = np.random.default_rng(shard).normal(size=(len(rows), 2, 8, 32, 32))
        writer.write_shard(shard, moments.astype(np.float16), rows % 1000, [])
    writer.finish()


def forget(folder: Path) -> None:
    """Asks the system to drop the store's files from its memory, as if they had not been read."""
    for path in folder.rglob("*.npy"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def parse_args() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--data-path", required=True, help="latent store, from extract_features.py")
    add("--make", type=arguments.positive, metavar="N", help="write N random images there first")
    add("--global-batch-size", type=arguments.positive, default=256, help="images a step")
    add("--global-seed", type=arguments.seed, default=0, help="of the order")
    add("--num-workers", type=arguments.positive, default=4, help="reader threads")
    add("--max-steps", type=arguments.positive, help="stop earlier than after one epoch")
    return parser.parse_args()


if __name__ == "__main__":
    distributed.run(main, parse_args())
