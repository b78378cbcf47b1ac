r"""The diffusion loss of a plan, or of a trained checkpoint, on latents: always the same draws.

    python scripts/validation_loss.py --config configs/75p_swa.yaml --data-path data/heldout_encoded

Prints, and with --out writes as JSON, the means of loss, mse and vb over each latent store; they
compare with `val_loss/...` in a finetuning run's metrics.jsonl. Runs under torchrun too.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion import create_diffusion
from latents.store import open_latents
from models.files import write_json
from models.grafting import build_grafted, load_trained, with_base
from models.plan import load_plan
from training import arguments, distributed, precision
from training.validation import validation_loss


def main(args: argparse.Namespace) -> None:
    world = distributed.start(args.device)
    dtype = precision.choose(args.precision, world.device)
    precision.allow_tf32(dtype != torch.float32)
    torch.manual_seed(args.global_seed)
    plan = with_base(load_plan(args.config_filepath), args.load_weight)
    stores = [open_latents(path, num_classes=plan.num_classes) for path in args.data_path]
    for store in stores:
        store.check_plan(plan)
        for line in store.notes if world.main else ():
            print(line)
    trained = args.graft_fusion_ckpt_path
    model, report = build_grafted(plan, weights=trained is None)
    if trained is not None:
        load_trained(model, plan, trained)
    elif report.counts().get("fresh") and world.main:
        print(f"{plan.path}: {report.counts()['fresh']} tensors are untrained")
    model.to(world.device)

    found = {}
    for path, store in zip(args.data_path, stores, strict=True):
        values = validation_loss(model, store, create_diffusion(""), world, dtype)
        found[path] = values
        if world.main:
            print(f"{path}: " + "  ".join(f"{name} {value:.5f}" for name, value in values.items()))
    if args.out is not None and world.main:
        write_json(args.out, found)
    distributed.stop()


def parse_args() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--config-filepath", "--config", required=True, help="graft YAML")
    add("--data-path", nargs="+", required=True, help="latent stores")
    add("--graft-fusion-ckpt-path", help="a finetuned checkpoint, instead of the YAML's weights")
    add("--load-weight", help="base DiT checkpoint, instead of the YAML's base_ckpt_path")
    add("--global-seed", type=arguments.seed, default=0, help="of tensors without a file")
    add("--precision", choices=("bf16", "fp32"), help="autocast (unset: bf16 on CUDA, else fp32)")
    add("--device", help="cuda, cuda:1 or cpu (unset: CUDA where there is any)")
    add("--out", type=Path, help="a JSON with the values")
    return parser.parse_args()


if __name__ == "__main__":
    distributed.run(main, parse_args())
