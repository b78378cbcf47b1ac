r"""Encodes an image folder once: the VAE's posterior moments of every image and its mirror.

Inputs:  an image folder, <data-path>/<class>/<picture>, and a VAE (ema, mse, sdxl or a diffusers
         folder). With --captions, pictures anywhere below <data-path> and a text encoder.
Outputs: <features-path>/manifest.json, shards/ and log.txt: the latent store that
         finetune_tinyfusion.py and the other trainers read (latents/store.py describes it); with
         --captions also captions/, every caption's embedding once (latents/captions.py).

    torchrun --nnodes=1 --nproc_per_node=8 extract_features.py \
        --data-path /data/imagenet/train --features-path data/imagenet_encoded

Moments are stored, not samples: training draws a new latent from the posterior, and one of the two
mirrors, in every epoch. The bytes do not depend on the number of processes (on one kind of device,
all with --compile or none). A run that was cut short goes on where it stopped: repeat the command.
With --verify a finished store is checked instead. The same command runs without torchrun, on CPU or
GPU; several nodes need a shared --features-path.
"""

import argparse
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from latents import group_norm
from latents.captions import FOLDER, CaptionWriter, read_captions
from latents.captions import describe as describe_captions
from latents.codec import Codec, encode_rows, load_codec
from latents.images import CaptionedImages, LabelledImages, collate
from latents.store import StoreWriter, joined, open_latents
from latents.text import load_text_encoder
from models.presets import MAX_TOKENS
from models.provenance import usable_cpus
from training import arguments, distributed, precision
from training.extraction import begin, embed_captions
from training.runlog import RunLog, watched


def main(args: argparse.Namespace) -> None:
    # Processes, pictures, VAE: all that can be wrong before any work starts
    world = distributed.start(args.device, timeout_minutes=240)
    if args.verify:
        verify(args.features_path, world)
        return
    dtype = precision.choose(args.precision, world.device)
    precision.allow_tf32(dtype != torch.float32)
    if args.captions is None:
        for flag, value in (
            ("--text-encoder", args.text_encoder),
            ("--max-tokens", args.max_tokens),
        ):
            if value is not None:
                raise ValueError(f"{flag} {value} is of captions: add --captions, or leave it out")
        pictures = LabelledImages(args.data_path, args.image_size)
    else:
        args.text_encoder = args.text_encoder or "t5"
        args.max_tokens = args.max_tokens or MAX_TOKENS
        source = f"--captions {args.captions}"
        found = read_captions(args.captions)
        pictures = CaptionedImages(args.data_path, args.image_size, found, source)
        args.no_mirror = True  # a mirror image belies what is left or right of what
    classes = len(pictures.class_names)
    if classes > args.num_classes:
        raise ValueError(
            f"--data-path {args.data_path} has {classes} class folders, more than --num-classes "
            f"{args.num_classes}; raise it or choose another folder"
        )
    codec = load_codec(args.vae, world.device, dtype)
    if args.image_size % codec.downsample:
        raise ValueError(
            f"--image-size {args.image_size} is not divisible by {codec.downsample}, the "
            f"downsampling of --vae {args.vae}"
        )
    paths = group_norm.accelerate(codec.vae, world.device, dtype, args.kernels)
    mirrors = 1 if args.no_mirror else 2
    if args.compile:
        largest = min(args.global_batch_size, args.shard_size, len(pictures))
        codec = codec.compiled(largest * mirrors, args.image_size)

    encoder = table = None
    if args.captions is not None:
        encoder = load_text_encoder(args.text_encoder, args.max_tokens, world.device, dtype)
        table = CaptionWriter(
            Path(args.features_path) / FOLDER, describe_captions(pictures.texts, encoder)
        )

    # Store: what is there already is checked, what is missing is shared out
    writer = StoreWriter(args.features_path, describe(args, pictures, codec, dtype, mirrors))
    missing = begin(writer, world)
    log = RunLog(args.features_path, world, vars(args), tensorboard=False)
    more = {}
    if table is not None:
        more = embed_captions(table, pictures, encoder, world, log)
        del encoder
    about = f"classes {classes}" if table is None else f"captions {len(pictures.texts) - 1:,}"
    log.info(
        f"{args.data_path}: images {len(pictures):,}, {about}, shards "
        f"{writer.num_shards}, of these to do {len(missing)}, on {world.size} x "
        f"{world.device.type}, {dtype}"
    )
    for line in paths:
        log.info(line)
    if table is None and classes < args.num_classes:
        log.info(f"class folders {classes}, fewer than --num-classes {args.num_classes}: a subset?")

    # Encoding: batches never cross a shard, so a shard's bytes depend on its pictures alone
    batches = [
        (shard, rows[first : first + args.global_batch_size])
        for shard in missing[world.rank :: world.size]
        for rows in [writer.rows(shard)]
        for first in range(0, len(rows), args.global_batch_size)
    ]
    loader = DataLoader(
        pictures,
        batch_sampler=[list(rows) for _, rows in batches],
        num_workers=min(args.num_workers, len(batches), usable_cpus()),
        collate_fn=collate,
        pin_memory=world.device.type == "cuda",
    )
    bar = tqdm(total=sum(len(rows) for _, rows in batches), disable=not watched(world), unit="img")
    arrays, labels, skipped = [], [], []
    sample_seed = args.global_seed if args.storage == "sample" else None
    done, counted, since = 0, 0, time.perf_counter()
    for step, ((shard, rows), batch) in enumerate(zip(batches, loader, strict=True), start=1):
        images, batch_labels, positions, errors = batch
        if errors and args.on_error == "fail":
            raise ValueError(
                f"{errors[0]}; replace it or pass --on-error skip (what is encoded stays; repeat "
                "the command to go on)"
            )
        skipped += errors
        if len(images):
            arrays.append(encode_rows(codec, images, positions, mirrors, sample_seed))
            labels.append(batch_labels)
        if rows[-1] == writer.rows(shard)[-1]:
            writer.write_shard(shard, *joined(arrays, labels, writer.settings), skipped)
            arrays, labels, skipped = [], [], []
        done += len(rows)
        bar.update(len(rows))
        if step % args.log_every == 0 or step == len(batches):
            now = time.perf_counter()
            rate = (done - counted) / (now - since)
            log.info(
                f"rank 0: images {done:,}; about {rate * world.size:.1f} a second over all ranks"
            )
            log.metrics(step, rank_0_images=done, images_per_second=rate * world.size)
            counted, since = done, now
    bar.close()

    # Manifest last: from here on the folder is a store
    distributed.barrier(world)
    if world.main:
        manifest = writer.finish(**more)
        log.info(f"{args.features_path}/manifest.json: images {manifest['count']:,}")
        for sentence in manifest["skipped"]:
            log.info(f"skipped: {sentence}")
    distributed.barrier(world)
    log.close()
    distributed.stop()


