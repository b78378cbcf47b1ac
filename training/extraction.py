"""What the processes of an extraction share out, beside the pictures."""

from tqdm import tqdm

from latents.captions import CaptionWriter
from latents.images import CaptionedImages
from latents.shards import ShardWriter
from latents.text import TextEncoder
from models.files import file_sha256
from training import distributed
from training.runlog import RunLog, watched


def begin(writer: ShardWriter, world: distributed.World) -> list[int]:
    """Makes a store's folder ready -> the shards that are not there, checked by all processes."""
    shares = distributed.gather_objects(
        world, writer.missing(range(world.rank, writer.num_shards, world.size))
    )
    missing = sorted(sum(shares, []))
    if world.main:
        writer.begin(missing)
    distributed.barrier(world)
    return missing


def embed_captions(
    table: CaptionWriter,
    pictures: CaptionedImages,
    encoder: TextEncoder,
    world: distributed.World,
    log: RunLog,
) -> dict:
    """Writes the table of the captions, shared out over the processes -> what the manifest says."""
    mine = begin(table, world)[world.rank :: world.size]
    for shard in tqdm(mine, disable=not watched(world), unit="shard of captions"):
        table.write_shard(shard, pictures.texts, encoder)
    distributed.barrier(world)
    if not world.main:
        return {}
    manifest = table.finish()
    cut = sum(record["truncated"] for record in manifest["shards"])
    if cut:
        log.info(f"captions cut at {encoder.max_tokens} tokens (--max-tokens): {cut:,}")
    if pictures.unused:
        log.info(f"captions of pictures that are not in --data-path: {pictures.unused:,}")
    return {"captions_sha256": file_sha256(table.folder / "manifest.json")}
