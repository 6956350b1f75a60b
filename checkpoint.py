"""The run folder: who may write it, its checkpoints, the picture and the model it ends with; and how the ranks at work on it
meet, wait and fail together. Off the reading path.

OUT/config.json  OUT/metrics.jsonl  OUT/checkpoints/step-000050/  OUT/losses.png  OUT/model/  OUT/cache/

A checkpoint folder under its own name is whole: it is written under another, synced, then renamed.
"""

import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from itertools import count
from pathlib import Path
from threading import Thread
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from cache import file_digest
from data import Tokenizer
from files import read_json, write_json
from model import Llama

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process may save too

OURS = (
    "metrics.jsonl",
    "losses.png",
    "eval.json",
    "checkpoints",
    "model",
    "model.part",
    "config.json",
)  # what --overwrite removes; the cache stays
WHERE_ONLY = ("recipe", "out", "cache", "overwrite", "dry_run")  # settings that do not change what is trained
HOW_ONLY = ("shard", "checkpoint_activations", "checkpoint_every", "keep", "resume")  # nor do these, but for rounding
HELD = []  # the lock of the folder this process writes


def finished(cfg) -> bool:
    """Whether --out already holds this very run, complete. Looks only; nothing is written before data and model have been read.

    Raises:
        ValueError: it holds no run at all (--overwrite replaces runs, nothing else), another configuration's, an unfinished
            one that is not to be resumed, or the very model or data that this run reads.
    """
    out = Path(cfg.out) if cfg.out else None
    if out is None or not out.exists():
        return False
    if not out.is_dir():
        raise ValueError(f"{out}: a file, expected a folder")
    if all(path.name in ("cache", "lock") for path in out.iterdir()):
        return False
    about = read_json(out / "config.json") if (out / "config.json").is_file() else {}
    before = about.get("config")
    if not about.keys() >= {"config", "versions", "git_commit"} or not isinstance(before, dict) or "lam_max" not in before:
        raise ValueError(f"{out}: not empty, and not a run of this program; choose another --out")
    for name in ("model", "data", "reference", "llmlingua_model"):
        path = getattr(cfg, name)
        if path and Path(path).exists() and Path(path).resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{out}: --{name.replace('_', '-')} {path} lies in it; choose another --out")
    if cfg.overwrite and not restarted(out):
        return False
    elsewhere = "choose another --out, or --overwrite"
    if changed := differing(cfg, before):
        names, name = ", ".join(changed[:3]) + ", …" * (len(changed) > 3), changed[0]
        raise ValueError(f"{out}: holds a run with another {names} ({name} {before.get(name)}, now {getattr(cfg, name)}); {elsewhere}")
    if not (out / "model").is_dir() and cfg.resume == "never":
        raise ValueError(f"{out}: holds an unfinished run of this configuration; --resume auto goes on with it, or {elsewhere}")
    return (out / "model").is_dir()


def differing(cfg, before: dict) -> list[str]:
    """Names of the settings that would make another run of it."""
    now = training(json.loads(json.dumps(asdict(cfg))))
    return [name for name in now if before.get(name) != now[name]]


def training(config: dict) -> dict:
    """The settings of a run that decide what is trained, of all that it has."""
    same = WHERE_ONLY + HOW_ONLY + ("micro_batch_tokens",) * (config["scope"] == "step")
    return {name: value for name, value in config.items() if name not in same}


def settings(out: Path) -> dict:
    """The configuration that a run folder was made with."""
    return read_json(out / "config.json")["config"]


def job() -> dict[str, str | None]:
    """What torchrun and Slurm call this job."""
    return {"torchrun": os.environ.get("TORCHELASTIC_RUN_ID"), "slurm": os.environ.get("SLURM_JOB_ID")}


