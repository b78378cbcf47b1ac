"""Parameters and FLOPs: the paper's table, the full count, and whole models."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import costs
from models.config_files import REPOSITORY, read_yaml
from models.operators import complete_config
from models.plan import load_plan
from scripts import profile_grafts

D, N, H = 1152, 256, 16


@pytest.fixture(scope="module")
def table():
    return {(row["label"], row["share"]): row for row in costs.paper_table()}


# arXiv 2506.05340, Table 4: op / ft / params at 50, 75 and 100 %
TABLE = """
Hyena-SE | -49.52 / +0.13 / +0.22 | -74.27 / +0.20 / +0.33 | -99.03 / +0.26 / +0.43
Hyena-X | -49.90 / +0.13 / +0.16 | -74.85 / +0.20 / +0.24 | -99.81 / +0.26 / +0.33
Hyena-Y | -49.52 / 0 / +0.05 | -74.27 / 0 / +0.08 | -99.03 / 0 / +0.11
SWA w=4 | -48.24 / 0 / 0 | -72.36 / 0 / 0 | -96.48 / 0 / 0
Mamba-2 | -37.59 / +77.89 / +28.02 | -56.38 / +116.83 / +42.04 | -75.17 / +155.77 / +56.05
MLP r=3 | -12.50 / 0 / -12.50 | -18.75 / 0 / -18.75 | -25.00 / 0 / -25.00
MLP r=6 | +25.00 / 0 / +25.00 | +37.50 / 0 / +37.50 | +50.00 / 0 / +50.00
MLP Hyena-X r=2 | +0.01 / 0 / +0.02 | +0.02 / 0 / +0.03 | +0.02 / 0 / +0.03
"""
ENTRIES = [
    (label.strip(), share, [float(x) for x in cell.split("/")])
    for label, *cells in (line.split("|") for line in TABLE.strip().splitlines())
    for share, cell in zip((50, 75, 100), cells, strict=True)
]


@pytest.mark.parametrize("label, share, figures", ENTRIES)
def test_paper_count_gives_every_published_entry(table, label, share, figures):
    row = table[label, share]
    assert row["published"] == figures
    assert row["paper"] == pytest.approx(figures, abs=0.01)
    assert row["full"][2] == row["paper"][2]


def test_every_entry_but_two_rounds_to_the_published_one(table):
    off = [
        (*key, name)
        for key, row in table.items()
        for name, ours, theirs in zip(
            ("op", "ft", "params"), row["paper"], row["published"], strict=True
        )
        if abs(ours - theirs) > 0.005
    ]
    assert off == [("Mamba-2", 50, "ft"), ("MLP r=6", 100, "params")]


def test_mamba2_ft_is_published_as_a_share(table):
    row = table["Mamba-2", 100]
    assert row["paper"][1] == pytest.approx(155.77, abs=0.005)
    assert row["ft_difference"] == pytest.approx(55.77, abs=0.005)
    # with convolution, its bias and SiLU
    convolution = (2 * 4 + 2) * 2432
    projections = 2 * D * (2 * 2304 + 2 * 64 + 144 + 2304)
    full = 100 * (projections + convolution) / (2 * 4 * D * D + 4 * D) - 100
    assert row["full"][1] == pytest.approx(full)
    others = [r for r in table.values() if r["label"] != "Mamba-2"]
    assert all(r["ft_difference"] == r["paper"][1] for r in others)


def test_convolution_of_mlp_hyena_x_is_in_the_full_count_only(table):
    row = table["MLP Hyena-X r=2", 100]
    assert row["paper"][0] == pytest.approx(100 * 4 / (16 * D))
    gates, convolution, biases, gelu = 4 * D, 48 * D + 6 * D, 7 * D, 4 * D
    full = (16 * D * D + gates + convolution + biases) / (16 * D * D + 5 * D + gelu)
    assert row["full"][0] == pytest.approx(100 * full - 100)


def config_of(operator, file):
    sizes = {"hidden_size": D, "num_heads": H, "num_tokens": N}
    return complete_config(operator, read_yaml(REPOSITORY / "configs" / file), **sizes)


def test_full_count_of_windows_is_that_of_the_pairs_in_them():
    config = config_of("swa", "sequence_mixers/swa.yaml")
    pairs = sum(abs(i - j) <= 4 for i in range(N) for j in range(N))
    core = costs.operator_cost("swa", config, N).core
    assert core.flops * N == pytest.approx(pairs * (4 * D + 2 * H))
    short = costs.operator_cost("swa", config, 3)  # all within the window
    assert short.core == costs.operator_cost("mha", config_of("mha", MHA), 3).core


MHA = "sequence_mixers/mha_timm.yaml"


def test_full_count_of_mamba2_holds_update_and_readout():
    config = config_of("mamba2", "sequence_mixers/mamba2.yaml")
    inner, state, heads = 2304, 64, 144
    core = costs.operator_cost("mamba2", config, N).core
    assert core.multiply_adds == 2 * inner * state + inner + inner  # and D skip, mean square
    assert core.other == inner * state + inner + 4 * heads + 4 * inner
    paper = costs.operator_cost("mamba2", config, N, "paper").core
    assert paper.flops == 2 * inner * state
    assert costs.operator_cost("mamba2", config, N).parameters == 8_290_864


def test_unknown_count_is_refused():
    with pytest.raises(ValueError, match="count 'half': choose one of paper, full"):
        costs.operator_cost("mha", config_of("mha", MHA), N, "half")


def test_plain_model_is_what_the_literature_says():
    plan = load_plan(REPOSITORY / "configs" / "50p_swa.yaml")
    cost = costs.model_cost(costs.plain(plan))
    assert cost.parameters == 675_129_632
    assert round(cost.work.multiply_adds / 1e9, 1) == 118.6
    model = costs.meta_model(costs.plain(plan))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long))
    assert counter.get_total_flops() == 2 * cost.work.multiply_adds


@pytest.mark.parametrize(
    "name", ["50p_hyena_se", "75p_mamba2", "75p_mlp_hyena_x", "100p_mlp_ratio_6"]
)
def test_grafted_model_is_the_plain_one_and_the_changes(name):
    plan = load_plan(REPOSITORY / "configs" / f"{name}.yaml")
    before, after = costs.model_cost(costs.plain(plan)), costs.model_cost(plan)
    ((slot, full),) = costs.slot_changes(plan, "full").items()
    original = costs.original_cost(slot, D, H, N, "full")
    core = full.op / 100 * original.core.flops
    projections = full.ft / 100 * original.projections.flops
    gained = 28 * N * (core + projections)
    assert after.work.flops - before.work.flops == pytest.approx(gained, rel=1e-6)
    gained = 28 * full.params / 100 * original.parameters
    assert after.parameters - before.parameters == pytest.approx(gained, rel=1e-6)


def test_hybrid_adds_up(tmp_path):
    folder = REPOSITORY / "configs"
    (tmp_path / "hybrid.yaml").write_text(
        "grafts:\n"
        f"- {{type: mha, name: swa, config_filepath: {folder}/sequence_mixers/swa.yaml,"
        " graft_indexes: [0, 1, 2, 3, 4, 5, 6]}\n"
        f"- {{type: mha, name: hyena_x, config_filepath: {folder}/sequence_mixers/hyena_x.yaml,"
        " graft_indexes: [7, 8, 9, 10, 11, 12, 13]}\n"
        f"- {{type: mlp, name: mlp, config_filepath: {folder}/channel_mixers/mlp_ratio_3.yaml,"
        " graft_indexes: [0, 27]}\n"
        "sample_config: {dit_model_name: DiT-XL/2, image_size: 256}\n"
    )
    changes = costs.slot_changes(load_plan(tmp_path / "hybrid.yaml"), "paper")
    assert changes["mha"].op == pytest.approx(-(96.484375 + 99.806035) / 4)
    assert changes["mha"].params == pytest.approx(100 * 17_280 / 5_313_024 / 4)
    assert changes["mlp"].op == pytest.approx(-25 * 2 / 28)


def run(capsys, *argv):
    profile_grafts.main(profile_grafts.parse_args(list(argv)))
    return capsys.readouterr().out


def test_table_is_printed_with_its_footnotes(capsys):
    text = run(capsys, "--table")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 24 and len({row.count("|") for row in rows}) == 1
    mamba = next(row for row in rows if row.startswith("| Mamba-2") and "100 %" in row)
    assert "+155.77 (1)" in mamba
    assert "+27.88 / +41.83 / +55.77 %" in text
    assert "(2) The paper counts the two gates of MLP Hyena-X and not its convolution" in text


def test_json_holds_the_same_for_machines(capsys):
    stored = json.loads(run(capsys, "--json", str(REPOSITORY / "configs" / "75p_hyena_x.yaml")))
    rows = stored["rows"]
    assert stored["torch"] == torch.__version__
    assert rows[0]["parameters"] == 675_129_632 + 21 * 17_280
    assert rows[0]["plain"]["parameters"] == 675_129_632
    assert rows[0]["changes"]["paper"]["mha"]["op"] == pytest.approx(-74.85, abs=0.005)
    assert len(json.loads(run(capsys, "--json", "--table"))["rows"]) == 24


def test_plain_rows_of_several_models_name_them(capsys):
    folder = REPOSITORY / "configs"
    names = "pixart_hyena_x_512", "50p_swa", "pixart_hyena_x_1024", "75p_swa"
    text = run(capsys, *(str(folder / f"{name}.yaml") for name in names))
    table = text.split("\n\n")[1].splitlines()[2:]
    plain = ["PixArt-Sigma-XL-2-512 at 512 px", "DiT-XL/2 at 256 px"]
    plain.append("PixArt-Sigma-XL-2-1024 at 1024 px")
    first = [row.split("|")[1].strip() for row in table]
    assert [name for name in first if name.startswith("plain")] == [f"plain {n}" for n in plain]
    assert len(first) == len({*first}) == 7
    table = run(capsys, str(folder / "50p_swa.yaml"), str(folder / "75p_swa.yaml")).split("\n\n")[1]
    assert [row.split()[1] for row in table.splitlines()[2:]].count("plain") == 1


def test_config_without_grafts_has_no_changes(capsys):
    text = run(capsys, str(REPOSITORY / "configs" / "mini" / "no_graft.yaml"))
    assert "8,409,504 |  1.0000" in text and "slot" not in text


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--table", "--latency"], "name some instead of --table"),
        ([], "give either --table or graft YAMLs"),
        (["--table", "x.yaml"], "give either --table or graft YAMLs"),
    ],
)
def test_contradicting_flags_are_refused(argv, message):
    with pytest.raises(ValueError, match=message):
        profile_grafts.main(profile_grafts.parse_args(argv))


def test_latency_has_a_column_for_each_batch(capsys, monkeypatch):
    monkeypatch.setitem(profile_grafts.FORWARDS, "cpu", (1, 2, 1))
    config = str(REPOSITORY / "configs" / "mini" / "parallel_pairs.yaml")
    flags = ["--latency", "--device", "cpu", "--batch", "1", "2"]
    text = run(capsys, config, *flags)
    assert "| ms at batch 1 | x plain | ms at batch 2 | x plain |" in text
    assert text.splitlines()[5].count("|") == text.splitlines()[2].count("|") == 12
    stored = json.loads(run(capsys, config, *flags, "--json"))
    row = stored["rows"][0]
    assert stored["hardware"].endswith("(cpu)")
    for found in (row["latency_ms"], row["plain"]["latency_ms"]):
        assert found.keys() == {"1", "2"} and min(found.values()) > 0
