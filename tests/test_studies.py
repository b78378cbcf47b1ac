"""The reports of scripts/*_study.py, on results made by hand."""

import json
import os
import re
import sys
from argparse import Namespace

import pytest
from PIL import Image

import prune_by_learning
from models.plan import load_plan, write_plan
from scripts import (
    distillation_study,
    restructuring_study,
    road_table,
    selection_page,
    selection_study,
    testbed,
)

SETTINGS = {"steps": 5, "distill_steps": 7, "selection_steps": 3, "batch": 2, "num_samples": 9}
MADE = {"settings": SETTINGS, "git_revision": "0123456789", "torch": "2.11.0"}
MADE |= {"seconds": 1800.0, "stage_one": None}
DEEP, SHALLOW = list(range(14, 28)), list(range(14))


def write(folder, name, **record):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**MADE, **record}))


def empty_page(folder, script):
    page = folder / "page.md"
    page.write_text(
        f"above\n<!-- results: written by {script} -->\nstale\n<!-- end of results -->\n"
    )
    return page


def rows(page, first):
    """The cells of the table rows that begin with the words of `first`, in their order."""
    lines = [line.strip("| ").split(" | ") for line in page.read_text().splitlines()]
    return [cells for cells in lines if cells[: len(first)] == list(first)]


def choose(kept):
    """Grafted blocks of 2:4 whose first group keeps 0 and `kept`; the other groups are alike."""
    return [b for b in range(28) if b not in ({0, kept} if b < 4 else {b - b % 4, b - b % 4 + 1})]


@pytest.fixture
def selections(tmp_path):
    """Two seeds of no graft, deep, shallow and learned; the learned ones differ in one block."""
    answer = {"confidence": [0.5, 1.0] + [0.6] * 5, "agreement": [1.0] * 7}
    for seed in (0, 1):
        learned = choose((2, 3)[seed])
        for operator, pattern, grafted, train, fd, selection in (
            ("none", "base", [], 0.02, 5.0, None),
            ("swa", "deep", DEEP, 0.05, 4.0, None),
            ("swa", "shallow", SHALLOW, 0.07, 7.0 - 4 * seed, None),
            ("swa", "learned", learned, 0.03, 5.0 - seed, answer),
        ):
            write(
                tmp_path / "results",
                f"{operator}-{pattern}-{seed}",
                operator=operator,
                pattern=pattern,
                seed=seed,
                grafted=grafted,
                train_mse=train + 0.002 * seed,
                heldout_mse=0.4 - train,
                fd_mini=fd,
                selection=selection,
            )
    page = empty_page(tmp_path, "scripts/selection_study.py")
    return Namespace(results=tmp_path / "results", page=page)


def test_selection_page(selections):
    (selections.page.parent / "images").mkdir()
    selection_study.report(selections)
    text = selections.page.read_text()
    assert text.startswith("above\n<!-- results") and "stale" not in text
    assert "3 steps of selection, 7 distillation steps and 5 finetuning steps of 2 images" in text
    assert "at revision 01234567 with PyTorch 2.11.0" in text
    assert "training MSE of 0.021 and a held-out MSE of 0.380, 18.1 times as much" in text
    names = ["no graft", "**learned**", "deep", "shallow"]  # by training MSE
    table = text.split("| selection | cases |")[1].splitlines()[2:6]
    assert [row.strip("| ").split(" | ")[0] for row in table] == names
    assert rows(selections.page, ["deep"]) == [
        ["deep", "2", "0.05100 ± 0.00141", "0.35000 ± 0.00000", "4.000 ± 0.000"]
    ]
    duels = {cells[2]: cells[3:] for cells in rows(selections.page, ["swa", "learned"])[:3]}
    assert duels["training MSE"] == ["2 of 2", "2 of 2"]
    assert duels["fd_mini"] == ["0 of 2", "1 of 2"]  # 4.0 is not below 4.0; 5.0 < 7.0, 4.0 > 3.0
    for name in ("selection_study", "selection_blocks"):
        with Image.open(selections.page.parent / "images" / f"{name}.png") as picture:
            assert min(picture.size) > 200


