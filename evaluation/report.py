"""metrics.json: the scores of one set of images and all that they depend on."""

from pathlib import Path

import torch

from evaluation.features import FeatureNet, describe_net, is_stats
from models.files import file_sha256, read_json
from models.provenance import environment


def describe_input(path: str | Path, files: int | None = None) -> dict:
    """Where images or statistics come from: a file by its hash, a folder by its file count."""
    path = Path(path)
    if path.is_dir():
        return {"path": str(path), "kind": "folder", "files": files}
    return {"path": str(path), "kind": "file", "sha256": file_sha256(path)}


def samples_record(samples: str | Path) -> dict | None:
    """The samples.json of a sample folder, or of the folder that an .npz was packed from (same
    name without the suffix); None when there is none. ValueError when it is torn."""
    samples = Path(samples)
    folder = samples if samples.is_dir() else samples.with_suffix("")
    path = folder / "samples.json"
    if not path.is_file():
        return None
    return read_json(path, "repeat the sampling command, or delete it")


def default_output(samples: str | Path) -> Path:
    """Where the report goes: into a sample folder, else beside what was scored.

    <folder>/metrics.json where that holds samples.json; <folder>.metrics.json where it does not,
    since it is someone else's; <name>.metrics.json for <name>.npz.
    """
    samples = Path(samples)
    if not samples.is_dir():
        return samples.with_suffix(".metrics.json")
    if (samples / "samples.json").is_file():
        return samples / "metrics.json"
    folder = samples if samples.name not in ("", "..") else samples.resolve()
    return folder.with_name(f"{folder.name}.metrics.json")


def check_roles(reference: str | Path, samples: str | Path) -> None:
    """ValueError when REFERENCE and SAMPLES are the same, or look swapped."""
    if Path(reference).resolve() == Path(samples).resolve():
        raise ValueError(
            f"REFERENCE and SAMPLES are both {samples}: the distance would say nothing"
        )
    if is_stats(samples):
        why = f"{samples} holds the statistics of a reference"
    elif samples_record(reference) is not None and samples_record(samples) is None:
        why = f"{reference} has a samples.json"
    else:
        return
    raise ValueError(
        f"REFERENCE and SAMPLES look swapped ({why}): the order is evaluate_fid.py REFERENCE "
        "SAMPLES"
    )


def find_doubts(
    net: FeatureNet,
    num_reference: int | None,
    num_samples: int,
    record: dict | None,
) -> list[str]:
    """Reasons to distrust the numbers, one sentence each."""
    doubts = []
    for role, count in (("samples", num_samples), ("reference images", num_reference)):
        if count is not None and count < net.minimum:
            doubts.append(
                f"{count} {role} for {net.dim} features: below {net.minimum} the covariance is "
                f"singular or badly determined and {net.metric} reads too high"
            )
    if record is not None and not record.get("complete", True):
        doubts.append("samples.json says that sampling was not finished")
    wanted = (record or {}).get("settings", {}).get("num_samples")
    if wanted is not None and wanted != num_samples:
        doubts.append(f"samples.json speaks of {wanted} samples, {num_samples} were read")
    return doubts


def build_report(
    net: FeatureNet,
    metrics: dict[str, float],
    *,
    reference: dict,
    num_reference: int | None,
    samples: dict,
    num_samples: int,
    record: dict | None,
    notes: list[str],
    doubts: list[str],
) -> dict:
    """The content of metrics.json. `metrics` maps a name (fid, fd_mini) to its value."""
    import torchvision

    return {
        "format": 1,
        "protocol": net.protocol,
        "metrics": metrics,
        "num_samples": num_samples,
        "num_reference": num_reference,
        "feature_net": describe_net(net),
        "reference": reference,
        "samples": samples,
        "samples_json": record,
        "notes": notes,
        "warnings": doubts,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        **environment(),
    }


def table(report: dict) -> str:
    """The scores as a small aligned table: a head, a rule and one row."""
    head = [*report["metrics"], "protocol", "N", "N reference", "samples"]
    known = report["num_reference"]
    row = [f"{value:.4f}" for value in report["metrics"].values()]
    row += [report["protocol"], str(report["num_samples"])]
    row += ["not stated" if known is None else str(known), Path(report["samples"]["path"]).name]
    widths = [max(len(a), len(b)) for a, b in zip(head, row, strict=True)]
    lines = (head, ["-" * width for width in widths], row)
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
