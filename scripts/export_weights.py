"""Writes the averaged weights of a training checkpoint as one half-precision safetensors file.

python scripts/export_weights.py outputs/<run>/checkpoints/0040000.pt --out dit.safetensors
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.files import write_whole
from models.weights import read_state
from training import arguments, distributed


def main(args: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    state = {k: v.to(torch.float16).contiguous() for k, v in read_state(args.checkpoint).items()}
    write_whole(args.out, lambda partial: save_file(state, partial))
    print(f"{args.out}: {len(state)} tensors, {args.out.stat().st_size / 1e6:.1f} MB")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.parser(__doc__, "CHECKPOINT")
    parser.add_argument("checkpoint", help="of finetune_tinyfusion.py")
    parser.add_argument("--out", required=True, type=Path, help="the .safetensors file to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    distributed.run(main, parse_args())
