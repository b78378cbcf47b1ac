"""Which blocks the guesses graft, and that the YAMLs they write build the models they name."""

import json

import pytest
import torch
import yaml

from models.config_files import REPOSITORY
from models.grafting import build_grafted
from models.plan import load_plan, read_yaml
from scripts import guess_plans
from scripts.guess_plans import pick

ALL = list(range(28))
CONFIGS = REPOSITORY / "configs"
MINI = CONFIGS / "mini/75p_swa.yaml"
CANDIDATES = load_plan(MINI).grafted_blocks()  # all but 0, 4, 8, ...


def guess(out, *flags, config=MINI):
    """Runs the script; plan by file stem."""
    flags = ("--config", config, "--out", out, *flags)
    guess_plans.main(guess_plans.parse_args([str(flag) for flag in flags]))
    return {path.stem: load_plan(path) for path in out.glob("*.yaml")}


# -- patterns ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["50p_swa", "75p_swa", "50p_mlp_ratio_3", "75p_hyena_x"])
def test_interleaved_is_the_papers_pattern(name):
    blocks = load_plan(CONFIGS / f"{name}.yaml").grafted_blocks()
    assert tuple(pick("interleaved", ALL, len(blocks), 28)) == blocks


def test_patterns_by_depth():
    assert pick("interleaved", ALL, 7, 28) == [3, 7, 11, 15, 19, 23, 27]
    assert pick("interleaved", ALL, 28, 28) == ALL
    assert pick("deep", ALL, 14, 28) == ALL[14:] and pick("shallow", ALL, 3, 28) == [0, 1, 2]
    for n in range(1, 29):
        gaps = pick("interleaved", ALL, n, 28)
        assert len(gaps) == n and gaps[-1] == 27
        assert len({b - a for a, b in zip(gaps, gaps[1:], strict=False)}) <= 2


def test_local_patterns_take_the_ends_of_the_order():
    mass = [0.5, 0.9, 0.1, 0.5, 0.7, 0.2]
    blocks = list(range(6))
    assert pick("top-local", blocks, 2, 6, mass) == [1, 4]
    assert pick("low-local", blocks, 2, 6, mass) == [2, 5]
    assert pick("top-local", blocks, 3, 6, mass) == [0, 1, 4]  # 0 before its equal, 3
    assert pick("low-local", blocks, 3, 6, mass) == [0, 2, 5]
    assert pick("top-local", [0, 2, 5], 1, 6, [0.5, None, 0.1, None, None, 0.2]) == [0]


def test_random_is_the_same_everywhere():
    first = [0, 2, 4, 5, 8, 11, 12, 13, 14, 18, 21, 24, 25, 26]
    assert pick("random", ALL, 14, 28, seed=0) == first
    drawn = [pick("random", ALL, 14, 28, seed=s) for s in range(200)]
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=28)
    assert (counts - 100).abs().max() < 5 * 50**0.5  # five standard deviations
    assert set(pick("random", [3, 5, 7], 3, 28, seed=1)) == {3, 5, 7}


def test_interleaved_within_takes_the_nearest_free_block():
    assert pick("interleaved", [0, 2, 4, 6, 7], 3, 8) == [2, 4, 7]  # of 2, 5, 7
    assert pick("interleaved", [0, 1, 2], 3, 8) == [0, 1, 2]
    assert pick("interleaved", CANDIDATES, 14, 28) == ALL[1::2]


# -- files ---------------------------------------------------------------------


@pytest.fixture
def locality(tmp_path):
    """A locality.json of DiT-Mini/2 whose L_8 grows with the block, and whose L_4 falls."""
    blocks = [{"block": b, "mass": {"4": 1 - b / 28, "8": b / 28}} for b in ALL]
    content = {"plan": {"model_name": "DiT-Mini/2", "image_size": 64}, "num_tokens": 64}
    path = tmp_path / "locality.json"
    path.write_text(json.dumps({**content, "blocks": blocks}))
    return path


def test_one_loadable_plan_a_pattern(tmp_path, locality):
    flags = ("--locality", locality, "--seeds", 0, 7)
    plans = guess(tmp_path / "out", "--keep", 14, *flags)
    blocks = {name: list(plan.grafted_blocks()) for name, plan in plans.items()}
    assert blocks == {
        "interleaved": ALL[1::2],
        "deep": ALL[14:],
        "shallow": ALL[:14],
        "top-local": ALL[14:],
        "low-local": ALL[:14],
        "random_0": pick("random", ALL, 14, 28, seed=0),
        "random_7": pick("random", ALL, 14, 28, seed=7),
    }
    for plan in plans.values():
        assert (
            plan.graft_init == "inherit"
            and plan.grafts[0].config == load_plan(MINI).grafts[0].config
        )
    text = (tmp_path / "out" / "top-local.yaml").read_text()
    assert text.startswith("# The guess top-local, ") and "75p_swa.yaml and L_8 of locality" in text
    model, report = build_grafted(plans["shallow"])
    assert report.sources["blocks.0.attn.Wqkv.weight"] == "inherited"
    assert report.sources["blocks.27.attn.qkv.weight"] == "base"


def test_band_ratio_and_within(tmp_path, locality):
    flags = ("--patterns", "top-local", "deep", "--locality", locality, "--within")
    plans = guess(tmp_path / "out", "--ratio", 0.25, "--band", 4, *flags)
    assert plans["top-local"].grafted_blocks() == CANDIDATES[:7]
    assert plans["deep"].grafted_blocks() == CANDIDATES[-7:]


