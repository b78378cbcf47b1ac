"""Samples and scores the released grafts, and writes the paper's table: published beside measured.

Inputs:  --zoo, a YAML like configs/zoo.yaml, and --plans, graft YAMLs of your own; the weights that
         they name, fetched where they are released and missing; --reference.
Outputs: below --out: table.md and table.json, written anew after each model; samples/<name>/ with
         the images, samples.json and metrics.json; plans/<name>.yaml; reference.npz.

    python scripts/reproduce_tables.py --nproc-per-node 8
    python scripts/reproduce_tables.py --models dit-xl2-mha-swa-50p-fid2.67 --num-fid-samples 5000
    python scripts/reproduce_tables.py --zoo configs/mini/zoo.yaml --reference data/mini/train \
        --feature-net mini --num-fid-samples 1024 --sampler dpm++ --num-sampling-steps 20

It only starts download.py, sample_ddp_finetuned.py and evaluate_fid.py, each of which goes on where
it was stopped; so does this script when its command is repeated, and models that are done stay as
they are. A model whose weights cannot be had does not hold up the others.
"""

import argparse
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.features import stats_source
from evaluation.inception import PROTOCOLS
from evaluation.report import LABELS, align, show
from models.config_files import REPOSITORY, check_keys, find_file, read_yaml
from models.files import file_sha256, read_json, write_json, write_whole
from models.plan import load_plan, write_plan
from models.provenance import environment
from training import arguments, distributed

ZOO_KEYS = {
    "name": str,
    "config": str,
    "checkpoint": (str, type(None)),
    "operator": (str, type(None)),
    "ratio": (int, type(None)),
    "published": (dict, type(None)),
    "source": (str, type(None)),
}
PAPERS_SAMPLES = 50_000
RELEASED = {  # files of configs/zoo.yaml's models that the repository does not hold -> download.py
    "pretrained/DiT-XL-2-256x256.pt": "dit-xl2-256",
    "pretrained/sd-vae-ft-ema/config.json": "vae-ema",
    "pretrained/sd-vae-ft-ema/diffusion_pytorch_model.safetensors": "vae-ema",
}
REFERENCE = "pretrained/VIRTUAL_imagenet256_labeled.npz"


@dataclass(frozen=True)
class Model:
    """One row: a name, a graft YAML, the grafted weights where the YAML does not name them, and
    what a table of the zoo says of it."""

    name: str
    config: Path
    checkpoint: str | None = None
    operator: str | None = None
    ratio: int | None = None
    published: dict = field(default_factory=dict)
    released: bool = False  # whether download.py knows it


class Failed(Exception):
    """A command ended with an error, which it has printed."""


def launch(script: str, *flags, processes: int = 1) -> None:
    """Runs a script of this repository to its end; an interrupted one is ended too.

    Raises: Failed when it ends with an error.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(REPOSITORY / script), *map(str, flags)]
    with subprocess.Popen(command) as process:
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            raise
    if code:
        raise Failed(f"{script} ended with exit code {code}; its message stands above")


def read_zoo(path: Path) -> list[Model]:
    """The models of a zoo's YAML. ValueError naming file, key and value."""
    content = read_yaml(path)
    check_keys(path, "top level", content, {"models": list}, ("models",))
    models = []
    for number, entry in enumerate(content["models"]):
        check_keys(path, f"models[{number}]", entry, ZOO_KEYS, ("name", "config"))
        models.append(
            Model(
                entry["name"],
                find_file(entry["config"], path, "config"),
                entry.get("checkpoint"),
                entry.get("operator"),
                entry.get("ratio"),
                entry.get("published") or {},
                released=path.resolve() == REPOSITORY / "configs" / "zoo.yaml",
            )
        )
    return models


def choose_models(args: argparse.Namespace) -> list[Model]:
    """What --zoo, --models and --plans name. ValueError for unknown and repeated names."""
    models = [] if args.plans and not args.models else read_zoo(args.zoo)
    if args.models:
        known = {model.name: model for model in models}
        if unknown := [name for name in args.models if name not in known]:
            raise ValueError(f"--models {unknown[0]}: {args.zoo} has {', '.join(known)}")
        models = [known[name] for name in args.models]
    models += [Model(plan.stem, plan) for plan in args.plans]
    names = [model.name for model in models]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{double}: two models have this name; folders are named after it")
    return models


def fetch_weights(model: Model) -> None:
    """Fetches what a released model needs and the repository does not hold."""
    if not model.released:
        return
    wanted = [name for path, name in RELEASED.items() if not (REPOSITORY / path).is_file()]
    if not (REPOSITORY / model.checkpoint).is_file():
        wanted.append(f"zoo:{model.name}")
    if wanted:
        launch("scripts/download.py", *dict.fromkeys(wanted))


