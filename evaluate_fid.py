"""Scores generated images against a reference: FID, sFID, IS, precision, recall in one pass.

Inputs:  REFERENCE, an .npz with mu and sigma (ADM's reference batch, pytorch-fid's, or one that
         --save-stats made), an image folder, or an .npz with arr_0; SAMPLES, an image folder or
         an .npz with arr_0. Folders are read with all folders below them.
Outputs: <SAMPLES>/metrics.json where SAMPLES is a folder with samples.json, else
         <SAMPLES>.metrics.json beside the folder or <name>.npz: the scores and all that they
         depend on; a table row; with --save-stats the statistics of REFERENCE as an .npz, for
         which SAMPLES may be left out.

    python evaluate_fid.py VIRTUAL_imagenet256_labeled.npz samples/<name>.npz --protocol adm
    python evaluate_fid.py data/mini/train samples/<name> --feature-net mini
    torchrun --nnodes=1 --nproc_per_node=4 evaluate_fid.py data/imagenet/train samples/<name>

--feature-net inception gives `fid`, `sfid`, `is`, `precision` and `recall`, by protocol pytorch-fid
or adm (see evaluation/inception.py); --feature-net mini gives `fd_mini` of the 64x64 miniature
testbed, which is no FID, and precision and recall in its space. What REFERENCE cannot tell is null,
with the reason. A Frechet distance falls as the number of samples grows: compare at equal N only.
"""

import argparse
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from evaluation.features import (
    Statistics,
    has_images,
    is_stats,
    load_stats,
    measure,
    save_stats,
)
from evaluation.inception import PROTOCOLS, InceptionFeatures
from evaluation.mini_net import MiniFeatures
from evaluation.readers import batches, conversion_note, open_images
from evaluation.report import (
    build_report,
    check_roles,
    default_output,
    describe_input,
    find_doubts,
    samples_record,
    table,
)
from evaluation.scores import score
from models.files import check_writable, write_json
from training import arguments, distributed, precision
from training.runlog import watched