def restarted(out: Path) -> bool:
    """Whether this very job made the folder, and torchrun or Slurm then started it again: --overwrite has done its work.

    torchrun draws an id for each launch, or was given one; "none" says nothing, unless it counts a restart. Slurm's is the same for
    every command of a job, so only a requeue counts.
    """
    made = (read_json(out / "config.json") if (out / "config.json").is_file() else {}).get("job")
    if not isinstance(made, dict):
        return False
    now, again = job(), {name: int(os.environ.get(f"{name}_RESTART_COUNT") or 0) > 0 for name in ("TORCHELASTIC", "SLURM")}
    same = {name: now[name] is not None and made.get(name) == now[name] for name in now}
    return same["torchrun"] and (now["torchrun"] != "none" or again["TORCHELASTIC"]) or same["slurm"] and again["SLURM"]


def unfinished(cfg, out: Path) -> bool:
    """Whether the folder holds this very run, without its model."""
    return not (out / "model").is_dir() and not differing(cfg, settings(out))


def claim(cfg) -> Path:
    """Create the run folder and its config.json, or take up an unfinished run; without --out, the next free runs/<recipe>-<n>.

    Only --overwrite removes an earlier run's files. Of two processes at work on one folder, the second is refused.
    """
    name = cfg.recipe or "run"
    if cfg.out:
        out = Path(cfg.out)
        out.mkdir(parents=True, exist_ok=True)
    elif earlier := [path for path in Path("runs").glob(f"{name}-*") if restarted(path) and unfinished(cfg, path)]:
        out = earlier[0]
    else:
        Path("runs").mkdir(exist_ok=True)
        for n in count(1):
            out = Path("runs") / f"{name}-{n}"
            try:
                out.mkdir()
                break
            except FileExistsError:
                continue
    lock = open(out / "lock", "w")  # noqa: SIM115, held until this run ends, however it ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{out}: another run is at work in it; choose another --out") from None
    HELD.append(lock)
    if cfg.overwrite and not restarted(out):
        for path in (out / name for name in OURS):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    if (out / "config.json").is_file():
        if changed := differing(cfg, settings(out)):
            raise ValueError(f"{out}: another run took it in the meantime ({changed[0]} differs); choose another --out")
        return out
    about = {"python": sys.version.split()[0], **{name: version(name) for name in ("torch", "safetensors", "tokenizers", "numpy")}}
    write_json(out / "config.json", {"config": asdict(cfg), "versions": about, "git_commit": git_commit(), "job": job()})
    return out


def git_commit() -> str | None:
    """The checkout's commit; None outside one, or without git."""
    try:
        git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return git.stdout.strip() or None


def disk_free(cfg) -> int:
    """Bytes free for checkpoints where the run folder is, or will be; those that it holds will make room for newer ones."""
    place = Path(cfg.out or "runs").absolute()
    held = sum(path.stat().st_size for path in place.glob("checkpoints/*/*")) if cfg.out else 0
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free + held


# Ranks.

TIMEOUT = timedelta(minutes=10)  # of a collective: no step takes so long, so a rank is stuck or gone