def candidate(folder, source=MINI, **changes):
    """A copy of a config in `folder`, changed; paths lead from the repository."""
    content = read_yaml(source)
    content["operator"]["config_filepath"] = str(
        source.parent / content["operator"]["config_filepath"]
    )
    content["sample_config"].update(changes)
    path = folder / "candidate.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_checkpoint_without_the_graft_is_noticed(tmp_path):
    model, _ = build_grafted(load_plan(MINI))
    torch.save({"model": model.state_dict()}, tmp_path / "75p.pt")
    config = candidate(tmp_path, grafted_dit_ckpt_path="75p.pt", graft_init=None)
    flags = ("--keep", 14, "--patterns", "deep", "interleaved")
    with pytest.raises(ValueError, match=r"patterns: deep \[16, 20, 24\]\. .*--within.*inherit"):
        guess(tmp_path / "out", *flags, config=config)
    assert not (tmp_path / "out").exists()
    within = guess(tmp_path / "within", *flags, "--within", config=config)
    assert build_grafted(within["deep"])[1].counts().get("inherited") is None
    plans = guess(tmp_path / "out", *flags, "--graft-init", "inherit", config=config)
    assert (tmp_path / "out" / "deep.yaml").read_text().startswith("# The guess deep, ")
    sources = build_grafted(plans["deep"])[1].sources
    place = "blocks.{}.attn.{}.weight".format
    assert sources[place(16, "Wqkv")] == "inherited" and sources[place(15, "Wqkv")] == "checkpoint"
    assert sources[place(1, "qkv")] == "base" and sources[place(0, "qkv")] == "checkpoint"


def test_distilled_weights_follow_their_blocks(tmp_path):
    weights = {b: f"distilled/{b}.pt" for b in CANDIDATES}
    config = candidate(tmp_path, graft_weights=weights, graft_init=None)
    with pytest.raises(ValueError, match=r"shallow \[0, 4, 8, 12\]"):
        guess(tmp_path / "out", "--keep", 14, "--patterns", "shallow", config=config)
    flags = ("--patterns", "shallow", "--graft-init", "fresh")
    plan = guess(tmp_path / "out", "--keep", 14, *flags, config=config)["shallow"]
    assert sorted(b for b, _ in plan.graft_weights) == [b for b in CANDIDATES if b < 14]
    assert plan.graft_init == "fresh"


def test_of_a_hybrid_one_slot_moves(tmp_path):
    content = read_yaml(MINI)
    swa = {**content.pop("operator"), "graft_indexes": [1, 2]}
    swa["config_filepath"] = str(MINI.parent / "swa.yaml")
    mlp = {"type": "mlp", "name": "mlp", "graft_indexes": [5, 6]}
    mlp["config_filepath"] = "mlp.yaml"
    (tmp_path / "mlp.yaml").write_text("expansion_ratio: 6\n")
    del content["sample_config"]["graft_indexes"]
    content["grafts"] = [swa, mlp]
    config = tmp_path / "hybrid.yaml"
    config.write_text(yaml.safe_dump(content))
    flags = ("--keep", 25, "--patterns", "deep")
    with pytest.raises(ValueError, match="swa in mha, mlp in mlp: .* or --slot"):
        guess(tmp_path / "out", *flags, config=config)
    plan = guess(tmp_path / "out", *flags, "--slot", "mha", config=config)["deep"]
    assert plan.grafted_blocks("mha") == (25, 26, 27) and plan.grafted_blocks("mlp") == (5, 6)


REFUSED = {
    "no locality": (("--keep", 14), "make it with: .*attention_locality.py .*75p_swa.yaml"),
    "no such file": (("--keep", 14, "--locality", "x/l.json"), "attention_locality.py .*--out x"),
    "band": (("--keep", 14, "--band", 5, "--locality", "FILE"), "no L_5; --band takes 4 8, or"),
    "nothing": (("--keep", 28), "--keep 28: grafts 0 of 28 blocks"),
    "too much": (("--keep", 30), "--keep 30: grafts -2 of 28 blocks"),
    "within": (("--ratio", 0.9, "--within"), "--within: 25 grafts, but .* grafts 21 blocks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case, tmp_path, locality):
    flags, words = REFUSED[case]
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        guess(tmp_path / "out", *(locality if flag == "FILE" else flag for flag in flags))


def test_refuses_what_cannot_order_the_blocks(tmp_path, locality):
    flags = ("--keep", 14, "--locality", locality)
    with pytest.raises(ValueError, match="model_name DiT-Mini/2; make that of .*75p_swa.yaml"):
        guess(tmp_path / "out", *flags, config=CONFIGS / "75p_swa.yaml")
    with pytest.raises(ValueError, match="order attention"):
        guess(tmp_path / "out", *flags, config=CONFIGS / "75p_mlp_ratio_3.yaml")
    with pytest.raises(ValueError, match="mamba2 shares no tensor"):
        guess(
            tmp_path / "out", *flags, "--graft-init", "inherit", config=CONFIGS / "75p_mamba2.yaml"
        )
    content = json.loads(locality.read_text())
    content["blocks"][3]["mass"] = None
    locality.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"blocks \[3\] held no attention"):
        guess(tmp_path / "out", *flags)
    locality.write_text("{}")
    with pytest.raises(ValueError, match="is no locality.json"):
        guess(tmp_path / "out", *flags)