def verify(path: str, world: distributed.World) -> None:
    """Checks a finished store's shards, shared out over the processes, against their sha256."""
    store, fault = open_latents(path), None
    try:
        store.verify(world.rank, world.size)
    except ValueError as error:
        fault = str(error)
    faults = [found for found in distributed.gather_objects(world, fault) if found is not None]
    distributed.stop()
    if faults:
        raise ValueError("; ".join(faults))
    if world.main:
        print(f"{path}: all shards are whole ({len(store):,} images)")


def describe(
    args: argparse.Namespace,
    pictures: LabelledImages,
    codec: Codec,
    dtype: torch.dtype,
    mirrors: int,
) -> dict:
    """What the manifest says of the whole store, and what a restart must agree with."""
    side = args.image_size // codec.downsample
    return {
        "kind": args.storage,
        "count": len(pictures),
        "shard_size": args.shard_size,
        "shape": [codec.channels, side, side],
        "dtype": "float16",
        "mirrors": mirrors,
        "vae": codec.id,
        "vae_sha256": codec.sha256,
        "scale": codec.scale,
        "image_size": args.image_size,
        "crop": "adm-center",
        "precision": str(dtype).removeprefix("torch."),
        "seed": args.global_seed if args.storage == "sample" else None,
        "listing_sha256": pictures.listing_sha256(),
        "class_names": pictures.class_names,
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data-path", help="image folder, <class>/<picture> below it")
    add(
        "--captions",
        help='JSONL of {"file_name": picture below --data-path, "caption" or "text": ...}, for '
        "text-to-image models; the folders are no classes then",
    )
    add("--features-path", default="features", help="latent store to write")
    add("--image-size", type=arguments.positive, default=256, help="side of the crop, pixels")
    add(
        "--num-classes",
        type=arguments.positive,
        default=1000,
        help="classes of the model to come; more class folders are an error",
    )
    add(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="unreadable pictures: end the run naming the file, or leave it out and list it in "
        "the manifest",
    )
    add(
        "--verify",
        action="store_true",
        help="encode nothing; check the store at --features-path against its checksums",
    )
    add = parser.add_argument_group("encoding").add_argument
    add(
        "--vae",
        default="ema",
        help="ema, mse, sdxl (stabilityai/sd-vae-ft-*, sdxl-vae, from pretrained/ or the hub) or a "
        "diffusers AutoencoderKL folder",
    )
    add(
        "--text-encoder",
        help="of the captions: t5 (PixArt-Sigma's, from pretrained/ or the hub; so if unset) or a "
        "folder with text_encoder/ and tokenizer/",
    )
    add(
        "--max-tokens",
        type=arguments.positive,
        help=f"captions are cut there (unset: {MAX_TOKENS})",
    )
    add(
        "--no-mirror",
        action="store_true",
        help="store the images only, half the space; always so with --captions",
    )
    add(
        "--storage",
        choices=("moments", "sample"),
        default="moments",
        help="sample: one scaled draw an image and mirror, half the space, frozen for good",
    )
    add("--shard-size", type=arguments.positive, default=8192, help="images a shard")
    add(
        "--global-batch-size",
        type=arguments.positive,
        default=256,
        help="images in one batch; every process takes batches of this size, so that the result "
        "does not depend on their number",
    )
    add("--global-seed", type=arguments.seed, default=0, help="of the draws of --storage sample")
    add(
        "--precision",
        choices=("bf16", "fp32"),
        help="of the VAE (unset: bf16 on CUDA, fp32 elsewhere)",
    )
    add("--device", help="cuda, cuda:1 or cpu (unset: CUDA where there is any)")
    add(
        "--num-workers",
        type=arguments.nonnegative,
        default=4,
        help="decoding processes a rank; 0: the rank itself",
    )
    arguments.add_compile(add)
    arguments.add_kernels(add)
    add("--log-every", type=arguments.positive, default=100, help="batches between log lines")
    add = parser.add_argument_group(
        "accepted so that old commands run, and without effect on an extraction"
    ).add_argument
    add("--model", help="the latents serve every model of their size")
    add("--results-dir", help="the log goes to --features-path")
    add("--epochs", type=int, help="every image is encoded once")
    add("--ckpt-every", type=int, help="every shard is a restart point")
    args = parser.parse_args(argv)
    if args.data_path is None and not args.verify:
        parser.error("--data-path is required")
    return args


if __name__ == "__main__":
    distributed.run(main, parse_args())
