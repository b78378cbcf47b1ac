r"""How local each block's attention is: band-k attention mass L_k (models/locality.py defines it).

    python scripts/attention_locality.py --config configs/75p_swa.yaml \
        --data-path data/imagenet_encoded --out outputs/locality
    python scripts/attention_locality.py --config configs/75p_swa.yaml --sampled \
        --out outputs/locality

Measures the pretrained DiT of a graft YAML (or of --model), on one of two kinds of input: latents
of a store, noised at timesteps drawn uniformly, or with --sampled all that the model sees while it
samples by 50 steps of DDIM at guidance 1.5, the grafting paper's setting (arXiv 2506.05340; 250
samples, k = 32 of 256 tokens); conditional and unconditional evaluations count alike.

Outputs, in --out: locality.json (of each block L_k by k, over all timesteps and in equal parts of
them; null where a block holds no full attention; and all that the figures depend on), which
scripts/guess_plans.py reads, and locality.png.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion import create_diffusion, noise
from diffusion.samplers import sample
from latents.loader import epoch_order
from latents.store import LatentStore, open_latents
from models.config_files import shown
from models.dit import DiT
from models.files import file_sha256, write_json, write_whole
from models.grafting import build_grafted, load_trained, with_base
from models.locality import TIMESTEPS, BandMass, default_band, draw, timestep_bins, uniform_mass
from models.plan import plan_from_flags
from models.provenance import environment
from training import arguments, distributed, precision
from training.runlog import watched

BANDS = (1, 4, 8, 16, 32)


@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    if args.sampled == bool(args.data_path):
        raise ValueError("give either --data-path with a latent store or --sampled")
    world = distributed.start(args.device)
    if world.size > 1:
        raise ValueError("one process is enough: start it without torchrun")
    if not 2 <= args.num_sampling_steps <= 1000:
        raise ValueError(f"--num-sampling-steps {args.num_sampling_steps}: use 2 to 1000")
    dtype = precision.choose(args.precision, world.device)
    plan = plan_from_flags(args.config_filepath, args.model, args.image_size, args.num_classes)
    if plan.captioned:
        raise ValueError(f"{plan.path}: {plan.model_name}: locality is measured of DiT's attention")
    plan = with_base(plan, args.load_weight)
    checkpoint = args.graft_fusion_ckpt_path
    if not args.grafted and checkpoint is None:
        plan = replace(plan.plain(), graft_init=None)
    model, report = build_grafted(plan, weights=checkpoint is None)
    files = report.resolved
    if checkpoint is not None:
        load_trained(model, plan, checkpoint)
        files = {"trained": Path(checkpoint).resolve()}
    elif report.counts().get("fresh", 0):
        raise ValueError(
            f"{plan.path}: {report.counts()['fresh']} tensors have no weights, so "
            "that attention is chance: name the pretrained DiT with --load-weight, or a checkpoint"
        )
    model.to(world.device).eval()

    source = {"kind": "sampled", "sampler": "ddim", "steps": args.num_sampling_steps}
    source |= {"cfg_scale": args.cfg_scale}
    batches = torch.arange(args.num_samples).split(args.batch)
    if args.data_path:
        store = open_latents(args.data_path, num_classes=plan.num_classes)
        store.check_shape((model.in_channels, plan.input_size, plan.input_size), plan.model_name)
        if len(store) < args.num_samples:
            raise ValueError(f"--num-samples {args.num_samples}: the store holds {len(store)}")
        source = {"kind": "latents", "path": args.data_path, "vae": store.manifest["vae"]}
        order = epoch_order(len(store), args.seed, epoch=0)
        batches = order[: args.num_samples].split(args.batch)
    bands = args.band or [*BANDS, default_band(model.num_tokens)]
    with BandMass(model, sorted(set(bands)), args.timestep_bins) as meter:
        for index in tqdm(batches, disable=not watched(world), unit="batch"):
            index = index.to(world.device)
            with precision.autocast(world.device, dtype):
                if args.data_path:
                    run_on_latents(model, store, index, args.seed)
                else:
                    run_sampler(model, index, args)

    blocks = [
        {
            "block": i,
            "operator": entry.operator if (entry := plan.graft_at(i, "mha")) else "mha",
            "mass": mass,
            "mass_by_timestep": parts,
        }
        for i, (mass, parts) in enumerate(zip(meter.mass(), meter.mass_by_timestep(), strict=True))
    ]
    content = {
        "plan": plan.architecture(),
        "num_tokens": model.num_tokens,
        "bands": list(meter.bands),
        "uniform": {str(k): uniform_mass(model.num_tokens, k) for k in meter.bands},
        "timestep_bins": timestep_bins(meter.bins),
        "blocks": blocks,
        "source": source,
        "num_samples": args.num_samples,
        "seed": args.seed,
        "precision": str(dtype).removeprefix("torch."),
        "weights": {n: {"file": shown(f), "sha256": file_sha256(f)} for n, f in files.items()},
        **environment(world.device),
    }
    write_json(args.out / "locality.json", content)
    write_whole(args.out / "locality.png", lambda path: draw(path, content, meter.maps()))
    print(f"{args.out / 'locality.json'}, {args.out / 'locality.png'}")


def run_on_latents(model: DiT, store: LatentStore, index: torch.Tensor, seed: int) -> None:
    """One forward of pictures `index` of a store, each noised at a timestep of its own."""
    x0 = store.latents(store.read(index.cpu()).to(index.device), index, seed, epoch=0)
    t = noise.integers(seed, noise.TIMESTEP, index, TIMESTEPS)
    x = create_diffusion("").q_sample(x0, t, noise.normal(seed, noise.NOISE, index, store.shape))
    model(x, t, torch.from_numpy(store.labels[index.cpu().numpy()]).to(index.device))


def run_sampler(model: DiT, index: torch.Tensor, args: argparse.Namespace) -> None:
    """Draws samples `index`, as sample_ddp_finetuned.py does with labels drawn at random."""
    shape = (model.in_channels, model.input_size, model.input_size)
    y = noise.integers(args.seed, noise.LABEL, index, model.num_classes)
    labels = torch.cat([y, torch.full_like(y, model.num_classes)])

    def model_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if args.cfg_scale == 1.0:
            return model(x, t, y)
        both = model.forward_with_cfg(x.repeat(2, 1, 1, 1), t.repeat(2), labels, args.cfg_scale)
        return both[: len(x)]

    start = noise.normal(args.seed, noise.START, index, shape)
    sample(model_fn, start.shape, sampler="ddim", steps=args.num_sampling_steps, start=start)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = parser.add_argument_group("model").add_argument
    add("--config-filepath", "--config", help="graft YAML; its plain DiT is measured")
    add("--grafted", action="store_true", help="measure the grafted model of the YAML's weights")
    add("--graft-fusion-ckpt-path", help="measure this checkpoint of the YAML's model")
    add("--load-weight", help="base DiT checkpoint, instead of the YAML's base_ckpt_path")
    add("--model", help="preset, such as DiT-XL/2; instead of a YAML")
    add("--image-size", type=arguments.positive, help="pixels; as the YAML (256 without one)")
    add("--num-classes", type=arguments.positive, help="as the YAML (1000 without one)")
    add = parser.add_argument_group("input").add_argument
    add("--data-path", help="latent store")
    add("--sampled", action="store_true", help="what the model sees while it samples")
    add("--num-samples", type=arguments.positive, default=250, help="latents or drawn samples")
    add("--num-sampling-steps", type=arguments.positive, default=50, help="of DDIM; 2 to 1000")
    add("--cfg-scale", type=arguments.guidance, default=1.5, help="of --sampled; 1 is none")
    add("--seed", type=arguments.seed, default=0, help="all random numbers follow from it")
    add = parser.add_argument_group("measurement").add_argument
    few = (
        f"the k of L_k, in tokens (unset: {' '.join(map(str, BANDS))} and an eighth of all tokens)"
    )
    add("--band", type=arguments.nonnegative, nargs="+", metavar="K", help=few)
    add("--timestep-bins", type=arguments.positive, default=5, help="equal parts of 0..999")
    add("--batch", type=arguments.positive, default=32, help="samples at a time")
    add("--precision", choices=("bf16", "fp32"), help="of the model (unset: bf16 on CUDA)")
    add("--device", help="cuda, cuda:1 or cpu (unset: CUDA where there is any)")
    add("--out", type=Path, default=Path("outputs/locality"), help="folder to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    distributed.run(main, parse_args())
