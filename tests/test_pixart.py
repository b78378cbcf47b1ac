"""PixArt-Sigma: equal to diffusers' class, and through all entries with a tiny text encoder."""

import contextlib
import hashlib
import importlib
import io
import json
import shutil
import sys
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from entries import MINI, REPOSITORY, Forked, refused_here
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from diffusion.samplers import sample as draw
from latents.captions import read_captions
from latents.prompts import Prompts, read_prompts
from latents.store import open_latents
from latents.text import encoder_sha256, load_text_encoder
from models import costs
from models.captions import Captions
from models.grafting import build_grafted, graft, load_plan, load_trained
from models.inference import quicken
from models.operators import build_operator
from models.pixart import PixArt, write_diffusers
from models.plan import plan_from_flags
from models.presets import blank_condition, build_model, latent_size, pixart_config
from models.selection import GraftPair
from models.weights import diffusers_name, our_name, read_checkpoint
from scripts import export_weights
from training import checkpoint
from training.distillation import Teacher
from training.lora import add_lora_around, merge_lora

WORDS = ["a", "red", "blue", "green", "big", "small", "circle", "square", "the"]
CONFIG = pixart_config("PixArt-Mini")


def enter(entry, *flags):
    """An entry in this process, as a user starts it in the repository -> what it printed."""
    module = importlib.import_module(entry)
    heard, argv = io.StringIO(), sys.argv
    sys.argv = [f"{entry}.py", *map(str, flags)]
    try:
        with contextlib.chdir(REPOSITORY), contextlib.redirect_stdout(heard):
            module.main(module.parse_args())
    finally:
        sys.argv = argv
    return heard.getvalue()


def write_encoder(folder, seed, width=32):
    """A T5 encoder of random weights whose tokenizer knows `WORDS`, as diffusers stores them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")


def caption_of(i):
    return f" A {WORDS[1 + i % 3]} circle" + (" big" * 20 if i == 5 else "")


def write_plan(path, folder, blocks="[1, 2, 3]", operator="hyena_x", **more):
    sample = {
        "dit_model_name": "PixArt-Mini",
        "image_size": 64,
        "vae": str(MINI / "vae"),
        "text_encoder": str(folder / "t5"),
        "base_ckpt_path": str(folder / "pixart"),
        **more,
    }
    grafts = (
        f"operator: {{type: mha, name: {operator}, config_filepath: {folder}/{operator}.yaml}}\n"
        if blocks
        else "grafts: []\n"
    )
    blocks = f", graft_indexes: {blocks}" if blocks else ""
    path.write_text(f"{grafts}sample_config: {json.dumps(sample)[:-1]}{blocks}}}\n")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """12 captioned pictures, a text encoder, PixArt-Mini in diffusers' format, and plans."""
    folder = tmp_path_factory.mktemp("pixart")
    write_encoder(folder / "t5", seed=0)
    torch.manual_seed(0)
    PixArtTransformer2DModel(**CONFIG).save_pretrained(folder / "pixart")
    (folder / "images" / "sub").mkdir(parents=True)
    rows = []
    for i in range(12):
        name = f"sub/{i}.png" if i % 2 else f"{i}.png"
        pixels = np.random.default_rng(i).integers(0, 255, (70, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
        rows.append({"file_name": name, "caption" if i % 3 else "text": caption_of(i)})
    rows.append({"file_name": "gone.png", "text": "of no picture"})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    prompts = [{"tag": "colors", "prompt": p} for p in ("a red circle", "The blue square " * 200)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)) + "\n")
    (folder / "hyena_x.yaml").write_text("{order: 2, short_filter_order: 4}\n")
    (folder / "swa.yaml").write_text("{window_size: [63, 63]}\n")
    write_plan(folder / "plan.yaml", folder)
    write_plan(folder / "plain.yaml", folder, blocks="")
    return folder


def extract_flags(files, out, *more):
    flags = ["--data-path", files / "images", "--captions", files / "captions.jsonl"]
    flags += ["--vae", MINI / "vae", "--text-encoder", files / "t5", "--image-size", 64]
    flags += ["--num-workers", 0, "--shard-size", 8, "--max-tokens", 12, "--features-path", out]
    return [*flags, *more]


def extract(files, out, *more):
    return enter("extract_features", *extract_flags(files, out, *more))


@pytest.fixture(scope="module")
def store(files):
    extract(files, files / "latents")
    return files / "latents"


