"""Writes the averaged weights of a training checkpoint as one half-precision safetensors file.

python scripts/export_weights.py outputs/<run>/checkpoints/0040000.pt --out dit.safetensors
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.weights import read_state  # noqa: E402  (the repository's root is put on the path above)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", help="of finetune_tinyfusion.py")
    parser.add_argument("--out", required=True, type=Path, help="the .safetensors file to write")
    args = parser.parse_args()
    from safetensors.torch import save_file

    state = {k: v.to(torch.float16).contiguous() for k, v in read_state(args.checkpoint).items()}
    save_file(state, args.out)
    print(f"{args.out}: {len(state)} tensors, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