def test_variations_stand_in_a_table_of_their_own(selections, monkeypatch):
    (selections.page.parent / "images").mkdir()
    selection_study.report(selections)
    plain = selections.page.read_text()
    assert "learned otherwise" not in plain
    monkeypatch.setattr(selection_study, "VARIED", "learned")
    write(
        selections.results,
        "swa-long-0",
        operator="swa",
        pattern="long",
        seed=0,
        grafted=choose(1),
        train_mse=0.01,
        heldout_mse=0.375,
        fd_mini=5.5,
        selection={"confidence": [0.5] * 7, "agreement": [0.25] * 7},
    )
    selection_study.report(selections)
    # seed 0 of learned has 0.03, 0.37 and 5.0, and keeps 2 where this keeps 1
    changes = ["-0.02000", "+0.00500", "+0.500", "1.0 of 14", "0.50", "0.25"]
    assert rows(selections.page, ["swa", "long"]) == [
        ["swa", "long", "`--max-steps 1800`", "1", *changes]
    ]
    flags = "`--gate-lr 0.003 --tau-range 4 0.1 --lora-rank 8 --max-steps 3 --global-batch-size 2`"
    means = ["0.03100", "0.37000", "4.500", "-", "0.64", "1.00"]
    assert rows(selections.page, ["swa", "learned"])[-1] == ["swa", "learned", flags, "2", *means]
    assert "| swa | deep |" not in selections.page.read_text().partition("learned otherwise")[2]


def test_a_variation_is_compared_on_its_own_seeds(selections):
    records = [r for r in testbed.results(selections.results) if r["pattern"] == "learned"]
    other = {"grafted": choose(2), "train_mse": 0.04, "heldout_mse": 0.4, "fd_mini": 5.0}
    other |= {"selection": records[0]["selection"]}
    varied = {("swa", "long"): [other | {"seed": 1}, other | {"seed": 2}]}  # there is no base of 2
    told = {"learned": ["--a", 1], "long": ["--a", 2]}
    groups = {("swa", "learned"): records}
    table = selection_page.variations_table(["swa"], groups, varied, "learned", told)
    row = table.splitlines()[-1].strip("| ").split(" | ")
    assert row[:8] == ["swa", "long", "`--a 2`", "1", "+0.00800", "+0.03000", "+1.000", "1.0 of 14"]


@pytest.fixture
def learned_with(tmp_path, monkeypatch):
    """A function: a selection of the study -> what its entry reads from its flags."""
    monkeypatch.setattr(sys, "argv", ["selection_study.py", "run", "--work", str(tmp_path)])
    args = selection_study.parse_args()
    plan = tmp_path / "plans/swa/distilled.yaml"
    plan.parent.mkdir(parents=True)
    write_plan(load_plan(selection_study.configured("swa")), plan, {})

    def parse(*command):
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        flags = vars(prune_by_learning.parse_args())
        run = tmp_path / "runs" / f"{flags.pop('prefix')}-DiT-Mini-2"
        run.mkdir(parents=True)
        (run / "selection.json").write_text(json.dumps(flags))

    def read(pattern):
        monkeypatch.setattr(testbed, "entry", parse)
        return selection_study.learn(("swa", pattern, 0), args)[1]

    return read


def test_every_variation_is_learned_with_its_own_flags_alone(learned_with):
    base = learned_with(selection_study.VARIED)
    assert base["gate_lr"] == 0.003 and base["groups"] == "2:4"
    for name, (flag, *values) in selection_study.VARIATIONS.items():
        found = learned_with(name)
        differing = {key: value for key, value in found.items() if value != base[key]}
        value = values[0] if len(values) == 1 else values
        assert differing == {flag.strip("-").replace("-", "_"): value}, name