def prepare_reference(args: argparse.Namespace) -> Path:
    """<out>/reference.npz: what the scores need of --reference, measured once for all models."""
    path = args.out / "reference.npz"
    source = args.reference or REPOSITORY / REFERENCE
    if path.is_file():
        if (made_from := stats_source(path)) != str(source):
            raise ValueError(
                f"{path} was made from {made_from}, not from {source}: choose another --out"
            )
        return path
    if args.reference is None and not source.is_file():
        launch("scripts/download.py", "adm-reference-256")
    flags = ["--save-stats", path, *score_flags(args)]
    launch("evaluate_fid.py", source, *flags, processes=args.nproc_per_node)
    return path


def score_flags(args: argparse.Namespace) -> list:
    """Flags of evaluate_fid.py that all its runs here share."""
    flags = ["--feature-net", args.feature_net]
    if args.feature_net == "inception":
        flags += ["--protocol", args.protocol]
        if args.inception_weights:
            flags += ["--inception-weights", args.inception_weights]
    return flags + (["--device", args.device] if args.device else [])


def result_of(folder: Path, args: argparse.Namespace, reference_sha256: str) -> dict | None:
    """The metrics.json of a model that is done; None when some or all is still to do."""
    if not (folder / "metrics.json").is_file() or not (folder / "samples.json").is_file():
        return None
    advice = "delete it and repeat the command"
    report = read_json(folder / "metrics.json", advice)
    record = read_json(folder / "samples.json", advice)
    settings = record["settings"]
    asked = {
        "num_samples": args.num_fid_samples,
        "sampler": args.sampler,
        "steps": args.num_sampling_steps,
        "cfg_scale": args.cfg_scale,
        "seed": args.global_seed,
    }
    protocol = args.protocol if args.feature_net == "inception" else "mini"
    done = (
        record["complete"]
        and {key: settings[key] for key in asked} == asked
        and (report["samples_json"] or {}).get("settings") == settings
        and report["protocol"] == protocol
        and report["bootstrap"] == args.bootstrap
        and report["reference"].get("sha256") == reference_sha256
    )
    return report if done else None


def measure_model(model: Model, args: argparse.Namespace, reference: Path) -> None:
    """Samples and scores one model into <out>/samples/<name>."""
    fetch_weights(model)
    plan = load_plan(model.config)
    if model.checkpoint is not None:
        start = find_file(model.checkpoint, args.zoo, "checkpoint")
        plan = replace(plan, grafted_ckpt_path=start)
    config = args.out / "plans" / f"{model.name}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    write_plan(plan, config, {}, f"{model.name}, from {model.config}")
    flags = ["--config", config, "--sample-dir", args.out / "samples", "--folder-name", model.name]
    flags += ["--num-fid-samples", args.num_fid_samples, "--sampler", args.sampler]
    flags += ["--num-sampling-steps", args.num_sampling_steps, "--cfg-scale", args.cfg_scale]
    flags += ["--global-seed", args.global_seed, "--per-proc-batch-size", args.per_proc_batch_size]
    flags += ["--device", args.device] if args.device else []
    launch("sample_ddp_finetuned.py", *flags, processes=args.nproc_per_node)
    folder = args.out / "samples" / model.name
    flags = [reference, folder, *score_flags(args), "--bootstrap", args.bootstrap]
    launch("evaluate_fid.py", *flags, processes=args.nproc_per_node)


