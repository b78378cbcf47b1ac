"""metrics.json: the scores of one set of images and all that they depend on."""

from pathlib import Path

import torch

from evaluation.features import (
    FeatureNet,
    Statistics,
    describe_net,
    has_images,
    is_stats,
    stats_source,
)
from evaluation.metrics import IS_BLOCK
from evaluation.scores import Scores
from models.files import file_sha256, read_json
from models.provenance import environment

LABELS = {
    "fid": "FID",
    "fd_mini": "fd_mini",
    "sfid": "sFID",
    "is": "IS",
    "precision": "precision",
    "recall": "recall",
}


def describe_input(path: str | Path, files: int | None = None) -> dict:
    """Where images or statistics come from: a file by its hash, a folder by its file count."""
    path = Path(path)
    if path.is_dir():
        return {"path": str(path), "kind": "folder", "files": files}
    made_from = stats_source(path) if is_stats(path) else None
    source = {} if made_from is None else {"made_from": made_from}
    return {"path": str(path), "kind": "file", "sha256": file_sha256(path), **source}


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


def check_roles(reference: str | Path, samples: str | Path) -> list[str]:
    """Reasons to think that REFERENCE and SAMPLES are swapped, one sentence each.

    Raises: ValueError when the two are the same, or SAMPLES holds no images.
    """
    order = "the order is evaluate_fid.py REFERENCE SAMPLES"
    if Path(reference).resolve() == Path(samples).resolve():
        raise ValueError(
            f"REFERENCE and SAMPLES are both {samples}: the distance would say nothing"
        )
    if is_stats(samples):
        why = f"{samples} holds the statistics of a reference"
        if not has_images(samples):
            raise ValueError(f"REFERENCE and SAMPLES look swapped ({why} and no images): {order}")
    elif samples_record(reference) is not None and samples_record(samples) is None:
        why = f"{reference} has a samples.json"
    else:
        return []
    return [
        f"REFERENCE and SAMPLES look swapped ({why}): {order}; swapped, precision and recall "
        "change places and nothing else looks wrong"
    ]


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
    rest = num_samples % IS_BLOCK
    if net.num_logits and num_samples > IS_BLOCK and rest:
        doubts.append(
            f"the Inception score is the mean over blocks of {IS_BLOCK} samples, the last of which "
            f"has {rest}, counts as much as the others and reads lower"
        )
    if record is not None and not record.get("complete", True):
        doubts.append("samples.json says that sampling was not finished")
    wanted = (record or {}).get("settings", {}).get("num_samples")
    if wanted is not None and wanted != num_samples:
        doubts.append(f"samples.json speaks of {wanted} samples, {num_samples} were read")
    return doubts


def build_report(
    net: FeatureNet,
    scores: Scores,
    *,
    bootstrap: int,
    reference: dict,
    reference_stats: Statistics,
    samples: dict,
    num_samples: int,
    record: dict | None,
    notes: list[str],
    doubts: list[str],
    device: torch.device,
) -> dict:
    """The content of metrics.json.

    metrics           name (fid, sfid, is, precision, recall, fd_mini) -> value or null
    why_null          name -> why the value is not known
    standard_errors   name -> standard error, by `bootstrap` resamples of the samples
    num_samples, num_reference, num_reference_manifold
                      images scored, behind the reference's mean and covariance (null: not stated),
                      and behind its side of precision and recall
    """
    import torchvision

    features = reference_stats.features
    return {
        "format": 1,
        "protocol": net.protocol,
        "metrics": scores.values,
        "why_null": scores.reasons,
        "standard_errors": scores.errors,
        "bootstrap": bootstrap,
        "num_samples": num_samples,
        "num_reference": reference_stats.count,
        "num_reference_manifold": None if features is None else len(features),
        "feature_net": describe_net(net),
        "reference": reference,
        "samples": samples,
        "samples_json": record,
        "notes": notes,
        "warnings": doubts,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        **environment(device),
    }


def show(report: dict, name: str, digits: int = 4) -> str:
    """A score of a report as text: with its standard error where known, "-" where null."""
    value, error = report["metrics"].get(name), report.get("standard_errors", {}).get(name)
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def table(report: dict) -> str:
    """The scores as a small aligned table, and below it why some are missing."""
    head = [*report["metrics"], "protocol", "N", "N reference", "samples"]
    known = report["num_reference"]
    row = [show(report, name) for name in report["metrics"]]
    row += [report["protocol"], str(report["num_samples"])]
    row += ["not stated" if known is None else str(known), Path(report["samples"]["path"]).name]
    lines = align([head, row])
    lines += [f"no {name}: {why}" for name, why in report["why_null"].items()]
    return "\n".join(lines)


def align(rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table whose first row is its head, padded to equal widths."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