def test_how_far_the_numbers_of_selections_carry(selections):
    (selections.page.parent / "images").mkdir()
    selection_study.report(selections)
    spread = rows(selections.page, ["swa"])[-2]
    # deep and shallow alone have one plan for both seeds: fd_mini has variances of 0 and 8
    assert spread == ["swa", "0.00141", "0.00000", "2.000", "4.500 to 4.500", "-1.00", "+0.50"]
    gates = rows(selections.page, ["swa"])[-1]
    # three candidates a group, one kept; 2 and 3 of 21 blocks differ; chance is 5/9 of each
    assert gates == ["swa", "learned", "2", "3", "0.64", "1.00", "90%", "56%"]


def test_rows_of_the_strip_plot(selections):
    records = testbed.results(selections.results)
    groups = {}
    for record in records:
        groups.setdefault((record["operator"], record["pattern"]), []).append(record)
    found = selection_page.strips("swa", groups)
    assert [(name, grafted, chosen) for name, grafted, chosen, _ in found] == [
        ("learned, seed 0", choose(2), True),
        ("learned, seed 1", choose(3), True),
        ("deep", DEEP, False),
        ("shallow", SHALLOW, False),
    ]
    assert found[2][3] == pytest.approx(0.051)


def test_selections_without_the_ungrafted_model_are_refused(selections):
    for seed in (0, 1):
        (selections.results / f"none-base-{seed}.json").unlink()
    with pytest.raises(ValueError, match="needs cases with a graft and without: go on with `run`"):
        selection_study.report(selections)


@pytest.fixture
def distillations(tmp_path):
    """no graft, a self-graft, and swa at 75 % in four ways."""
    cases = [("none", 0, "base", "none", 0, 0.01), ("none", 0, "base", "finetune", 0, 0.02)]
    cases += [("mha-l2", 75, "distilled", "none", seed, 0.1 + 0.2 * seed) for seed in (0, 1)]
    cases += [("swa-l1", 75, "fresh", "none", 0, 0.9), ("swa-l1", 75, "inherit", "none", 0, 0.8)]
    cases += [
        ("swa-l1", 75, "distilled", "finetune", seed, mse)
        for seed, mse in enumerate((0.3, 0.4, 0.8))
    ]
    cases += [("swa-l1", 75, "distilled", "kd", 0, 0.25)]
    for key, percent, start, training, seed, mse in cases:
        write(
            tmp_path / "results",
            f"{key}-{percent}-{start}-{training}-{seed}",
            distillation=key,
            percent=percent,
            start=start,
            training=training,
            seed=seed,
            train_mse=mse,
            heldout_mse=2 * mse,
            fd_mini=10 * mse,
        )
    page = empty_page(tmp_path, "scripts/distillation_study.py")
    return Namespace(results=tmp_path / "results", page=page)


def test_distillation_page(distillations):
    distillation_study.report(distillations)
    text = distillations.page.read_text()
    assert "**training MSE** (no graft: 0.01000, finetuned 0.02000):" in text
    assert rows(distillations.page, ["no graft"]) == [
        ["no graft", "", "1", "0.01000", "0.02000", "0.100"]
    ]
    deviation = "0.20000 ± 0.14142"
    assert rows(distillations.page, ["mha"]) == [
        ["mha", "l2", "2", deviation, "0.40000 ± 0.28284", "2.000 ± 1.414"]
    ]
    train, heldout, fd = rows(distillations.page, ["swa"])
    assert train == ["swa", "75 %", "1 to 3", "0.90000", "0.80000", "-", "-", "-"] + [
        "0.50000 ± 0.26458",
        "0.25000",
    ]
    assert heldout[3] == "1.80000" and fd[-2:] == ["5.000 ± 2.646", "2.500"]
    column = "| distilled, finetuned | distilled, finetuned with KD |\n"
    assert text.count(column) == 3


