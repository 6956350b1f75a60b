"""The processes that torchrun started: how they share, wait and fail together; and how a command ends."""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # has no public name

STEP, PATIENCE = timedelta(minutes=10), timedelta(hours=12)  # a step never takes so long; preparing data may
INTERRUPTS = []  # filled by Ctrl-C: a library may turn it into a fault of its own
FAULTS = {"ValueError": ValueError, "OSError": OSError}


class Ranks:
    """This process among all of them; alone without torchrun. Use as a context: only rank 0 prints inside it."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.patient, self.stdout = None, sys.stdout
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if gpus and local >= gpus:
            raise ValueError(f"--nproc-per-node asks for more processes than the {gpus} GPUs of this node")
        self.device = torch.device("cuda", local) if gpus else torch.device("cpu")
        if gpus:
            torch.cuda.set_device(self.device)
        if self.size == 1:
            return
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=STEP)
            self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
            self.barrier = dist.new_group(backend="gloo", timeout=STEP)  # whose limit holds for all ranks but the first
        except RuntimeError as e:
            again = "; a restart needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
            again = again if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" else ""
            raise ValueError(f"rank {self.rank}: cannot connect to the other ranks ({first_line(e)}){again}") from e

    def __str__(self) -> str:
        return self.device.type + f", {self.size} ranks" * (self.size > 1)

    def __enter__(self) -> "Ranks":
        if self.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, closed at the end
        return self

    def __exit__(self, kind, *_) -> None:
        if self.rank:
            sys.stdout.close()
            sys.stdout = self.stdout
        if self.size > 1 and kind in (None, SystemExit):  # after a fault other ranks may be gone: no orderly end
            dist.destroy_process_group()

    def together(self, work: Callable) -> list:
        """What work() returns on every rank, in order of rank. Where it fails on one, all fail, with its message."""
        if self.size == 1:
            return [work()]
        fault, mine, found = None, None, [None] * self.size
        try:
            mine = work()
        except (ValueError, OSError) as e:
            fault = e
        told = fault and ("OSError" if isinstance(fault, OSError) else "ValueError", str(fault))
        dist.all_gather_object(found, (told, mine), group=self.patient)
        for rank, (told, _) in enumerate(found):
            if told:
                raise fault if rank == self.rank else everywhere(FAULTS[told[0]](f"rank {rank}: {told[1]}"))
        return [value for _, value in found]

    def each(self, work: Callable):
        """What work() returns on this rank, which may be large; where it fails on one, all fail."""
        mine = []
        self.together(lambda: mine.append(work()))
        return mine[0]

    def first(self, work: Callable):
        """What work() returns on rank 0, on every rank."""
        return self.together(lambda: work() if self.rank == 0 else None)[0]

    def sum(self, t: Tensor) -> Tensor:
        """A tensor's sum over ranks."""
        if self.size > 1:
            t = t.clone()
            dist.all_reduce(t)
        return t

    def reducer(self) -> Callable[[Tensor], Tensor]:
        """`sum` for one step: before its first, wait for all ranks; rank 0 names those that do not come in time."""
        met = self.size == 1

        def reduce(t: Tensor) -> Tensor:
            nonlocal met
            if not met:
                dist.monitored_barrier(self.barrier, 0.9 * STEP, wait_all_ranks=True)  # before the others give up
                met = True
            return self.sum(t)

        return reduce

    @contextmanager
    def sigterm(self) -> Iterator[Callable[[], bool]]:
        """SIGTERM does not end what runs inside; what this yields says whether any rank got one, on all alike."""
        got = []
        before = signal.signal(signal.SIGTERM, lambda *_: got.append(True))
        try:
            yield lambda: bool(self.sum(torch.tensor(len(got), device=self.device)))
        finally:
            signal.signal(signal.SIGTERM, before)


def own_rows(p: torch.nn.Parameter) -> tuple[Tensor, slice]:
    """Where this rank's part of a parameter is, and which rows of the parameter it holds."""
    if not isinstance(p, DTensor):
        return p, slice(None)
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return p.to_local(), slice(offset[0], offset[0] + shape[0])


def everywhere(e: Exception) -> Exception:
    """Mark a fault that every rank meets at once: the first rank of each host reports it."""
    e.everywhere = True
    return e


def first_line(e: BaseException) -> str:
    """Of its message, without the line of gloo's source that raised it and gloo's guess of a cause."""
    line = (str(e).strip() or repr(e)).splitlines()[0]
    return re.sub(r"^\[\S+\.cc:\d+\] ", "", line).split(". This is typically")[0][:300]


def collective_failed(e: BaseException) -> bool:
    """Whether torch.distributed raised it: a rank is stuck or gone, or the network between two hosts is."""
    trace, files = e.__traceback__, []
    while trace:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return any(os.path.join("torch", "distributed") in file for file in files)


def command(program: Callable[[], object], cure: str, interrupted: str) -> None:
    """Run a command line. What a user can cause ends as one line and exit code 1, other faults as a traceback.

    Args:
        cure:        what to do where memory is too small.
        interrupted: what to say on Ctrl-C, where the fault itself does not; the exit code is 130.
    """
    out, err = Steady(sys.stdout), Steady(sys.stderr)
    before = signal.getsignal(signal.SIGINT)  # ignored in a background job: stays so
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt_once)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            guarded(program, cure, interrupted)
        finally:
            signal.signal(signal.SIGINT, before)
            out.flush()
            err.flush()


def interrupt_once(*_) -> None:
    """Ctrl-C; torchrun sends a second one, which must not cut short what is said of the first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    INTERRUPTS.append("once")
    raise KeyboardInterrupt


class Steady:
    """A terminal or pipe that no print fails on: a letter it lacks is spelled, and what nobody reads is dropped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115, None where the shell closed it
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self.kept(lambda: self.stream.write(text)) or len(text)

    def flush(self) -> None:
        self.kept(self.stream.flush)

    def kept(self, work: Callable):
        try:
            return work()
        except OSError:  # `| head` has gone, or the disk under the log is full
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())


def guarded(program: Callable[[], object], cure: str, interrupted: str) -> None:
    code = 1
    try:
        program()
        return
    except (ValueError, OSError) as e:
        other = os.environ.get("LOCAL_RANK", "0") != "0" and hasattr(e, "everywhere")
        message = "" if other else f"error: {e}"
    except KeyboardInterrupt as e:
        other = os.environ.get("LOCAL_RANK", "0") != "0"
        message, code = "" if other else e.args and e.args[0] or interrupted, 130
    except RuntimeError as e:
        rank = f"rank {os.environ['RANK']}: " if dist.is_initialized() else ""
        if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            message = f"error: {rank}torch.compile failed ({first_line(e)}); leave out --compile"
        elif isinstance(e, torch.OutOfMemoryError) or "allocate memory" in str(e):
            message = f"error: {rank}out of memory ({first_line(e)}); {cure}"
        elif dist.is_initialized() and collective_failed(e):
            message = f"error: {rank}lost touch with the other ranks; one is stuck or gone ({first_line(e)})"
        else:
            raise
    if code == 1 and not dist.is_initialized():
        sys.exit(message or 1)
    print(message, end="\n" if message else "", file=sys.stderr, flush=True)
    if not dist.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    os._exit(code)  # an orderly exit would wait for ranks that are gone
