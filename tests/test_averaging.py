"""training/averaging.py: what two forked processes make of their gradients."""

import gc
import multiprocessing
import weakref

import pytest
import torch
from entries import free_port
from test_operators import SMALL
from torch import nn

from models.dit import DiT
from models.operators import build_operator
from training import averaging, distributed, precision
from training.averaging import Averaged
from training.working import WorkingWeights

CPU = torch.device("cpu")


@pytest.fixture
def together(tmp_path):
    """together(work) calls work(rank) in two processes that have met; what they returned."""

    def call(work, size=2):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        place |= {"WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}

        def begin(rank: int) -> None:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in (place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}).items():
                    patch.setenv(name, value)
                distributed.start("cpu", timeout_minutes=0.5)
                torch.save(work(rank), tmp_path / f"{rank}.pt")
                distributed.stop()

        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=begin, args=(rank,)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        ends = [process.exitcode for process in processes]
        for process in processes:
            process.kill()  # one that waits for another would keep pytest from its end
        assert ends == [0] * size
        return [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]

    return call


def small(copies: bool) -> nn.Module:
    """A DiT, or one whose weights of products have copies in bf16, with all layers at work."""
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=3)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    return WorkingWeights(model, torch.bfloat16) if copies else model


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 4, 8, 8, generator=generator)
    t, y = torch.arange(8) * 120, torch.arange(8) % 3
    return {"x": x, "t": t, "y": y, "drop": torch.zeros(8, dtype=torch.bool)}


def gradients(net: nn.Module, inputs: dict, passes: int, copies: bool) -> list[torch.Tensor]:
    """Of a step on `inputs`, those of the trained parameters."""
    trained = [p for p in net.parameters() if p.requires_grad]
    for p in trained:
        p.grad = None
    for part in distributed.micro_batches(net, inputs, passes):
        with precision.autocast(CPU, torch.bfloat16 if copies else torch.float32):
            out = net(**part).float()
        (out.square().mean() / passes).backward()
    return [p.grad.clone() for p in trained]


@pytest.mark.parametrize("group_bytes", [None, 10_000, 1], ids=["one", "some", "each"])
@pytest.mark.parametrize(("copies", "passes"), [(False, 1), (False, 2), (True, 1)])
def test_two_processes_have_the_gradients_of_one(together, copies, passes, group_bytes):
    """In groups of all gradients of a dtype, of some, and of one each."""

    def work(rank):
        averaging.GROUP_BYTES = group_bytes or averaging.GROUP_BYTES
        inputs = {name: value.chunk(2)[rank] for name, value in batch().items()}
        alone = gradients(small(copies), inputs, passes, copies)
        net, steps, numbers = Averaged(small(copies), CPU), [], []
        for _ in range(3):
            numbers.append(len(net._groups))
            steps.append(gradients(net, inputs, passes, copies))
        return alone, steps, numbers

    (one, steps, numbers), (two, others, its) = together(work)
    dtypes = {g.dtype for g in one}
    assert dtypes == {torch.float32, torch.bfloat16} if copies else {torch.float32}
    assert numbers == its
    if group_bytes == 10_000:
        assert len(dtypes) < min(numbers) and max(numbers) < len(one)
    else:
        assert numbers == 3 * [len(one) if group_bytes else len(dtypes)]
    mean = [a / 2 + b / 2 for a, b in zip(one, two, strict=True)]
    for each in (*steps, *others):
        assert all(map(torch.equal, each, mean))
    if not copies:
        whole = gradients(small(copies), batch(), 1, copies)
        torch.testing.assert_close(mean, whole, rtol=1e-4, atol=1e-7)


