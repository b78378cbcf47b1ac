"""Writes the averaged weights of a training checkpoint as one half-precision safetensors file.

    python scripts/export_weights.py outputs/<run>/checkpoints/0040000.pt --out dit.safetensors

Low-rank updates are added to what they update. Of an ungrafted PixArt, --out without a suffix is a
folder of diffusers' format, which PixArtTransformer2DModel.from_pretrained opens.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.files import write_whole
from models.presets import is_captioned, pixart_config
from models.weights import read_checkpoint
from training import arguments, distributed


def main(args: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    state, plan = read_checkpoint(args.checkpoint)
    state = {k: v.to(torch.float16).contiguous() for k, v in state.items()}
    if args.out.suffix != ".safetensors":
        if args.out.suffix or plan is None or not is_captioned(plan["model_name"]):
            raise ValueError(
                f"--out {args.out}: name a .safetensors file, or of PixArt a folder (no suffix)"
            )
        from models.pixart import write_diffusers

        write_diffusers(state, pixart_config(plan["model_name"]), args.out)
        print(f"{args.out}: {len(state)} tensors, in diffusers' format")
        return
    write_whole(args.out, lambda partial: save_file(state, partial))
    print(f"{args.out}: {len(state)} tensors, {args.out.stat().st_size / 1e6:.1f} MB")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.parser(__doc__, "CHECKPOINT")
    parser.add_argument("checkpoint", help="of finetune_tinyfusion.py")
    parser.add_argument(
        "--out", required=True, type=Path, help="the .safetensors file, or folder, to write"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    distributed.run(main, parse_args())