def condition(B, L=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(B + 1, L, CONFIG["caption_channels"], generator=generator)
    mask = torch.arange(L)[None] < torch.randint(1, L + 1, (B + 1, 1), generator=generator)
    return Captions(rows[:B], mask[:B], rows[B:], mask[B:])


def pair_of_models():
    torch.manual_seed(0)
    theirs, ours = PixArtTransformer2DModel(**CONFIG).eval(), PixArt(CONFIG).eval()
    ours.load_state_dict({our_name(n): t for n, t in theirs.state_dict().items()}, strict=True)
    return theirs, ours


X = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
T = torch.tensor([0, 500, 999])


# -- the model -----------------------------------------------------------------


@torch.no_grad()
def test_gives_what_diffusers_class_gives():
    theirs, ours = pair_of_models()
    y = condition(3)
    expected = theirs(
        X, encoder_hidden_states=y.embeddings, timestep=T, encoder_attention_mask=y.mask.long()
    ).sample
    torch.testing.assert_close(ours(X, T, y), expected, rtol=0, atol=1e-5)
    assert {diffusers_name(name) for name in ours.state_dict()} == set(theirs.state_dict())
    other = y._replace(mask=torch.ones_like(y.mask))
    assert not torch.allclose(ours(X, T, other), expected, atol=1e-3)


@torch.no_grad()
def test_loads_and_writes_diffusers_format(files, tmp_path):
    model, report = build_grafted(load_plan(files / "plain.yaml"))
    assert report.counts() == {"base": len(model.state_dict())}
    theirs = PixArtTransformer2DModel.from_pretrained(files / "pixart").eval()
    y = condition(3)
    given = {"encoder_hidden_states": y.embeddings, "timestep": T}
    expected = theirs(X, **given, encoder_attention_mask=y.mask.long()).sample
    torch.testing.assert_close(model.eval()(X, T, y), expected, rtol=0, atol=1e-5)
    write_diffusers(model.state_dict(), model.config, tmp_path / "written")
    again = PixArtTransformer2DModel.from_pretrained(tmp_path / "written").state_dict()
    torch.testing.assert_close(again, theirs.state_dict(), rtol=0, atol=0)
    written = json.loads((tmp_path / "written" / "config.json").read_text())
    original = json.loads((files / "pixart" / "config.json").read_text())
    assert written == original
    grafted, _ = build_grafted(load_plan(files / "plan.yaml"))
    with pytest.raises(ValueError, match="has no place for grafts"):
        write_diffusers(grafted.state_dict(), grafted.config, tmp_path / "grafted")


def test_presets_are_the_published_models():
    for size, scale in ((512, 1), (1024, 2), (2048, 4)):
        plan = plan_from_flags(None, f"PixArt-Sigma-XL-2-{size}", None, None)
        assert (plan.image_size, plan.input_size) == (size, size // 8)
        assert (plan.vae, plan.text_encoder, plan.num_classes) == ("sdxl", "t5", None)
        config = pixart_config(plan.model_name)
        assert (config["sample_size"], config["interpolation_scale"]) == (size // 8, scale)
        model = costs.meta_model(plan)
        assert model.num_tokens == (size // 16) ** 2 and model.depth == 28
        assert sum(p.numel() for p in model.parameters()) == 610_856_096
    with pytest.raises(ValueError, match="image_size 512: PixArt-Sigma-XL-2-2048 makes images of"):
        latent_size("PixArt-Sigma-XL-2-2048", 512)


@torch.no_grad()
def test_half_precision_weights_change_nothing_under_autocast():
    _, model = pair_of_models()
    y = condition(3)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(X, T, y)
        quicken(model, torch.bfloat16)
        torch.testing.assert_close(model(X, T, y), expected, rtol=0, atol=0)
    assert model.proj_out.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_guidance_leads_away_from_the_empty_caption():
    _, model = pair_of_models()
    y = condition(3)
    null = y._replace(
        embeddings=y.null_embeddings.expand(3, -1, -1), mask=y.null_mask.expand(3, -1)
    )
    cond, uncond = model(X, T, y), model(X, T, null)
    out = model.forward_with_cfg(torch.cat([X, X]), torch.cat([T, T]), y.guided(), 4.5)
    eps = uncond[:, :4] + 4.5 * (cond - uncond)[:, :4]
    torch.testing.assert_close(out[:3], torch.cat([eps, cond[:, 4:]], dim=1))
    torch.testing.assert_close(out[3:], torch.cat([eps, uncond[:, 4:]], dim=1))
    drop = torch.tensor([True, False, True])
    expected = torch.where(drop[:, None, None, None], uncond, cond)
    torch.testing.assert_close(model(X, T, y, drop=drop), expected)
    with pytest.raises(ValueError, match="cfg_channels 3: PixArt is guided on all"):
        model.forward_with_cfg(torch.cat([X, X]), torch.cat([T, T]), y.guided(), 4.5, 3)


@torch.no_grad()
def test_slots_hold_pairs_that_follow_keep():
    _, model = pair_of_models()
    y, original = condition(3), model.blocks[2].attn
    before = model(X, T, y)
    operator = build_operator("hyena_x", d_model=64)
    model.blocks[2].attn = operator
    grafted = model(X, T, y)
    model.blocks[2].attn = GraftPair(original, operator)
    keep = torch.ones(3, 4)
    torch.testing.assert_close(model(X, T, y, keep=keep), before)
    keep[1, 2] = 0
    expected = torch.stack([before[0], grafted[1], before[2]])
    torch.testing.assert_close(model(X, T, y, keep=keep), expected)
    assert not torch.allclose(before, grafted, atol=1e-3)
    with pytest.raises(ValueError, match="pass keep"):
        model(X, T, y)


@torch.no_grad()
def test_window_over_all_tokens_inherits_the_attention(files):
    path = write_plan(files / "swa_plan.yaml", files, operator="swa", graft_init="inherit")
    model, report = build_grafted(load_plan(path))
    assert report.counts()["inherited"] == 3 * 4
    plain, _ = build_grafted(load_plan(files / "plain.yaml"))
    y = condition(3)
    torch.testing.assert_close(model(X, T, y), plain(X, T, y), rtol=0, atol=1e-5)


@torch.no_grad()
def test_both_slots_take_every_operator_and_load_again(files, tmp_path):
    operators = {
        "mha": [("hyena_se", "{}"), ("hyena_y", "{}"), ("mamba2", "{headdim: 16}"), ("mha", "{}")],
        "mlp": [("mlp", "{expansion_ratio: 4}"), ("mlp", "{expansion_ratio: 3}")],
    }
    operators["mlp"].append(("mlp_hyena_x", "{expansion_ratio: 2}"))
    lines = ["grafts:"]
    for slot, entries in operators.items():
        for block, (name, config) in enumerate(entries):
            file = tmp_path / f"{slot}{block}.yaml"
            file.write_text(config)
            lines.append(
                f"- {{type: {slot}, name: {name}, config_filepath: {file}, "
                f"graft_indexes: [{block}]}}"
            )
    path = write_plan(tmp_path / "all.yaml", files, blocks="")
    path.write_text(path.read_text().replace("grafts: []", "\n".join(lines)))
    plan = load_plan(path)
    model, report = build_grafted(plan)
    assert {"base", "fresh"} == set(report.counts())
    y = condition(3)
    expected = model.eval()(X, T, y)
    torch.save({"model": model.state_dict(), "plan": plan.architecture()}, tmp_path / "all.pt")
    again, report = build_grafted(replace(plan, grafted_ckpt_path=tmp_path / "all.pt"))
    assert set(report.counts()) == {"checkpoint"}
    torch.testing.assert_close(again.eval()(X, T, y), expected, rtol=0, atol=0)
    load_trained(again, plan, tmp_path / "all.pt")
    with pytest.raises(ValueError, match="block 0 holds 'hyena_se' in its mha slot"):
        load_trained(again, load_plan(files / "plan.yaml"), write_state(model, tmp_path))


def write_state(model, folder):
    """The weights alone, which do not say what is grafted."""
    torch.save(model.state_dict(), folder / "state.pt")
    return folder / "state.pt"


@torch.no_grad()
def test_teacher_gives_inputs_outputs_and_gates():
    _, model = pair_of_models()
    y, drop = condition(3), torch.tensor([False, True, False])
    seen = {}
    model.blocks[1].attn.register_forward_hook(lambda _, h, f: seen.update(slot=(h[0], f)))
    model(X, T, y, drop=drop)
    _, c = model.embed(X, T, y, drop)
    table = model.blocks[1].adaLN_modulation.scale_shift_table
    (h,), (f,), (gate,) = Teacher(model, [(1, "mha")])(X, T, y, drop)
    torch.testing.assert_close((h, f), seen["slot"])
    torch.testing.assert_close(gate, table[2] + c.parts[:, 128:192])
    assert len(model.blocks) == 2


def test_full_count_is_what_pytorch_counts():
    plan = plan_from_flags(None, "PixArt-Sigma-XL-2-512", None, None)
    model, y = costs.meta_model(plan), blank_condition(plan, 1, torch.device("meta"))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 4, 64, 64), torch.empty(1), y)
    assert counter.get_total_flops() == 2 * costs.model_cost(plan).work.multiply_adds
    grafted = load_plan(REPOSITORY / "configs" / "pixart_hyena_x.yaml")
    assert grafted.grafted_blocks() == (8, 10, 12, 14, 16, 18, *range(20, 28))
    cost, plain = costs.model_cost(grafted), costs.model_cost(costs.plain(grafted))
    assert cost.parameters - plain.parameters == 14 * 17_280


# -- captions ------------------------------------------------------------------


def test_every_caption_is_stored_once_as_the_encoder_gives_it(files, store):
    opened = open_latents(store)
    texts = ["", *dict.fromkeys(caption_of(i).lower().strip() for i in order(files))]
    assert len(opened.captions) == len(texts) == 5
    raw = np.load(store / "captions" / "shards" / "00000-texts.npy").tobytes().decode()
    assert [json.loads(line) for line in raw.splitlines()] == texts
    encoder = load_text_encoder(files / "t5", 12, torch.device("cpu"), torch.float32)
    y = opened.conditions(torch.arange(12))
    assert y.embeddings.dtype == torch.float16 and tuple(y.embeddings.shape) == (12, 12, 32)
    for place, i in enumerate(order(files)):
        ids = encoder.tokenizer(caption_of(i).lower().strip())["input_ids"]
        ids = ids if len(ids) <= 12 else [*ids[:11], 1]
        alone = encoder.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert y.mask[place].sum() == len(ids)
        torch.testing.assert_close(
            y.embeddings[place, : len(ids)].float(), alone, atol=2e-3, rtol=2e-3
        )
        assert not y.embeddings[place, len(ids) :].any()
    empty = encoder.model(input_ids=torch.tensor([[1]])).last_hidden_state
    torch.testing.assert_close(y.null_embeddings[:, :1].float(), empty, atol=2e-3, rtol=2e-3)
    assert y.null_mask.sum() == 1
    log = (store / "log.txt").read_text()
    assert log.count("captions cut at 12 tokens (--max-tokens): 1") == 1
    assert "captions of pictures that are not in --data-path: 1" in log


def order(files):
    """The numbers of the pictures in the order of the listing."""
    names = sorted(f"sub/{i}.png" if i % 2 else f"{i}.png" for i in range(12))
    return [int(name.removeprefix("sub/").removesuffix(".png")) for name in names]


def test_extraction_goes_on_and_is_verified(files, store, tmp_path):
    before = {p: p.read_bytes() for p in store.rglob("*.npy")}
    next(p for p in before if p.name.endswith("embeddings.npy")).write_bytes(b"torn")
    with pytest.raises(ValueError, match="00000-embeddings.npy has 4 bytes"):
        open_latents(store)
    extract(files, store)
    assert before == {p: p.read_bytes() for p in store.rglob("*.npy")}
    assert "all shards are whole (12 images)" in enter(
        "extract_features", "--verify", "--features-path", store
    )
    with pytest.raises(ValueError, match="max_tokens was 12 and is now 9"):
        extract(files, store, "--max-tokens", 9)
    changed = (files / "captions.jsonl").read_text().replace("red", "square")
    (tmp_path / "changed.jsonl").write_text(changed)
    with pytest.raises(ValueError, match="captions/settings.json: texts_sha256 was"):
        extract(files, store, "--captions", tmp_path / "changed.jsonl")
    opened = open_latents(store)
    assert opened.num_mirrors == 1  # "left of" stays true
    flipped = store / "captions" / "shards" / "00000-embeddings.npy"
    flipped.write_bytes(before[flipped][:-1] + bytes([before[flipped][-1] ^ 1]))
    for check in (opened.verify, lambda: opened.verify_one(0)):
        with pytest.raises(ValueError, match="00000-embeddings.npy differs from its sha256"):
            check()
    flipped.write_bytes(before[flipped])


def test_two_processes_extract_the_same_bytes(files, store, tmp_path):
    two = extract_flags(files, tmp_path / "two")
    Forked(tmp_path, "extract_features.py", *two, ranks=2).join()
    one, two = (
        {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*.npy"))}
        for folder in (store, tmp_path / "two")
    )
    assert len(one) == 2 * 2 + 3 and one == two


def test_captions_make_another_store_for_another_model(files, store, write_latents, tmp_path):
    plan, opened = load_plan(files / "plan.yaml"), open_latents(store)
    opened.check_plan(plan)
    with pytest.raises(ValueError, match="holds captions, DiT-Mini/2 of .* is told classes"):
        opened.check_plan(load_plan(REPOSITORY / "configs" / "mini" / "75p_swa.yaml"))
    classes = open_latents(write_latents(tmp_path / "classes", 12, 3))
    with pytest.raises(ValueError, match="holds no captions.*extract again with --captions"):
        classes.check_plan(plan)
    write_encoder(tmp_path / "other", seed=1)
    other = write_plan(tmp_path / "p.yaml", files, text_encoder=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="embeddings of text encoder .*t5, which is not .*other"):
        opened.check_plan(load_plan(other))


def test_only_what_defines_an_encoder_tells_it_from_others(tmp_path):
    """Hashes of before, which stores hold, stay those of folders without other files."""
    digest = hashlib.sha256()
    for part, names in (
        ("text_encoder", ["config.json", "model-00001-of-00001.safetensors"]),
        ("tokenizer", ["special_tokens_map.json", "spiece.model", "tokenizer_config.json"]),
    ):
        (tmp_path / part).mkdir()
        for name in names:
            (tmp_path / part / name).write_text(part + name)
            digest.update(json.dumps([name, len(part + name)]).encode() + (part + name).encode())
    assert encoder_sha256(tmp_path) == digest.hexdigest()
    for name in (".DS_Store", "README.md", "._model.safetensors", ".gitattributes"):
        (tmp_path / "text_encoder" / name).write_text("no part of the encoder")
    assert encoder_sha256(tmp_path) == digest.hexdigest()
    for name in ("text_encoder/pytorch_model.bin", "tokenizer/tokenizer.json"):
        before = encoder_sha256(tmp_path)
        (tmp_path / name).write_text("{}")
        assert encoder_sha256(tmp_path) != before


# -- the entries ---------------------------------------------------------------


def train_flags(files, name, *more):
    flags = ["--data-path", files / "latents", "--results-dir", files / "runs", "--prefix", name]
    return [*flags, "--global-batch-size", 4, "--log-every", 1, *more]


@pytest.fixture(scope="module")
def trained(files, store):
    """Distillation, selection, and finetuning with LoRA; the folder of the last."""
    flags = ["--config", files / "plan.yaml", "--num-samples", 8, "--val-samples", 4]
    enter("distill_operators", *train_flags(files, "distilled", *flags, "--max-steps", 3))
    plan = files / "runs" / "distilled-PixArt-Mini" / "distilled.yaml"
    flags = ["--config", plan, "--max-steps", 2, "--delta-w", "--lora", "--groups", "2:4"]
    enter("prune_by_learning", *train_flags(files, "selected", *flags))
    finetune(files, "finetuned", "--max-steps", 3, "--ckpt-every", 2)
    return files / "runs" / "finetuned-PixArt-Mini"


def lora_flags(files, name, *more):
    plan = files / "runs" / "selected-PixArt-Mini" / "selected.yaml"
    return train_flags(files, name, "--config", plan, "--lora", "--lora-rank", 4, *more)


def finetune(files, name, *more):
    return enter("finetune_tinyfusion", *lora_flags(files, name, *more))


def sample(files, name, *more):
    plan = files / "runs" / "selected-PixArt-Mini" / "selected.yaml"
    flags = ["--config", plan, "--prompts", files / "prompts.jsonl", "--images-per-prompt", 2]
    flags += ["--num-sampling-steps", 3, "--sample-dir", files / "samples"]
    return enter("sample_ddp_finetuned", *flags, "--folder-name", name, *more)


@pytest.mark.parametrize(
    ("entry", "flags"),
    [
        ("distill_operators", ["--num-samples", 8, "--val-samples", 4]),
        ("prune_by_learning", ["--groups", "2:4"]),
        ("finetune_tinyfusion", ["--val-data-path", "VALIDATION"]),
    ],
)
def test_logs_say_what_of_a_store_was_not_checked(files, store, tmp_path, entry, flags):
    gone = {"vae": "gone/vae", "text_encoder": "gone/t5", "graft_init": "fresh"}
    plan = write_plan(tmp_path / "plan.yaml", files, **gone)
    (tmp_path / "held out").symlink_to(store)
    flags = [tmp_path / "held out" if flag == "VALIDATION" else flag for flag in flags]
    where = ["--results-dir", tmp_path, "--config", plan, "--max-steps", 1]
    enter(entry, *train_flags(files, "unchecked", *where, *flags))
    log = (tmp_path / "unchecked-PixArt-Mini" / "log.txt").read_text()
    for path in [store, tmp_path / "held out"] if "--val-data-path" in flags else [store]:
        for network in ("VAE gone/vae", "text encoder gone/t5"):
            said = f"{network} of {plan} is not here: whether {path} was made with it is not"
            assert log.count(said) == 1


def test_selection_and_low_rank_finetuning_leave_their_marks(files, trained):
    answer = json.loads((files / "runs/selected-PixArt-Mini/selection.json").read_text())
    assert len(answer["kept"]) == 2 and 0 in answer["kept"] and len(answer["grafted"]) == 2
    state = torch.load(trained / "checkpoints" / "0000003.pt", weights_only=True)
    start, _ = build_grafted(load_plan(files / "runs/selected-PixArt-Mini/selected.yaml"))
    kept = start.state_dict()
    new = tuple(f"blocks.{block}.attn." for block in answer["grafted"])
    moved = {n for n, t in kept.items() if n in state["model"] and not t.equal(state["model"][n])}
    assert moved == {n for n in kept if n.startswith(new)}
    updates = {n for n in state["model"] if ".lora_B." in n}
    assert all(state["model"][n].any() for n in updates)
    linears = {n for n, m in start.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(updates) == len({n for n in linears if not f"{n}.".startswith(new)})


def test_what_training_leaves_is_a_start(files, trained, tmp_path):
    """The finetuned plan takes the updates in; a merged selection and a teacher train on."""
    model, report = build_grafted(load_plan(trained / "finetuned.yaml"))
    assert report.counts() == {"checkpoint": len(model.state_dict())}
    plan = files / "runs" / "distilled-PixArt-Mini" / "distilled.yaml"
    flags = ["--config", plan, "--max-steps", 1, "--delta-w", "--lora", "--groups", "2:4"]
    flags += ["--save-model", tmp_path / "merged.pt"]
    enter("prune_by_learning", *train_flags(files, "merged", *flags))
    _, report = build_grafted(load_plan(tmp_path / "merged.yaml"))
    assert set(report.counts()) == {"checkpoint"}
    flags = ["--config", tmp_path / "merged.yaml", "--max-steps", 1, "--distill"]
    enter("finetune_tinyfusion", *train_flags(files, "taught", *flags))
    lines = (files / "runs" / "taught-PixArt-Mini" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["kd"] > 0


def test_interrupted_low_rank_run_ends_bit_for_bit(files, trained):
    finetune(files, "broken", "--max-steps", 3, "--resume", trained / "checkpoints" / "0000002.pt")
    whole, broken = (
        torch.load(files / f"runs/{n}-PixArt-Mini/checkpoints/0000003.pt", weights_only=True)
        for n in ("finetuned", "broken")
    )
    for key in ("model", "ema", "opt", "sched"):
        torch.testing.assert_close(whole[key], broken[key], rtol=0, atol=0)


def test_two_processes_train_like_one(files, trained):
    Forked(
        files, "finetune_tinyfusion.py", *lora_flags(files, "two", "--max-steps", 3), ranks=2
    ).join()
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (trained, files / "runs" / "two-PixArt-Mini")
    ]
    for one, two in zip(*lines, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_samples_lie_as_geneval_reads_them(files, trained):
    checkpoint = ["--graft-fusion-ckpt-path", trained / "checkpoints" / "0000003.pt"]
    said = sample(files, "all", *checkpoint)
    assert said.count("prompts cut at 300 tokens: 1") == 1
    folder = files / "samples" / "all"
    rows = [json.loads(line) for line in (files / "prompts.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        prompt = folder / f"{number:05d}"
        assert json.loads((prompt / "metadata.jsonl").read_text()) == row
        images = sorted((prompt / "samples").iterdir())
        assert [image.name for image in images] == ["0000.png", "0001.png"]
        assert all(Image.open(image).size == (64, 64) for image in images)
        assert images[0].read_bytes() != images[1].read_bytes()
    record = json.loads((folder / "samples.json").read_text())
    assert record["complete"] and record["settings"]["num_samples"] == 4
    settings = record["settings"]
    assert (settings["sampler"], settings["cfg_scale"], settings["cfg_channels"]) == (
        "dpm++",
        4.5,
        "all",
    )
    assert len(settings["text_encoder_sha256"]) == 64
    written = (folder / "samples.json").stat().st_mtime_ns
    sample(files, "all", *checkpoint)
    assert (folder / "samples.json").stat().st_mtime_ns == written  # it was complete
    before = {p: p.read_bytes() for p in folder.rglob("*.png")}
    (folder / "00001" / "samples" / "0000.png").unlink()
    sample(files, "all", *checkpoint, "--per-proc-batch-size", 3)
    pixels = (folder / "00001" / "samples" / "0000.png").read_bytes()
    assert pixels == before[folder / "00001" / "samples" / "0000.png"]


def test_checkpoints_know_what_embedded_their_captions(files, trained, tmp_path):
    """Another encoder is refused, the same elsewhere is not; files of before say nothing."""
    path = trained / "checkpoints" / "0000003.pt"
    state = torch.load(path, weights_only=True)
    held = open_latents(files / "latents").captions.manifest
    keys = ("text_encoder", "text_encoder_sha256")
    assert {key: state["plan"][key] for key in keys} == {key: held[key] for key in keys}
    write_encoder(tmp_path / "other", seed=1)
    another = encoder_sha256(tmp_path / "other")
    both = f"{files / 't5'} .sha256 {held[keys[1]][:12]}. there, {tmp_path / 'other'} .sha256 "
    other = ["--text-encoder", tmp_path / "other"]
    for more in (["--graft-fusion-ckpt-path", path], ["--config", trained / "finetuned.yaml"]):
        with pytest.raises(ValueError, match=f"another encoder .*{both}{another[:12]}.*name that"):
            sample(files, "another", *more, *other)
    assert not (files / "samples" / "another").exists()
    shutil.copytree(files / "t5", tmp_path / "moved")
    (tmp_path / "moved" / "text_encoder" / "README.md").write_text("moved")
    more = ["--graft-fusion-ckpt-path", path, "--text-encoder", tmp_path / "moved"]
    sample(files, "moved", *more, "--num-sampling-steps", 2)
    plan = load_plan(files / "runs" / "selected-PixArt-Mini" / "selected.yaml")
    told, flags = plan.with_encoder(str(tmp_path / "other"), another), Namespace(resume=path)
    with pytest.raises(ValueError, match=f"--resume .*{both}"):
        checkpoint.check(state | {"entry": checkpoint.entry_name()}, told, flags, {}, ())
    state["plan"] = plan.architecture()
    torch.save(state, tmp_path / "before.pt")
    model, _ = build_grafted(plan, weights=False)
    load_trained(model, told, tmp_path / "before.pt")


@torch.no_grad()
def test_draws_what_diffusers_pipeline_draws(files):
    """Up to the embeddings' rounding to float16; the same scheduler as the published pipeline's."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline
    from transformers import AutoTokenizer, T5EncoderModel

    pipeline = PixArtSigmaPipeline(
        tokenizer=AutoTokenizer.from_pretrained(files / "t5" / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(files / "t5" / "text_encoder"),
        vae=AutoencoderKL.from_pretrained(MINI / "vae"),
        transformer=PixArtTransformer2DModel.from_pretrained(files / "pixart"),
        scheduler=DPMSolverMultistepScheduler(
            beta_start=1e-4, beta_end=0.02, beta_schedule="linear", algorithm_type="dpmsolver++"
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    texts, start = ["A red circle", "the blue square"], X[:2]
    expected = pipeline(
        texts, latents=start.clone(), num_inference_steps=4, guidance_scale=4.5, height=64,
        width=64, use_resolution_binning=False, clean_caption=False, output_type="latent",
    ).images  # fmt: skip
    model, _ = build_grafted(load_plan(files / "plain.yaml"))
    prompts = Prompts([{"prompt": text} for text in texts], per_prompt=1)
    encoder = load_text_encoder(files / "t5", 300, torch.device("cpu"), torch.float32)
    prompts.embed(encoder, [0, 1])
    y = prompts.conditions(torch.arange(2)).guided()

    def model_fn(x, t):
        return model.eval().forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), y, 4.5)[:2]

    found = draw(model_fn, start.shape, sampler="dpm++", steps=4, start=start)
    assert (found - expected).norm() < 1e-3 * expected.norm()
    assert (found - start).norm() > start.norm()


@torch.no_grad()
def test_read_checkpoint_adds_low_rank_updates(files, tmp_path):
    plan = load_plan(files / "plan.yaml")
    torch.manual_seed(0)
    model = graft(build_model(plan), plan).eval()
    add_lora_around(model, plan, rank=4, alpha=6.0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    args = {"lora_rank": 4, "lora_alpha": 6.0}
    saved = {"model": model.state_dict(), "plan": plan.architecture(), "args": args}
    torch.save(saved, tmp_path / "lora.pt")
    loaded = graft(build_model(plan), plan).eval()
    load_trained(loaded, plan, tmp_path / "lora.pt")
    merge_lora(model)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=1e-5, atol=1e-6)
    assert not any("lora" in name for name in read_checkpoint(tmp_path / "lora.pt")[0])


def test_export_writes_diffusers_format(files, tmp_path):
    plan = load_plan(files / "plain.yaml")
    model, _ = build_grafted(plan)
    torch.save({"model": model.state_dict(), "plan": plan.architecture()}, tmp_path / "m.pt")
    export = ["--out", str(tmp_path / "exported"), str(tmp_path / "m.pt")]
    export_weights.main(export_weights.parse_args(export))
    found = PixArtTransformer2DModel.from_pretrained(tmp_path / "exported").state_dict()
    expected = {diffusers_name(n): t.half().float() for n, t in model.state_dict().items()}
    assert found.keys() == expected.keys()
    torch.testing.assert_close({n: t.float() for n, t in found.items()}, expected)
    for name in ("exported.pt", "exported.bin"):
        export[1] = str(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: name a .safetensors file, or of PixArt a"):
            export_weights.main(export_weights.parse_args(export))
        assert not (tmp_path / name).exists()


# -- files of text -------------------------------------------------------------

MARKED = "a\u2028red\u0085circle\x0cbig"  # marks at which str.splitlines parts a text


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["bare", "with a byte order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_prompts_and_captions_end_at_newlines_alone(tmp_path, start, end):
    texts = [MARKED, "the blue square"]
    files = {name: tmp_path / name for name in ("p.txt", "p.jsonl", "c.jsonl")}
    rows = [{"prompt": text, "file_name": f"{i}.png", "text": text} for i, text in enumerate(texts)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for name, held in (("p.txt", texts), ("p.jsonl", lines), ("c.jsonl", lines)):
        files[name].write_bytes((start + "".join(line + end for line in held)).encode())
    assert read_prompts(files["p.txt"], 1).rows == [{"prompt": text} for text in texts]
    assert read_prompts(files["p.jsonl"], 1).rows == rows
    assert read_captions(files["c.jsonl"]) == {"0.png": MARKED, "1.png": "the blue square"}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_text_that_is_not_utf8_is_one_error(tmp_path, encoding):
    line = 1 if encoding == "utf-16" else 2
    for name, flag, read in (
        ("p.txt", "--prompts", lambda path: read_prompts(path, 1)),
        ("c.jsonl", "--captions", read_captions),
    ):
        path = tmp_path / name
        path.write_text('{"file_name": "0.png", "text": "a"}\ncaf\xe9\n', encoding=encoding)
        with pytest.raises(ValueError, match="is not UTF-8 .*; save the file in that") as error:
            read(path)
        assert str(error.value).startswith(f"{flag} {path}, line {line}: ")


# -- bad input -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (slice(2, None), "2 of the 12 pictures of .* have no caption: 0.png, sub/1.png; add rows"),
        (slice(9, None), "9 of the 12 pictures .*: 0.png, 2.png, 4.png, 6.png and 5 more"),
        ('{"file_name": "0.png"}', "line 14: .* is no .*caption"),
        ('{"file_name": "0.png", "text": "a", "caption": "b"}', "line 14: .* is no .*caption"),
        ('{"file_name": "0.png", "text": "again"}', "line 14: 0.png has a caption already"),
        ("no JSON", "line 14: is not JSON"),
    ],
)
def test_bad_captions_are_one_error(files, tmp_path, rows, message):
    lines = (files / "captions.jsonl").read_text().splitlines()
    lines = [*lines, rows] if isinstance(rows, str) else lines[rows]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        extract(files, tmp_path / "out", "--captions", tmp_path / "bad.jsonl")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_classes": 9}, "num_classes: PixArt-Mini is told captions, not classes"),
        ({"image_size": 128}, "image_size 128: PixArt-Mini makes images of 64 px"),
        ({"dit_model_name": "DiT-Mini/2"}, "text_encoder: DiT-Mini/2 is told classes"),
    ],
)
def test_bad_plans_are_refused(files, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        load_plan(write_plan(tmp_path / "bad.yaml", files, **more))


def test_pairs_are_of_dit_alone(files, tmp_path):
    path = write_plan(tmp_path / "pairs.yaml", files)
    path.write_text(path.read_text() + "restructure: parallel_pairs\n")
    with pytest.raises(ValueError, match="restructure: only DiT has parallel pairs"):
        load_plan(path)


def test_base_of_another_resolution_is_refused(files, tmp_path):
    config = {**CONFIG, "sample_size": 32}
    PixArtTransformer2DModel(**config).save_pretrained(tmp_path / "pixart")
    path = write_plan(tmp_path / "p.yaml", files, base_ckpt_path=str(tmp_path / "pixart"))
    with pytest.raises(ValueError, match="config.json: sample_size is 32; PixArt-Mini of"):
        build_grafted(load_plan(path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "is told what to draw by --prompts"),
        (["--prompts", "prompts.doc"], "name a .txt file of one prompt a line"),
        (["--prompts", "gone.txt"], "--prompts gone.txt: no such file"),
        (["--prompts", "PROMPTS", "--cfg-channels", "3"], "--cfg-channels 3: PixArt-Mini"),
        (["--prompts", "PROMPTS", "--labels", "PROMPTS"], ": PixArt-Mini is told prompts; drop it"),
        (
            ["--prompts", "PROMPTS", "--text-encoder", "WIDE"],
            "are 40 wide; PixArt-Mini of",
        ),
        (["--prompts", "PROMPTS", "--text-encoder", "gone"], "--text-encoder gone: no such file"),
        (["--prompts", "EMPTY"], "holds no prompt"),
    ],
)
def test_bad_sampling_is_one_error(files, tmp_path, flags, message):
    names = {"PROMPTS": files / "prompts.jsonl", "WIDE": tmp_path / "wide"}
    names["EMPTY"] = tmp_path / "empty.txt"
    names["EMPTY"].write_text("\n\n")
    if "WIDE" in flags:
        write_encoder(tmp_path / "wide", seed=0, width=40)
    flags = [names.get(flag, flag) for flag in flags]
    common = ["--config", files / "plain.yaml", "--sample-dir", tmp_path / "samples"]
    error = refused_here("sample_ddp_finetuned.py", *common, *flags)
    assert len(error.strip().splitlines()) == 1
    assert message in error, error
    assert not (tmp_path / "samples").exists()


def test_prompts_are_not_for_classes():
    flags = ["--config", "configs/mini/base.yaml", "--prompts", "p.txt"]
    assert "DiT-Mini/2 is told classes" in refused_here("sample_ddp_finetuned.py", *flags)
