"""How long the scores take once the features are there, on random features of Inception's sizes.

    OMP_NUM_THREADS=2 python scripts/benchmark_scores.py
    python scripts/benchmark_scores.py --device cuda:0 --json scores.json

Prints the seconds of each part, by the clock and of all cores' work, and the peak memory of the
process; divided by the cores, the work is what an idle machine's clock would show. The features
have a common mean and a covariance with a wide spectrum, as an image network's have, and the logits
1008 classes.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.inception import InceptionFeatures
from evaluation.manifolds import precision_recall
from evaluation.metrics import GaussianStats, frechet_distance, inception_score
from training import arguments, distributed, precision


def main(args: argparse.Namespace) -> None:
    world = distributed.start(args.device)
    precision.allow_tf32(False)
    device = world.device
    dim, classes = InceptionFeatures.dim, InceptionFeatures.num_logits
    generator = torch.Generator(device).manual_seed(0)
    mixing = torch.randn(dim, dim, device=device, generator=generator) / dim**0.5
    mixing *= torch.logspace(0, -2, dim, device=device)[:, None]

    def draw(count: int, shift: float) -> torch.Tensor:
        rows = torch.empty(count, dim, device=device)
        for part in rows.split(args.batch_size):
            part.copy_(torch.randn(len(part), dim, device=device, generator=generator) @ mixing)
        return rows.add_(0.4 + shift)

    samples, reference = draw(args.samples, 0.002), draw(args.reference, 0.0)
    logits = torch.empty(args.samples, classes, device=device).normal_(generator=generator) * 3
    seconds, work_seconds, values = {}, {}, {}

    def timed(name: str, work):
        began, worked = time.perf_counter(), time.process_time()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name] = round(time.perf_counter() - began, 2)
        work_seconds[name] = round(time.process_time() - worked, 2)
        print(f"{name:26s} {seconds[name]:8.2f} s, work {work_seconds[name]:8.2f} s", flush=True)
        return result

    def moments(rows: torch.Tensor) -> GaussianStats:
        stats = GaussianStats(dim, device=device)
        for part in rows.split(args.batch_size):
            stats.update(part)
        return stats

    ours = timed("moments of the samples", lambda: moments(samples))
    theirs = timed("moments of the reference", lambda: moments(reference))
    values["fid"] = timed(
        "Frechet distance",
        lambda: frechet_distance(ours.mean, ours.sigma, theirs.mean, theirs.sigma),
    )
    values["is"] = timed("Inception score", lambda: inception_score(logits))
    values["precision"], values["recall"] = timed(
        "precision and recall", lambda: precision_recall(reference, samples)
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB -> GiB
    result = {
        "samples": args.samples,
        "reference": args.reference,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "seconds": seconds,
        "total": round(sum(seconds.values()), 2),
        "work_seconds": work_seconds,
        "total_work": round(sum(work_seconds.values()), 2),
        "peak_gib": round(peak, 2),
        "values": values,
    }
    if device.type == "cuda":
        result["peak_device_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    print(
        f"{'in all':26s} {result['total']:8.2f} s, work {result['total_work']:8.2f} s, "
        f"peak memory {result['peak_gib']} GiB"
    )
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--samples", type=arguments.positive, default=50_000, help="feature vectors of samples")
    add("--reference", type=arguments.positive, default=10_000, help="of reference images")
    add("--batch-size", type=arguments.positive, default=64, help="vectors that come at a time")
    add("--device", help="cuda, cuda:1 or cpu (unset: CUDA where there is any)")
    add("--json", type=Path, help="the figures as a file (unset: none)")
    return parser.parse_args()


if __name__ == "__main__":
    distributed.run(main, parse_args())