class Chain(nn.Module):
    """Layers that are used in the order of `names`; `at_second` sees the gradient between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, names=("one", "two"), at_second=None):
        x = getattr(self, names[0])(x)
        if at_second is not None:
            x.register_hook(at_second)
        for name in names[1:]:
            x = getattr(self, name)(x.tanh())
        return x.square().sum()


def test_groups_go_out_in_one_order_and_as_early_as_they_may(together):
    """On rank 1 the gradients come the other way round."""

    def work(rank):
        averaging.GROUP_BYTES = 1
        said, chain = [], Chain()
        names = {p: name for name, p in chain.named_parameters()}
        for p in names:
            p.register_post_accumulate_grad_hook(lambda p: said.append(f"{names[p]} is there"))
        reduce = averaging.dist.all_reduce

        def spied(gradient, how):
            said.append(next(name for p, name in names.items() if p.grad is gradient))
            return reduce(gradient, how)

        net, used = Averaged(chain, CPU), [("two", "one"), ("one", "two")][rank]
        averaging.dist.all_reduce = spied
        steps = []
        for step in range(3):
            chain.zero_grad()
            net(torch.full((1, 3), float(step + rank)), used).backward()
            steps.append((said.copy(), [p.grad for p in names]))
            said.clear()
        return steps

    for step, ((said, means), (its, others)) in enumerate(zip(*together(work), strict=True)):
        there, out = ([w for w in said if ("there" in w) is late] for late in (True, False))
        came = [words.removesuffix(" is there") for words in there]
        assert came[0].startswith("one") and its[0].startswith("two")
        assert [words for words in its if "there" not in words] == out
        if step == 0:
            assert out == ["two.bias", "two.weight", "one.bias", "one.weight"]
        else:
            assert said == [words for name in came for words in (f"{name} is there", name)]
        assert all(map(torch.equal, means, others))
        own = []
        for rank, used in enumerate([("two", "one"), ("one", "two")]):
            chain = Chain()
            chain(torch.full((1, 3), float(step + rank)), used).backward()
            own.append([p.grad for p in chain.parameters()])
        torch.testing.assert_close(means, [a / 2 + b / 2 for a, b in zip(*own, strict=True)])


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("failure", ["left out", "raises"])
def test_after_a_failed_pass_the_next_is_good(together, failure, first):
    """A pass without a parameter is an error; one that raises may leave its exchange half done."""

    def fail(gradient):
        raise KeyError("no")

    def work(rank):
        averaging.GROUP_BYTES = 1
        net, x = Averaged(Chain(), CPU), torch.full((1, 3), float(rank))
        if not first:
            net(x).backward()
        good = net(x)
        if failure == "raises":
            with pytest.raises(KeyError):
                net(x, at_second=fail).backward()
        else:
            with pytest.raises(RuntimeError, match=r"one.weight \[3, 3\] has got no gradient"):
                net(x, ("two",)).backward()
        net.zero_grad()
        good.backward()
        return [p.grad for p in net.parameters()]

    one, two = together(work)
    own = []
    for rank in range(2):
        chain = Chain()
        chain(torch.full((1, 3), float(rank))).backward()
        own.append([p.grad for p in chain.parameters()])
    assert all(map(torch.equal, one, two))
    torch.testing.assert_close(one, [a / 2 + b / 2 for a, b in zip(*own, strict=True)])


def test_all_start_from_rank_0_and_a_wrapper_is_freed(together):
    """What is frozen, and of what there are copies, too."""

    def work(rank):
        chain = Chain()
        chain.register_buffer("mask", torch.tensor([rank == 0, True]))
        chain.two.requires_grad_(False)
        with torch.no_grad():
            chain.one.weight += rank
            chain.two.weight += rank
        distributed.start_alike(distributed.World(rank, rank, 2, CPU), chain)
        start = [t.detach().clone() for t in (*chain.parameters(), *chain.buffers())]
        working = WorkingWeights(chain, torch.bfloat16)
        net = Averaged(working, CPU)
        assert [name for name, _ in working.named_parameters()] == ["one.weight", "one.bias"]
        assert working.copies[chain.one.weight] is next(net.parameters())
        with precision.autocast(CPU, torch.bfloat16):
            net(torch.ones(1, 3)).backward()
        held = weakref.ref(chain.one.weight)
        del net, chain, working
        gc.collect()
        differs = r"rank 1 has parameter \('weight', \[3, 2\].* where rank 0 has .*\[2, 2\]"
        with pytest.raises(ValueError, match=differs):
            averaging.start_alike(nn.Linear(2, 2 + rank))
        norm = nn.BatchNorm1d(2, affine=False, track_running_stats=rank == 0)
        with pytest.raises(ValueError, match="rank 1 has parameter None where .*running_mean"):
            averaging.start_alike(norm)
        return start, held() is None

    one, two = together(work)
    assert all(map(torch.equal, one[0], two[0])) and one[1] and two[1]
    assert torch.equal(one[0][0], Chain().one.weight) and one[0][-1].all()
    assert torch.equal(one[0][2], Chain().two.weight)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_no_backward_pass_reads_a_gradient_that_it_has_handed_over(name):
    """As those are averaged where they lie, in the meantime: here they are spoilt."""
    torch.manual_seed(0)
    operator = build_operator(name, **SMALL[name])
    width = next(m.in_features for m in operator.modules() if isinstance(m, nn.Linear))
    x = torch.randn(2, SMALL[name].get("l_max", 16), width)
    (operator(x).square().sum()).backward()
    clean = {n: p.grad for n, p in operator.named_parameters()}
    found = {}

    def spoil(n, p):
        found[n] = p.grad.clone()
        p.grad.fill_(torch.nan)

    for n, p in operator.named_parameters():
        p.grad = None
        p.register_post_accumulate_grad_hook(lambda p, n=n: spoil(n, p))
    operator(x).square().sum().backward()
    assert found.keys() == clean.keys() and all(torch.equal(found[n], clean[n]) for n in clean)
