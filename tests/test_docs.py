"""docs/reliability.md names tests that exist, and marks those that only a slow run takes."""

import ast
import re

from entries import REPOSITORY


def slow_by_name(path):
    """Test -> whether it is marked slow, all of it."""
    functions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
    return {
        f.name: any(ast.unparse(mark) == "pytest.mark.slow" for mark in f.decorator_list)
        for f in functions
    }


def test_promises_are_held_by_tests_that_exist():
    known = {path.name: slow_by_name(path) for path in (REPOSITORY / "tests").glob("test_*.py")}
    text = (REPOSITORY / "docs/reliability.md").read_text()
    assert "| case | test in `test_reliability.py` |" in text
    named = 0
    for line in text.splitlines():
        file = "test_reliability.py" if line.startswith("|") else None
        for word, slow in re.findall(r"`((?:test_\w+\.py)?(?:::)?(?:test_\w+)?)`( \(s\))?", line):
            found, _, test = word.rpartition("::") if ".py" in word else ("", "", word)
            if word.endswith(".py"):
                assert word in known, word
                continue
            file = found or file
            if test:
                named += 1
                assert test in known[file], f"{file}::{test}"
                assert known[file][test] == bool(slow), f"{file}::{test}: (s)"
    assert named > 60


def test_every_table_has_its_head():
    """A blank line within one makes text of the rows below it."""
    for path in [REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")]:
        tables = re.findall(r"(?:^\|.*\n)+", path.read_text(), re.MULTILINE)
        for table in tables:
            assert re.match(r"\|.*\n\|[ :|-]+\|\n\|", table), f"{path}: {table[:80]}"
