"""scripts/compare_selections.py on answers made by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "compare_selections.py"


def answer(kept, chosen=None):
    """Two groups of two blocks, one of each kept."""
    groups = []
    for first in (0, 2):
        options = [{"keeps": [first], "probability": 0.5}, {"keeps": [first + 1]}]
        groups.append({"blocks": [first, first + 1], "options": options, "confidence": 0.75})
    grafted = [b for b in range(4) if b not in kept]
    found = {"kept": kept, "grafted": grafted, "slots": ["mha"], "groups_spec": "1:2,1:2"}
    found |= {"pinned": []}
    return {**found, "groups": groups, **({"chosen": chosen} if chosen else {})}


def compare(tmp_path, *answers, fails=False):
    files = []
    for number, content in enumerate(answers):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(content))
    command = [sys.executable, SCRIPT, *files, "--json", tmp_path / "out.json"]
    done = subprocess.run([str(w) for w in command], capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else (done.stdout, json.loads((tmp_path / "out.json").read_text()))


def test_agreement_of_three_runs(tmp_path):
    text, found = compare(tmp_path, answer([0, 2]), answer([0, 3]), answer([0, 2]))
    assert found["kept_share"] == pytest.approx([1, 0, 2 / 3, 1 / 3])
    assert [(g["kept"], g["runs"]) for g in found["groups"]] == [([0], 3), ([2], 2)]
    assert found["unanimous"] == 0.5 and found["by_chance"] == 0.5
    assert found["pairwise"] == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert "blocks 2 to 3: 2 of 3 runs keep [2]" in text


def test_pairs_go_by_their_first_block(tmp_path):
    def of_pairs(kept):
        found = answer([0, 2])
        found |= {"kept": kept, "grafted": [b for b in (0, 2, 5, 7) if b not in kept]}
        for group, blocks in zip(found["groups"], ([0, 2], [5, 7]), strict=True):
            group |= {"blocks": blocks, "options": [{"keeps": [b]} for b in blocks]}
        return found | {"slots": ["pair"]}

    text, found = compare(tmp_path, of_pairs([0, 5]), of_pairs([0, 7]))
    assert found["blocks"] == [0, 2, 5, 7] and found["kept_share"] == [1, 0, 0.5, 0.5]
    assert found["pairwise"] == 0.5 == found["by_chance"] and found["unanimous"] == 0.5
    assert "blocks 5 to 7: 1 of 2 runs keep [5]" in text


def test_competing_grafts_count_apart_and_other_groups_are_refused(tmp_path):
    one, two = answer([0, 2], {"1": 1, "3": 2}), answer([0, 2], {"1": 1, "3": 1})
    _, found = compare(tmp_path, one, two)
    assert found["unanimous"] == 0.75 and found["pairwise"] == 1
    other = {**answer([0, 2]), "groups_spec": "2:4"}
    assert "groups_spec 2:4 differs from 1:2,1:2" in compare(tmp_path, one, other, fails=True)