class World:
    """The processes that torchrun started, this one among them; alone without it.

    They talk by the store of torchrun's agent, where a wait has no limit, until `open` starts collectives, which have one.
    """

    def __init__(self):
        self.rank, self.size, self.marks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), 0
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
            if local_rank >= torch.cuda.device_count():
                raise ValueError(f"--nproc-per-node asks for more processes than the {torch.cuda.device_count()} GPUs of this node")
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        if self.size > 1:
            if self.rank:
                sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
            self.store = self.meet(next(dist.rendezvous("env://"))[0])

    def meet(self, store: dist.Store) -> dist.Store:
        """The store under a prefix of this start's own: the agent keeps what ranks of an earlier start, now gone, left there."""
        me = uuid4().hex
        if self.rank == 0:
            here = {0}
            while len(here) < self.size:
                for rank in set(range(self.size)) - here:
                    if store.check([f"hello/{rank}"]):
                        store.set(f"welcome/{store.get(f'hello/{rank}').decode()}", me)
                    if store.check([f"{me}/thanks/{rank}"]):
                        here.add(rank)
                time.sleep(0.02)
            return dist.PrefixStore(me, store)
        store.set(f"hello/{self.rank}", me)
        while not store.check([f"welcome/{me}"]):
            time.sleep(0.02)
        prefix = store.get(f"welcome/{me}").decode()
        store.set(f"{prefix}/thanks/{self.rank}", "")
        return dist.PrefixStore(prefix, store)

    def first(self, what: str, work: Callable):
        """What work() returns on rank 0, on every rank; the others wait as long as it takes. It must be fit for JSON."""
        if self.size == 1:
            return work()
        if self.rank == 0:
            self.store.set(what, json.dumps(work()))
        self.wait(what, what)
        return json.loads(self.store.get(what))

    def before_others(self, what: str, work: Callable):
        """work() on rank 0, then on the others, which find what it downloaded or stored."""
        done = work() if self.rank == 0 else None
        self.first(what, lambda: None)
        return done if self.rank == 0 else work()

    def all(self, what: str) -> None:
        """Wait until every rank has come here."""
        self.gather(what, None)
        self.first(f"all: {what}", lambda: None)

    def gather(self, what: str, value) -> list:
        """Every rank's value, on rank 0; it must be fit for JSON."""
        if self.size == 1:
            return [value]
        self.store.set(f"{what}/{self.rank}", json.dumps(value))
        if self.rank:
            return []
        for rank in range(self.size):
            self.wait(f"{what}/{rank}", f"{what} of rank {rank}")
        return [json.loads(self.store.get(f"{what}/{rank}")) for rank in range(self.size)]

    def wait(self, key: str, what: str) -> None:
        began = said = time.monotonic()
        while not self.store.check([key]):
            if self.store.check(["fault"]):
                raise ValueError(self.store.get("fault").decode())
            time.sleep(0.05)
            self.marked = time.monotonic()  # this may take as long as it takes
            if time.monotonic() > said + 60:
                said = time.monotonic()
                print(f"rank {self.rank}: {(said - began) / 60:.0f} min of waiting for {what}", file=sys.stderr, flush=True)

    def fault(self, e: Exception) -> None:
        """Tell the ranks that wait for this one, on whatever node, that it will not come."""
        if self.size > 1 and hasattr(self, "store"):
            with suppress(RuntimeError):  # the store may be gone
                self.store.set("fault", f"rank {self.rank}: {e}")

    def open(self) -> None:
        """Collectives from here on."""
        if self.size > 1:
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            store = dist.PrefixStore("group", self.store)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=TIMEOUT)
            self.mark()
            Thread(target=self.watch, daemon=True).start()

    def close(self) -> None:
        if self.size > 1:
            self.marks = math.inf  # nothing more to watch
            dist.destroy_process_group()

    def sum(self, t: Tensor) -> Tensor:
        """A tensor's sum over ranks."""
        if self.size > 1:
            self.mark()
            t = t.clone()
            dist.all_reduce(t)
        return t

    def mark(self) -> None:
        """Leave word of how far this rank has come, for `late`."""
        if self.size > 1:
            self.marks, self.marked = self.marks + 1, time.monotonic()
            self.store.set(f"mark/{self.rank}", str(self.marks))

    def watch(self) -> None:
        """End this process, naming the ranks that are behind, before the collective it hangs in runs out of time without a word."""
        while self.marks < math.inf:
            time.sleep(0.2)
            if time.monotonic() > self.marked + 0.9 * TIMEOUT.total_seconds() and self.marks < math.inf:
                print(
                    f"error: rank {self.rank}: nothing has moved for {0.9 * TIMEOUT}; behind the others: {self.late()}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)

    def late(self) -> str:
        """Which ranks are behind."""
        with suppress(RuntimeError):
            marks = [int(self.store.get(f"mark/{rank}")) if self.store.check([f"mark/{rank}"]) else 0 for rank in range(self.size)]
            behind = ", ".join(f"rank {rank}" for rank, mark in enumerate(marks) if mark < max(marks))
            return behind or "none, all came equally far: one is stuck within the step, or gone"
        return "unknown, torchrun itself is gone"


# Checkpoints.


def state(model: Llama, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Weights and AdamW's moments, by name. (Schedules and the order of data follow from the number of the step.)"""
    out = {}
    for name, p in model.named_parameters():
        moments = optimizer.state[p] or {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        out |= {name: p.detach(), f"exp_avg.{name}": moments["exp_avg"], f"exp_avg_sq.{name}": moments["exp_avg_sq"]}
    return out


def random_states(rank: int) -> dict[str, torch.Tensor]:
    """A rank's own; nothing here draws from them, but what somebody adds may."""
    states = {f"random.{rank}": torch.get_rng_state()}
    return states | ({f"random_cuda.{rank}": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def save(out: Path, step: int, model: Llama, optimizer: torch.optim.Optimizer, keep: int, world: World) -> None:
    """OUT/checkpoints/step-<n>, written by all ranks; then all but the newest `keep` go.

    Raises:
        OSError: it cannot be written; earlier ones are as they were.
    """
    folder = out / "checkpoints"
    part, whole = folder / f"step-{step:06d}.part", folder / f"step-{step:06d}"
    world.mark()
    try:
        if world.rank == 0:
            folder.mkdir(exist_ok=True)
            for old in (*folder.glob("*.part"), *(path for path in folder.glob("step-??????") if path.name >= whole.name)):
                shutil.rmtree(old)  # what a kill left, and what was passed over as damaged
        if world.size > 1:
            dist.barrier()
        dcp.save(state(model, optimizer) | random_states(world.rank), checkpoint_id=part, no_dist=world.size == 1)
        mine = [
            path for path in sorted(part.iterdir()) if path.name.startswith(f"__{world.rank}_") or (path.name[0] == "." and not world.rank)
        ]
        parts = world.gather(f"digests of step {step}", {path.name: file_digest(path) for path in mine})
        if world.rank == 0:
            about = {"step": step, "ranks": world.size, "files": {name: sha for files in parts for name, sha in files.items()}}
            write_json(part / "about.json", about)
            sync(part / "about.json", part)
            part.rename(whole)
            sync(folder)
            for old in sorted(folder.glob("step-??????"))[:-keep]:
                shutil.rmtree(old)
    except (dcp.CheckpointException, OSError, RuntimeError) as e:
        reason = (next((str(f) for f in getattr(e, "failures", {}).values()), str(e)).strip() or repr(e)).splitlines()
        kept = max((str(path) for path in folder.glob("step-??????")), default="none")
        raise OSError(f"{part}: cannot be written ({reason[0][:200]}); is the disk full? The last checkpoint: {kept}") from e
    if world.size > 1:
        dist.barrier()
    world.mark()


def sync(*paths: Path) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def newest(out: Path, world: World) -> Path | None:
    """The newest checkpoint that is whole, None where there is none at all; says which ones are not. The ranks share the reading.

    Raises:
        ValueError: there are some, and none is whole.
    """
    paths = world.first("checkpoints", lambda: [str(path) for path in sorted((out / "checkpoints").glob("step-??????"), reverse=True)])
    for path in map(Path, paths):
        try:
            about = read_json(path / "about.json")
            if lacking := sorted({"step", "ranks", "files"} - about.keys()):
                raise ValueError(f"about.json lacks {lacking[0]}")
            share = sorted(about["files"].items())[world.rank :: world.size]
            wrong = [
                f"{name} is missing or has changed" for name, sha in share if not (path / name).is_file() or file_digest(path / name) != sha
            ]
        except (ValueError, AttributeError, OSError) as e:
            wrong = [str(e)]
        said = [reason for reasons in world.gather(f"state of {path}", wrong) for reason in reasons]
        if world.first(f"verdict on {path}", lambda: not said):  # noqa: B023, called at once
            return path
        print(f"{path}: not whole ({said[0] if said else 'see rank 0'}); looking for one before it")
    if paths:
        raise ValueError(f"{out / 'checkpoints'}: none is whole; move them away to begin again from the first step, or --overwrite")
    return None


def resume(out: Path, model: Llama, optimizer: torch.optim.Optimizer, world: World) -> int:
    """Put the newest whole checkpoint's state in place; returns how many steps it has behind it, 0 without one.

    The ranks may be more or fewer than those that saved it. The log is cut to those steps, so that none is there twice.
    """
    path = newest(out, world)
    about = read_json(path / "about.json") if path else {"step": 0}
    step = about["step"]
    if path:
        loaded, mine = state(model, optimizer), random_states(world.rank)
        try:
            there = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
            mine = {name: value for name, value in mine.items() if name in there}  # other ranks, another device: not all are
            loaded |= mine
            dcp.load(loaded, checkpoint_id=path, no_dist=world.size == 1)
        except (dcp.CheckpointException, OSError, RuntimeError, KeyError) as e:
            raise ValueError(
                f"{path}: cannot be read ({(str(e).strip() or repr(e)).splitlines()[0][:200]}); remove it to go on from the one before it"
            ) from e
        for name in mine:
            (torch.cuda.set_rng_state if "cuda" in name else torch.set_rng_state)(loaded[name])
        for name, p in model.named_parameters():
            moments = {"exp_avg": loaded[f"exp_avg.{name}"], "exp_avg_sq": loaded[f"exp_avg_sq.{name}"]}
            optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}
    log = out / "metrics.jsonl"
    if world.rank == 0 and log.is_file():
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)[:step]
        part = log.with_suffix(".part")
        part.write_text("".join(lines), encoding="utf-8")
        part.replace(log)
    return step


def export(model: Llama, tokenizer: Tokenizer, template: str, dtype: torch.dtype, out: Path, world: World) -> None:
    """OUT/model in the published layout; a folder of that name is complete. A matrix at a time is gathered, on rank 0 a file's worth."""

    def gather(p: torch.Tensor) -> torch.Tensor:
        world.mark()
        return p.full_tensor() if isinstance(p, DTensor) else p

    part = out / "model.part"
    if world.rank == 0:
        model.save_pretrained(part, dtype, read=gather)
        tokenizer.save(part, template)
        part.rename(out / "model")
    else:
        for p in model.parameters():
            gather(p.detach().to(dtype))


def plot_losses(out: Path) -> None:
    """losses.png, Figure 2 of the paper for this run: all, important and unimportant tokens."""
    try:
        import matplotlib
    except ImportError:
        print('no losses.png: matplotlib is not installed; pip install -e ".[plots]"')
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(out / "metrics.jsonl", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    curves = {"important": ("important", "tab:red"), "unimportant": ("unimportant", "tab:blue"), "ce": ("all", "black")}
    if all(row["important"] is None for row in rows):
        curves = {"ce": ("all", "black")}  # no groups: unimportant is all
    for name, (label, colour) in curves.items():
        points = [(row["step"], row[name]) for row in rows if row[name] is not None]
        if not points:
            continue
        steps, losses = map(np.array, zip(*points))
        window = 2 * (len(points) // 100) + 1  # a running mean over 2 % of the steps, centred; the raw curve behind it
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        ax.plot(steps, losses, color=colour, alpha=0.2, linewidth=0.8)
        ax.plot(steps[window // 2 : len(steps) - window // 2], smooth, color=colour, label=label)
    ax.set(xlabel="step", ylabel="cross-entropy (nats per token)", title=out.name)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(out / "losses.png", dpi=120)
    plt.close(fig)