def test_every_case_of_the_distillation_study_is_of_the_report(tmp_path):
    """No case is measured and then left out of the page."""
    args = Namespace(seeds=[0], operators=distillation_study.SWAPS, main=["swa"], self_grafts=True)
    wanted = distillation_study.cases(args)
    assert len(wanted) == len(set(wanted))
    for number, (key, percent, start, training, seed) in enumerate(wanted):
        values = {metric: 1000 + number for metric in testbed.METRICS}
        record = {"percent": percent, "start": start, "training": training, "seed": seed}
        write(tmp_path / "results", str(number), distillation=key, **record, **values)
    page = empty_page(tmp_path, "scripts/distillation_study.py")
    distillation_study.report(Namespace(results=tmp_path / "results", page=page))
    text = page.read_text()
    assert [n for n in range(len(wanted)) if f"{1000 + n}.000" not in text] == []


def test_restructuring_page(tmp_path):
    for seed, mse in enumerate((0.1, 0.2, 0.6)):
        values = {"train_mse": mse, "heldout_mse": 2 * mse, "fd_mini": 10 * mse}
        record = {"start": "half-learned", "training": "finetune", "seed": seed, **values}
        sizes = {"layers": 21, "parameters": 8_400_000, "gmac": 0.5}
        answer = {"pairs": [[2, 3], [6, 7]], "confidence": [0.5, 0.75]}
        write(tmp_path / "results", str(seed), **record, **sizes, **answer)
    page = empty_page(tmp_path, "scripts/restructuring_study.py")
    restructuring_study.report(Namespace(results=tmp_path / "results", page=page))
    line = ["half-learned", "finetuned", "21", "8.40 M", "0.50", "3", "0.30000 ± 0.26458"]
    assert rows(page, ["half-learned"])[0][:7] == line
    made = "Seed 2: after 3 steps of selection the gates made 2+3 6+7 parallel"
    assert f"{made}, with a confidence of 0.50 to 0.75." in page.read_text()


@pytest.mark.parametrize("study", [selection_study, distillation_study, restructuring_study])
def test_mixed_settings_are_refused(study, tmp_path):
    write(tmp_path / "results", "a")
    write(tmp_path / "results", "b", settings={**SETTINGS, "steps": 6})
    page = empty_page(tmp_path, "any")
    with pytest.raises(ValueError, match="holds results of studies with different settings"):
        study.report(Namespace(results=tmp_path / "results", page=page))
    assert "stale" in page.read_text()


def test_folders_and_pages_that_are_refused(selections, tmp_path):
    with pytest.raises(ValueError, match="holds no results: make them with `run`"):
        selection_study.report(Namespace(results=tmp_path / "nothing", page=selections.page))
    with pytest.raises(FileNotFoundError, match="no such page; it needs the lines"):
        testbed.write_tables(tmp_path / "none.md", "a_study.py", "text")
    with pytest.raises(ValueError, match="needs the lines <!-- results: written by"):
        testbed.write_tables(selections.page, "a_study.py", "text")


@pytest.mark.parametrize("name", ["selection", "distillation", "restructuring"])
def test_pages_of_the_studies_have_their_markers(name):
    page = testbed.REPOSITORY / "docs" / f"{name}.md"
    text = page.read_text()
    written = re.findall(r"<!-- results: written by scripts/(\w+)\.py -->", text)
    assert written == [f"{name}_study"] + ["road_table"] * (name == "distillation")
    assert text.count("<!-- end of results -->") == len(written)


def test_operators_of_two_distillations_are_not_compared(tmp_path):
    for name, seed, found in (("a", 0, "one"), ("b", 1, "two"), ("c", 0, None)):
        write(tmp_path, name, seed=seed, stage_one=found)
    assert len(testbed.results(tmp_path, "seed")) == 3
    write(tmp_path, "d", seed=1, stage_one="three")
    with pytest.raises(ValueError, match="results of 1 hold operators of several distillations"):
        testbed.results(tmp_path, "seed")


