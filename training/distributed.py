"""One process or many: the same calls with and without torchrun, on CPU (gloo) and CUDA (nccl)."""

import errno
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from training import averaging
from training.preemption import PREEMPTED, SIGNALS, ParentWatch, Preempted, StopSignals

REPOSITORY = Path(__file__).resolve().parent.parent
T = TypeVar("T")


PREFLIGHT_SECONDS = 300.0  # in which all processes of a run must have found each other
SIGNAL_SECONDS = 2.0  # that a signal may wait there for the main thread
LOST_MINUTES = 30.0  # after which a process that waits for another ends
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


_graphs: list[torch.cuda.CUDAGraph] = []  # in which the processes meet, see `ends_with`
_lent = ExitStack()  # see `at_end`


@dataclass(frozen=True)
class World:
    """This process's place among all processes of a run.

    Attributes:
        rank: 0..size-1 over all nodes; rank 0 alone writes logs and checkpoints.
        local_rank: 0..(processes on this node)-1; picks the GPU.
        size: number of processes.
        device: where this process computes.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def start(device: str | None = None, timeout_minutes: float = LOST_MINUTES) -> World:
    """Joins the process group that torchrun described, or stands alone when there is none.

    Args:
        device: "cuda", "cuda:1" (single process only), "cpu", or None for CUDA where there is any.
        timeout_minutes: how long a collective may wait before the run fails.

    Raises:
        ValueError: CUDA was asked for and is not there, a node has fewer GPUs than processes, or
            the processes cannot reach each other.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", kind):
        raise ValueError(f"--device {kind}: use cpu, cuda, or cuda:1 and the like")
    target = torch.device(kind)
    if target.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {kind}: no CUDA device is visible; use --device cpu")
        if target.index is not None and size > 1:
            raise ValueError(
                f"--device {kind} names one GPU but torchrun started {size} processes; "
                "use --device cuda and CUDA_VISIBLE_DEVICES"
            )
        index = target.index if target.index is not None else local_rank
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this node wants GPU {index} but only "
                f"{torch.cuda.device_count()} are visible; lower --nproc_per_node"
            )
        target = torch.device("cuda", index)
        torch.cuda.set_device(target)
    if size > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        _meet(rank, size, target, timedelta(minutes=timeout_minutes))
    return World(rank, local_rank, size, target)


def _meet(rank: int, size: int, device: torch.device, timeout: timedelta) -> None:
    """Joins the process group and sums one number over it, or ends this process in good time."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    alone = f"rank {rank} of {size} on {socket.gethostname()} did not meet the others at {place}"
    advice = (
        "every node must run the same command with the same number of nodes and reach that port; "
        "where nodes have several networks, name the interface in NCCL_SOCKET_IFNAME (CPU: "
        "GLOO_SOCKET_IFNAME)"
    )

    heard, told = socket.socketpair()

    def watch() -> None:
        code, said = 2, f"error: {alone} within {PREFLIGHT_SECONDS:g} seconds: {advice}"
        heard.settimeout(PREFLIGHT_SECONDS)
        with heard:
            try:
                while number := heard.recv(1):  # of a signal, or b"" once the main thread is back
                    if number[0] in SIGNALS:
                        code, said = PREEMPTED, "stopped by a signal before all processes had met"
                        heard.settimeout(SIGNAL_SECONDS)
            except TimeoutError:
                print(said, file=sys.stderr, flush=True)
                os._exit(code)  # the main thread waits in a library that nothing else interrupts

    threading.Thread(target=watch, name="preflight", daemon=True).start()
    told.setblocking(False)
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.set_wakeup_fd(told.fileno()) if main_thread else -1
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        present = torch.ones((), device=device)
        dist.all_reduce(present)
        met = int(present.item())
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{alone} ({reason}): {advice}") from error
    finally:
        if main_thread:
            signal.set_wakeup_fd(before)
        told.close()
    if met != size:
        raise ValueError(f"{alone}: {met} of {size} processes answered; {advice}")


def ends_with(graph: torch.cuda.CUDAGraph) -> None:
    """Names a graph that holds work of NCCL, which ends no process group before all such graphs."""
    _graphs.append(graph)


def at_end(give_back: Callable[[], object]) -> None:
    """Calls `give_back` when the run ends, well or not: this process may go on with another."""
    _lent.callback(give_back)


def release() -> None:
    """Calls what `at_end` was told of."""
    _lent.close()


def stop() -> None:
    """Ends a run: leaves the process group, if any, and what `ends_with` and `at_end` were told."""
    release()
    while _graphs:
        torch.cuda.synchronize()
        _graphs.pop().reset()
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier(world: World) -> None:
    """Waits until every process is here."""
    if world.size > 1:
        dist.barrier()


def sum_across(world: World, tensor: torch.Tensor) -> torch.Tensor:
    """Sums `tensor` over all processes, in place, and returns it."""
    if world.size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def gather_objects(world: World, value: object) -> list:
    """Every process's `value` (plain Python data), in rank order, on every process."""
    if world.size == 1:
        return [value]
    values: list = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def start_alike(world: World, module: torch.nn.Module) -> None:
    """Gives every process rank 0's parameters and buffers; before copies of them are made."""
    if world.size > 1:
        averaging.start_alike(module)