def write_tables(
    args: argparse.Namespace, models: list[Model], results: dict[str, dict], failures: dict
) -> None:
    """table.md and table.json, of what there is so far."""
    metrics = next((list(report["metrics"]) for report in results.values()), [])
    published = [key for key in metrics if any(model.published.get(key) for model in models)]
    head = ["model", "operator", "ratio", "N", "protocol"]
    for key in metrics:
        head += [f"{LABELS[key]} published"] * (key in published) + [LABELS[key]]
    rows, notes = [head], []
    for model in models:
        report = results.get(model.name)
        row = [model.name, model.operator or "-", f"{model.ratio} %" if model.ratio else "-"]
        row += [str(report["num_samples"]), report["protocol"]] if report else ["-", "-"]
        for key in metrics:
            value = model.published.get(key)
            row += ["-" if value is None else str(value)] * (key in published)
            row.append(show(report, key) if report else "-")
        rows.append(row)
        if report:
            whys = report["why_null"].items()
            notes += [f"{model.name}: no {LABELS[key]}: {why}" for key, why in whys]
            notes += [f"{model.name}: {line}" for line in report["warnings"]]
        else:
            notes.append(f"{model.name}: {failures.get(model.name, 'still to be measured')}")
    known = f"reference {args.reference or REFERENCE}, feature network {args.feature_net}"
    lines = [
        "# Published and measured scores",
        "",
        f"{args.num_fid_samples} samples a model; {args.sampler}, {args.num_sampling_steps} steps, "
        f"cfg-scale {args.cfg_scale}, seed {args.global_seed}; {known}.",
    ]
    if published and args.num_fid_samples != PAPERS_SAMPLES:
        lines += [
            "",
            f"Published scores are of {PAPERS_SAMPLES} samples; Frechet distances of fewer read "
            "higher, Inception scores lower.",
        ]
    lines += ["", *align(rows), "", *(f"- {note}" for note in notes)]
    text = "\n".join(lines).rstrip() + "\n"
    write_whole(args.out / "table.md", lambda partial: partial.write_text(text, encoding="utf-8"))
    flags = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
    }
    flags["plans"] = [str(plan) for plan in args.plans]
    write_json(
        args.out / "table.json",
        {
            "format": 1,
            "settings": flags,
            "models": [
                {
                    "name": model.name,
                    "config": str(model.config),
                    "operator": model.operator,
                    "ratio": model.ratio,
                    "published": model.published or None,
                    "measured": results.get(model.name),
                    "failure": failures.get(model.name),
                }
                for model in models
            ],
            **environment(),
        },
    )


def main(args: argparse.Namespace) -> None:
    models = choose_models(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was launched ends too
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        reference = prepare_reference(args)
    except Failed as error:
        raise ValueError(f"no reference: {error}") from error
    sha256 = file_sha256(reference)
    folders = {model.name: args.out / "samples" / model.name for model in models}
    results, failures = {}, {}
    for model in models:  # what earlier runs have done, so that the table is whole from the start
        if report := result_of(folders[model.name], args, sha256):
            results[model.name] = report
    write_tables(args, models, results, failures)
    for number, model in enumerate(models, 1):
        place = f"== {number}/{len(models)} {model.name}"
        if model.name in results:
            print(f"{place}: is done", flush=True)
            continue
        print(place, flush=True)
        try:
            measure_model(model, args, reference)
            results[model.name] = result_of(folders[model.name], args, sha256)
        except (Failed, FileNotFoundError, ValueError) as error:
            failures[model.name] = str(error)
            print(f"{model.name}: {error}", file=sys.stderr)
        write_tables(args, models, results, failures)
    print((args.out / "table.md").read_text(encoding="utf-8"))
    if failures:
        raise ValueError(
            f"{len(failures)} of {len(models)} models were not measured ({', '.join(failures)}): "
            "see above, and repeat the command for them"
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = parser.add_argument_group("models").add_argument
    add("--zoo", type=Path, default=REPOSITORY / "configs" / "zoo.yaml", help="list of models")
    add("--models", nargs="+", metavar="NAME", help="of the zoo (unset: all, or with --plans none)")
    add("--plans", nargs="+", type=Path, default=[], metavar="YAML", help="graft YAMLs beside them")
    add("--out", type=Path, default=Path("results/tables"), help="all outputs")
    add = parser.add_argument_group("samples").add_argument
    add("--num-fid-samples", type=arguments.positive, default=PAPERS_SAMPLES, help="of each model")
    add("--sampler", choices=("ddpm", "ddim", "dpm++"), default="ddpm", help="the papers': ddpm")
    add("--num-sampling-steps", type=arguments.positive, default=250, help="2 to 1000")
    add("--cfg-scale", type=arguments.guidance, default=1.5, help="guidance; 1 is none")
    add("--global-seed", type=arguments.seed, default=0, help="labels and noise follow from it")
    add = parser.add_argument_group("scores").add_argument
    add("--reference", type=Path, help=f"statistics or images (unset: {REFERENCE}, fetched)")
    add("--feature-net", choices=["inception", "mini"], default="inception", help="whose features")
    add("--protocol", choices=PROTOCOLS, default="adm", help="of Inception; the papers': adm")
    add("--inception-weights", type=Path, help="weight file (unset: as evaluate_fid.py)")
    add("--bootstrap", type=arguments.nonnegative, default=0, help="resamples, for standard errors")
    add = parser.add_argument_group("machine").add_argument
    add("--nproc-per-node", type=arguments.positive, default=1, help="processes, one a GPU")
    add("--device", help="cuda, cuda:1 or cpu (unset: CUDA where there is any)")
    add("--per-proc-batch-size", type=arguments.positive, default=32, help="images at a time")
    return parser.parse_args(argv)


if __name__ == "__main__":
    distributed.run(main, parse_args())