def test_headline_says_on_what_results_were_made(tmp_path):
    for seed in (0, 1):
        write(tmp_path, str(seed), seed=seed)
    assert testbed.headline(testbed.results(tmp_path)).endswith("with PyTorch 2.11.0.")
    write(tmp_path, "2", seed=2, hardware=["Card B (cuda)", "Card A (cuda)"])
    told = "with PyTorch 2.11.0, 1 of 3 cases on Card A (cuda), Card B (cuda)."
    assert testbed.headline(testbed.results(tmp_path)).endswith(told)
    for seed in (0, 1):
        write(tmp_path, str(seed), seed=seed, hardware=["Card A (cuda)"])
    told = "with PyTorch 2.11.0 on Card A (cuda), Card B (cuda)."
    assert testbed.headline(testbed.results(tmp_path)).endswith(told)


@pytest.fixture
def study(tmp_path):
    """A function: runs cases that unpack the testbed's pictures, all over again."""

    def run(cases, settings, **more):
        def make(case):
            testbed.entry("scripts/unpack_mini.py", "--out", tmp_path / case[0])
            return {"seed": case[1]}

        args = Namespace(results=tmp_path / "results", jobs=1)
        testbed.run_cases(cases, make, lambda case: (), args, settings, **more)
        return [json.loads(path.read_text()) for path in sorted(args.results.iterdir())]

    return run


def test_a_result_names_what_its_entries_ran_on(study):
    (record,) = study([("one", 0)], {})
    cores = len(os.sched_getaffinity(0))
    assert record["hardware"] == [f"{cores} processors (cpu)"] and record["seed"] == 0


def test_cases_of_other_flags_are_made_anew(study, capsys):
    cases, flags = [("main", 0), ("varied", 0)], {"main": [], "varied": ["--rate", 0.5]}
    for record in study(cases, {"steps": 1}, flags=lambda case: flags[case[0]]):
        assert record["flags"] in flags.values()
    capsys.readouterr()

    def made_again():
        study(cases, {"steps": 1}, flags=lambda case: flags[case[0]])
        return [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]

    assert made_again() == []
    flags["varied"] = ["--rate", 0.25]
    path, name = made_again()
    assert path.endswith("/varied-0.json") and name == "varied-0"
    assert made_again() == []


def test_results_from_before_flags_were_recorded(tmp_path):
    write(tmp_path, "old", settings={"steps": 1})
    assert testbed.is_made(tmp_path / "old.json", {"steps": 1}, [])
    assert not testbed.is_made(tmp_path / "old.json", {"steps": 1}, ["--rate", 0.5])


@pytest.mark.parametrize(
    ("pattern", "flags", "message"),
    [
        ("rank-8", ["--lora-rank", 8], "is of no selection of this study: delete it"),
        ("rank-64", ["--lora-rank", 8], "was made with the flags .*8.*, not .*64.*: make it anew"),
        ("deep", ["--gate-lr", 1], "was made with the flags .*, not .*: make it anew with `run`"),
    ],
)
def test_results_that_the_study_no_longer_has(selections, pattern, flags, message):
    record = {"operator": "swa", "pattern": pattern, "seed": 7, "flags": flags}
    write(selections.results, f"swa-{pattern}-7", **record)
    with pytest.raises(ValueError, match=f"swa-{pattern}-7.json: {message}"):
        selection_study.report(selections)


def test_a_learned_result_says_how_it_was_learned(tmp_path, monkeypatch):
    plan = selection_study.configured("swa")
    groups = [{"confidence": 0.5, "agreement": 1.0}]
    settings = {name: name for name in testbed.LEARNED_BY} | {"data_path": "somewhere"}
    answer = {"groups": groups, "groups_spec": "2:4", "pinned": [0]}
    answer |= {"precision": "float32", "settings": settings}
    monkeypatch.setattr(selection_study, "learn", lambda case, args: (plan, answer))
    monkeypatch.setattr(testbed, "finetune", lambda *about: ("last.pt", {}))
    monkeypatch.setattr(testbed, "score", lambda *about: {})
    monkeypatch.setattr(testbed, "fingerprint", lambda plan: "same")
    record = selection_study.make(("swa", "long", 0), Namespace(work=tmp_path))
    del settings["data_path"]
    assert record["selection"] == {
        "groups": "2:4", "pinned": [0], "precision": "float32", "settings": settings,
        "confidence": [0.5], "agreement": [1.0],
    }  # fmt: skip