def wrap(world: World, module: torch.nn.Module) -> torch.nn.Module:
    """`module`, with gradients averaged over all processes when there are several.

    It must have begun alike on all of them, see `start_alike`.
    """
    if world.size == 1:
        return module
    return averaging.Averaged(module, world.device)


def micro_batches(net: torch.nn.Module, inputs: dict, number: int) -> Iterator[dict]:
    """A step's inputs in `number` parts, one a forward and backward pass of `net`.

    Args:
        net: a `wrap`ped module. The processes average their gradients once, in the last part's
            backward pass.
        inputs: 0-d tensors for all; and what is cut by its `chunk`: tensors [B, ...], captions.
    """
    whole = {name: v for name, v in inputs.items() if torch.is_tensor(v) and v.ndim == 0}
    names = [name for name in inputs if name not in whole]
    cut = [inputs[name].chunk(number) for name in names]
    parts = [whole | dict(zip(names, pieces, strict=True)) for pieces in zip(*cut, strict=True)]
    for i, part in enumerate(parts, 1):
        if isinstance(net, averaging.Averaged):
            net.exchanges = i == len(parts)
        yield part


def decide(world: World, choose: Callable[[], T]) -> T:
    """Rank 0's `choose()`, plain data, on every process.

    A ValueError or OSError is raised on all, so that none waits for a process that has ended.
    """
    if world.size == 1:
        return choose()
    box: list = [None, None]
    if world.main:
        try:
            box[0] = choose()
        except (ValueError, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def run(main: Callable[[Namespace], None], args: Namespace) -> None:
    """Calls an entry's `main`; bad input ends it with one line and exit code 2.

    Bad input is a ValueError or FileNotFoundError that this repository raises by name, or a path
    that cannot be written, also for want of space; anything else keeps its traceback. Rank 0
    speaks at once; the others wait a moment, in which torchrun ends them when they only follow it.
    Output whose reader has left ends it in silence. A signal to stop ends it with exit code 75, a
    training's from its first step on after a checkpoint.
    """
    signals = StopSignals(at_once=True)  # until a training has its own
    if "TORCHELASTIC_RUN_ID" in os.environ:
        at_end(ParentWatch().stop)
    try:
        _run(main, args, signals)
    finally:
        release()
        signals.restore()


def _run(main: Callable[[Namespace], None], args: Namespace, signals: StopSignals) -> None:
    rank = int(os.environ.get("RANK", "0"))
    try:
        try:
            main(args)
        finally:
            stopped_here = signals.noted
            signals.at_once = False  # the end, whatever it is, is not disturbed
        sys.stdout.flush()
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted; the same command (training: with --resume auto) goes on")
        _leave(130)
    except Preempted as stopped:
        if rank == 0:
            print(stopped, file=sys.stderr)
        if stopped_here:  # where no other process may be
            _leave(PREEMPTED)
        stop()
        sys.exit(PREEMPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _unheard():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left
            _leave(128 + signal.SIGPIPE)
        signals.restore()
        if rank > 0:
            time.sleep(3)
        if not _is_bad_input(error):
            if _graphs:
                traceback.print_exc()
                _leave(1)
            raise
        who = "error" if rank == 0 else f"error (rank {rank})"
        print(f"{who}: {error}", file=sys.stderr)
        _leave(2)


def _leave(code: int) -> None:
    """Ends the process: at once where NCCL would wait for graphs on its way out."""
    if not _graphs:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _unheard() -> bool:
    """Whether the reader of this process's output has left, as `| head` does."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _is_bad_input(error: Exception) -> bool:
    if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)):
        return True
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return True
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = REPOSITORY in Path(frame.filename).resolve().parents
    named = (frame.line or "").startswith("raise") and "site-packages" not in frame.filename
    return isinstance(error, (ValueError, FileNotFoundError)) and ours and named
