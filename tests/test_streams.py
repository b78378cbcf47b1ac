"""models/streams.py: the order in which work is given to streams; tests/test_gpu.py runs it."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from models import streams

CPU = torch.device("cpu")


@pytest.fixture
def log(monkeypatch):
    """What is done on which stream, and which waits for which, as if a graph were captured."""
    said, running = [], ["main"]

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            said.append(f"{self.name} waits for {event}")

        def record_event(self):
            return f"{self.name} after '{said[-1]}'"

    @contextlib.contextmanager
    def stream(there):
        running.append(there.name)
        yield
        running.pop()

    monkeypatch.setattr(streams, "_spreads", lambda device: True)
    monkeypatch.setattr(streams, "_stream", lambda device, use: Stream(use))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(running[-1]))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return said, lambda work: said.append(f"{running[-1]} does {work}") or work


def test_one_runs_beside_another_and_both_are_waited_for(log):
    said, do = log
    assert streams.beside(lambda: do("one"), lambda: do("two"), CPU, 513) == ("one", "two")
    assert said[0] == "beside waits for main" and said[-1] == "main waits for beside"
    assert sorted(said[1:-1]) == ["beside does two", "main does one"]


def test_small_products_beside_each_other_share_the_processors(log, monkeypatch):
    said, do = log
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    leave_out = torch._C._get_sm_carveout_experimental

    def fail():
        raise KeyError(leave_out())

    assert streams.beside(leave_out, leave_out, CPU, 512) == (72, 72) and leave_out() is None
    assert streams.beside(leave_out, leave_out, CPU, 513) == (None, None)
    with pytest.raises(KeyError, match="72"):
        streams.beside(fail, leave_out, CPU, 8)
    assert leave_out() is None
    monkeypatch.delattr(torch._C, "_set_sm_carveout_experimental")
    assert streams.beside(lambda: do("one"), leave_out, CPU, 8) == ("one", None)


def test_what_is_ahead_is_waited_for_one_by_one(log):
    said, do = log
    results = streams.ahead([lambda: do("one"), lambda: do("two")], CPU)
    assert [do(f"use of {result}") for result in results] == ["use of one", "use of two"]
    assert said == [
        "ahead waits for main", "ahead does one", "ahead does two",
        "main waits for ahead after 'ahead does one'", "main does use of one",
        "main waits for ahead after 'ahead does two'", "main does use of two",
    ]  # fmt: skip


def test_without_a_graph_all_runs_in_its_order():
    said = []
    assert streams.beside(lambda: said.append(1), lambda: said.append(2), CPU, 1) == (None, None)
    results = streams.ahead([lambda: said.append(3), lambda: said.append(5)], CPU)
    for _ in results:
        said.append(said[-1] + 1)
    assert said == [1, 2, 3, 4, 5, 6]