def test_a_worker_says_what_a_failed_entry_said_and_goes_on(tmp_path):
    with pytest.raises(ValueError, match="(?s)sample_ddp_finetuned.py --config .*no such file"):
        testbed.entry("sample_ddp_finetuned.py", "--config", tmp_path / "nowhere.yaml")
    testbed.entry("scripts/unpack_mini.py", "--out", tmp_path / "images")
    assert (tmp_path / "images" / "train").is_dir()


def test_the_roads_table_is_made_of_its_runs(tmp_path, capsys):
    road = tmp_path / "road"
    rows = {
        "distill": [
            {"step": 0, "val_error/block01.mha": 2.0, "val_error/block02.mha": 4.0},
            {"step": 5, "loss": 1.0},
            {"step": 5, "val_error/block01.mha": 0.25, "val_error/block02.mha": 0.5},
        ],
        "stage2": [{"step": 1, "mse": 0.5}, {"step": 7, "mse": 0.125}],
        "selection": [{"step": 1, "loss": 0.5}, {"step": 8, "loss": 0.0625}],
        "final": [{"step": 1, "mse": 0.5}, {"step": 9, "mse": 0.03125}],
    }
    for stage, lines in rows.items():
        (road / f"{stage}-DiT-Mini-2").mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (road / f"{stage}-DiT-Mini-2" / "metrics.jsonl").write_text(text)
    made = {"git_revision": "a" * 40, "torch": "2", "python": "3", "hardware": "CPU", "time": "now"}
    groups = [{"confidence": 0.5, "options": [1, 2, 3]}, {"confidence": 1.0, "options": [1, 2, 3]}]
    answer = {"kept": [0, 3], "groups": groups, **made}
    (road / "selection-DiT-Mini-2" / "selection.json").write_text(json.dumps(answer))
    with pytest.raises(ValueError, match=r"metrics\.json: missing: run scripts/road_mini\.sh"):
        road_table.summary(road)
    (road / "samples").mkdir()
    score = {"metrics": {"fd_mini": 4.5}, "num_samples": 16, **made, "git_revision": "b" * 40}
    (road / "samples" / "metrics.json").write_text(json.dumps(score))
    page = tmp_path / "page.md"
    page.write_text("<!-- results: written by scripts/road_table.py -->\n<!-- end of results -->")
    road_table.main(Namespace(road=road, json=tmp_path / "road.json", page=page))
    said = capsys.readouterr().out
    for row in (
        "| 5 | relative error of an operator's output: median of the blocks (least to greatest) "
        "| 3.00 (2.00 to 4.00) | 0.38 (0.25 to 0.50) |",
        "| 7 | training MSE | 0.5000 | 0.1250 |",
        "| 8 | training loss | 0.5000 | 0.0625 |",
        "| 9 | training MSE | 0.5000 | 0.0312 |",
        "Kept: 0, 3; mean confidence 0.75, with 3 options a group. 16 samples: fd_mini 4.500. "
        "Made at revision aaaaaaaa with PyTorch 2 on CPU; "
        "at revision bbbbbbbb with PyTorch 2 on CPU.",
    ):
        assert row in said and row in page.read_text()
    log = road / "stage2-DiT-Mini-2" / "metrics.jsonl"
    for text, words in (
        ('{"step": 1, "mse": null}\n', "missing, or without what the stage measures"),
        ('{"step": 1, "mse": 0.5}{}\n', "is not whole"),
        ("", "missing, or without"),
    ):
        log.write_text(text)
        with pytest.raises(ValueError, match=f"stage2-DiT-Mini-2/metrics.jsonl:? {words}"):
            road_table.summary(road)


def test_the_page_of_the_road_is_that_of_its_numbers():
    found = json.loads((testbed.REPOSITORY / "docs" / "results" / "road.json").read_text())
    assert (
        road_table.as_table(found) in (testbed.REPOSITORY / "docs" / "distillation.md").read_text()
    )