def main(args: argparse.Namespace) -> None:
    # Processes, and all that can be wrong before any work starts
    world = distributed.start(args.device)
    precision.allow_tf32(False)  # TF32 convolutions move an FID in its third digit
    if args.samples is None and args.save_stats is None:
        raise ValueError("SAMPLES is missing (only --save-stats goes without)")
    record = None
    notes, doubts = [], []

    def warn(*sentences: str) -> None:
        doubts.extend(sentences)
        if world.main:
            for sentence in sentences:
                print(f"warning: {sentence}")

    output = args.output
    if args.samples is not None:
        warn(*check_roles(args.reference, args.samples))
        record = samples_record(args.samples)
        output = args.output or default_output(args.samples)

    # Feature network
    if args.feature_net == "mini":
        if args.protocol is not None or args.inception_weights is not None:
            raise ValueError("--protocol and --inception-weights are of --feature-net inception")
        net = MiniFeatures(device=world.device)
    else:
        protocol = args.protocol or PROTOCOLS[0]
        net = InceptionFeatures(protocol, args.inception_weights, world.device)

    # Samples are opened first: a wrong path should not cost a pass over the reference
    samples = open_images(args.samples) if args.samples is not None else None
    for target in filter(None, (output, args.save_stats)):
        if world.main:
            check_writable(target)

    def statistics_of(images, role: str, keep: int, logits: bool = False) -> Statistics:
        """One pass over this process's share of the images, joined over all processes."""
        modes = Counter()
        share = (world.rank, world.size)
        stream = batches(
            images, args.batch_size, share=share, num_workers=args.num_workers, modes=modes
        )
        total = -(-len(images) // (args.batch_size * world.size))
        stats = measure(
            net,
            tqdm(stream, role, total=total, unit="batch", disable=not watched(world)),
            len(images),
            world.device,
            share=share,
            total=lambda tensor: distributed.sum_across(world, tensor),
            keep=keep,
            logits=logits,
        )
        for other in distributed.gather_objects(world, modes)[1:]:
            modes.update(other)
        if note := conversion_note(modes):
            notes.append(f"{role} {note}")
            if world.main:
                print(f"note: {notes[-1]}")
        return stats

    # Reference
    files = None
    if is_stats(args.reference):
        reference = load_stats(args.reference, net, world.device)
        if args.feature_net == "inception" and args.protocol is None and not reference.known_space:
            other = next(name for name in PROTOCOLS if name != net.protocol)
            warn(
                f"{args.reference} does not say its protocol; the samples are prepared by "
                f"{net.protocol}, which is right for statistics of that tool: if it was made as "
                f"ADM's reference batches are, give --protocol {other}"
            )
        if has_images(args.reference):
            images = open_images(args.reference)
            features = statistics_of(images, "reference images", args.manifold_images).features
            reference = replace(reference, features=features)
    else:
        images = open_images(args.reference)
        files = len(images)
        if samples is not None and images.size != samples.size:
            sizes = ["{}x{}".format(*found.size) for found in (images, samples)]
            warn(
                f"the reference has images of {sizes[0]} pixels, the samples of {sizes[1]}: what "
                "either loses by resizing counts in the scores"
            )
        reference = statistics_of(images, "reference", args.manifold_images)
    if args.save_stats is not None and world.main:
        save_stats(args.save_stats, reference, net, source=str(args.reference))
        print(f"wrote {args.save_stats}: {reference.count or 'unknown'} images, {net.protocol}")

    # Samples, scores, report
    if samples is not None:
        needed = reference.features is not None or args.bootstrap
        scored = statistics_of(samples, "samples", len(samples) if needed else 0, logits=True)
        if world.main:
            scores = score(net, reference, scored, args.bootstrap)
            warn(*find_doubts(net, reference.count, scored.count, record))
            report = build_report(
                net,
                scores,
                bootstrap=args.bootstrap,
                reference=describe_input(args.reference, files),
                reference_stats=reference,
                samples=describe_input(args.samples, len(samples)),
                num_samples=scored.count,
                record=record,
                notes=notes,
                doubts=doubts,
                device=world.device,
            )
            write_json(output, report)
            print(table(report))
            print(f"wrote {output}")
    distributed.barrier(world)
    distributed.stop()


def resamples(text: str) -> int:
    """--bootstrap: 0, or enough for a standard deviation."""
    value = arguments.nonnegative(text)
    if value == 1:
        raise argparse.ArgumentTypeError("a standard error needs at least 2 resamples")
    return value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.parser(__doc__, "REFERENCE SAMPLES")
    add = parser.add_argument
    add("reference", metavar="REFERENCE", type=Path, help="statistics, folder or .npz of images")
    add("samples", metavar="SAMPLES", type=Path, nargs="?", help="folder or .npz of images")
    add("--feature-net", choices=["inception", "mini"], default="inception", help="whose features")
    add("--protocol", choices=PROTOCOLS, help="of Inception (unset: pytorch-fid; papers: adm)")
    add(
        "--inception-weights",
        type=Path,
        help="weight file (unset: looked for in pretrained/ and torch hub's cache, then fetched)",
    )
    add("--batch-size", type=arguments.positive, default=64, help="images at a time on a process")
    add(
        "--num-workers",
        type=arguments.positive,
        default=min(8, os.cpu_count() or 1),
        help="reading threads of a process",
    )
    add("--device", help="cuda, cuda:1 or cpu (unset: CUDA where there is any)")
    add(
        "--bootstrap",
        type=resamples,
        default=0,
        metavar="N",
        help="N resamples of the samples for standard errors of the Frechet distance and IS",
    )
    add(
        "--manifold-images",
        type=arguments.positive,
        default=10_000,
        metavar="M",
        help="reference images, spread evenly, for precision and recall",
    )
    add("--output", type=Path, help="the report's file (unset: see Outputs)")
    add("--save-stats", type=Path, help="the .npz for REFERENCE's statistics (unset: none)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    distributed.run(main, parse_args())
