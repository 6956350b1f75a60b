"""The run folder: who may write it, its checkpoints, the model it ends with.

OUT/config.json  OUT/metrics.jsonl  OUT/checkpoints/step-000050/  OUT/losses.png  OUT/model/  OUT/cache/

A checkpoint under its own name is complete: it is written under another, then renamed. Nothing is deleted here but this
run's own older checkpoints and unfinished `.part` folders.
"""

import fcntl
import io
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import count
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from model import Llama
from published import weights
from published.digests import of_file, of_model
from published.files import read_json, write_json
from published.hub import data_file, resolve
from published.rows import half_pair, readable
from published.tokenizer import Tokenizer
from support.named import Named
from support.ranks import INTERRUPTS, Ranks, everywhere, first_line

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process may save too

NOT_TRAINING = "digests recipe fresh out cache dry_run shard compile checkpoint_activations checkpoint_every keep"
NOT_TRAINING = {*NOT_TRAINING.split()}
FAULTS = (dcp.CheckpointException, OSError)  # the first one is a BaseException
CHECKSUMS, OWN_STATE = "crc32.json", "objective.pt"


# Who may write it.


def record(cfg, objective: Named, grouper: Named) -> dict:
    """What a run is, for its config.json: the settings, and digests of data, models and a user's own functions."""
    for name, value in vars(cfg).items():  # before anything slow: config.json could not hold it
        if isinstance(value, str) and (half := half_pair(value)):
            raise ValueError(f"--{name.replace('_', '-')}: a path that is not UTF-8 ({half}); rename it")
    digests = {"objective": objective.digest, "grouper": grouper.digest}
    digests["data"] = of_file(readable(data_file(cfg.data)))
    scorers = {"rho1": "reference", "llmlingua2": "llmlingua_model"} if grouper.digest is None else {}
    for name in ("model", *(flag for scored, flag in scorers.items() if scored == grouper.name)):
        given = getattr(cfg, name)
        digests[name] = of_model(given, resolve(given))
    config = vars(cfg) | {"objective": objective.name, "grouper": grouper.name}
    return {"config": config, "digests": {name: digest for name, digest in digests.items() if digest}}


def training(config: dict, digests: dict[str, str]) -> dict:
    """The settings of a run that decide what is trained; what has a digest counts by content, not by path."""
    aside = NOT_TRAINING | ({"micro_batch_tokens"} if config["scope"] == "step" else set())
    known = digests.items() if isinstance(digests, dict) else ()
    own = {name: f"content {digest[:20]}" for name, digest in known if isinstance(digest, str)}
    aside |= {"llmlingua_model"} - own.keys()  # it was not used
    for name in own.keys() & {"objective", "grouper"}:  # NAME of FILE.py:NAME
        own[name] = f"{str(config.get(name)).rpartition(':')[2]} with {own[name]}"
    return {name: x for name, x in json.loads(json.dumps(config | own)).items() if name not in aside}


def finished(about: dict, out: Path) -> bool:
    """Whether the folder holds this very run, complete; ValueError where it holds anything but this run."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file, expected a folder")
    if not out.exists() or all(path.name in ("cache", "lock") for path in out.iterdir()):
        return False
    before = read_json(out / "config.json") if (out / "config.json").is_file() else {}
    config, known = before.get("config"), before.keys() >= {"config", "versions", "git_commit"}
    if not known or not isinstance(config, dict) or "scope" not in config:
        raise ValueError(f"{out}: not empty, and not a run of this program; choose another --out")
    log = out / "metrics.jsonl"
    begun = any((out / name).exists() for name in ("checkpoints", "model"))
    if not begun and not (log.exists() and log.stat().st_size):
        return False  # a run that failed before its first step: the folder is free
    digests = before.get("digests", {})
    if not isinstance(digests, dict) or "data" not in digests:
        unknown = "holds a run that did not record the content of its data and model (by an earlier version)"
        raise ValueError(f"{out}: {unknown}; choose another --out, or move it away")
    was, now = training(config, digests), training(**about)
    if changed := [name for name in now if was.get(name) != now[name]]:
        names, name = ", ".join(changed[:3]) + ", …" * (len(changed) > 3), changed[0]
        difference = f"{name} {was.get(name)}, now {now[name]}"
        if str(now[name]).startswith("content"):
            difference += f": what --{name.replace('_', '-')} {about['config'][name]} holds is not what it was"
        raise ValueError(
            f"{out}: holds a run with another {names} ({difference}); choose another --out, or move it away"
        )
    return (out / "model").is_dir()


@contextmanager
def run_folder(cfg, about: dict, ranks: Ranks) -> Iterator[Path]:
    """The folder of this run, new or where it stopped; no other process may write it meanwhile."""
    if ranks.size > 1 and not cfg.out:
        raise everywhere(ValueError("--out is missing: several processes need a folder that all of them see"))
    locks, out = [], None
    try:
        out = Path(ranks.first(lambda: str(lock_run_folder(cfg, about, locks))))
        yield out
    except BaseException as e:
        if not INTERRUPTS and not isinstance(e, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt(out and f"interrupted; {saved(out)}") from None
    finally:
        for lock in locks:
            lock.close()


def lock_run_folder(cfg, about: dict, locks: list) -> Path:
    """Create --out, or without it the next free runs/<recipe>-<n>; the lock is appended to `locks`."""
    for n in count(1):
        out = Path(cfg.out or f"runs/{cfg.recipe or 'run'}-{n}")
        try:
            out.mkdir(parents=True, exist_ok=bool(cfg.out))
            break
        except FileExistsError:
            if cfg.out:
                raise
    locks.append(open(out / "lock", "w"))  # noqa: SIM115, held until this run ends, however it ends
    try:
        fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{out}: another run is at work in it; choose another --out") from None
    finished(about, out)  # another run may have taken it in the meantime
    if not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:  # before the first step
        libraries = {name: version(name) for name in ("torch", "safetensors", "tokenizers", "numpy")}
        versions = {"python": sys.version.split()[0], **libraries}
        write_json(out / "config.json", {**about, "versions": versions, "git_commit": git_commit()})
    return out


def git_commit() -> str | None:
    """The checkout's commit; None outside one, or without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return git.stdout.strip() or None


# Checkpoints.


def state(model: Llama, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Weights and AdamW's moments, by name. (Schedules and the data order follow from the step's number.)"""
    out = {}
    for name, p in model.named_parameters():
        moments = optimizer.state[p] or {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        out |= {name: p.detach(), f"exp_avg.{name}": moments["exp_avg"], f"exp_avg_sq.{name}": moments["exp_avg_sq"]}
    return out


def own_state(objective: Named) -> bytes | None:
    """A stateful objective's state_dict(), as a file's content; ValueError where that could not be loaded again."""
    if not hasattr(objective, "state_dict"):
        return None
    try:
        torch.save(objective.state_dict(), buffer := io.BytesIO())
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError) as e:
        kinds = "only tensors, numbers, strings, lists and dicts can be loaded again"
        raise everywhere(ValueError(f"{objective}: its state_dict() holds something else; {kinds}")) from e
    return buffer.getvalue()


def save(out: Path, step: int, model: Llama, optimizer, objective: Named, keep: int, ranks: Ranks) -> None:
    """OUT/checkpoints/step-<n>, written by all ranks; then all but the newest `keep` go.

    Raises:
        OSError: it cannot be written; earlier ones are unchanged.
    """
    folder = out / "checkpoints"
    part = folder / f"step-{step:06d}.part"

    def clear() -> None:
        for unfinished in folder.glob("*.part"):
            shutil.rmtree(unfinished)

    def finish() -> None:
        with open(part / CHECKSUMS, "w") as f:
            json.dump({name: crc for of_rank in checksums for name, crc in of_rank.items()}, f)
            f.flush()
            os.fsync(f.fileno())
        part.rename(part.with_suffix(""))
        for older in sorted(folder.glob("step-??????"))[:-keep]:
            shutil.rmtree(older)

    try:
        ranks.first(clear)
        dcp.save(
            state(model, optimizer), checkpoint_id=part, no_dist=ranks.size == 1, process_group=ranks.patient
        )  # a slow disk may take longer than a step
        mine = [path.name for path in part.glob(f"__{ranks.rank}_*")]
        if ranks.rank == 0:
            mine.append(".metadata")
            if own := own_state(objective):  # the same on every rank
                (part / OWN_STATE).write_bytes(own)
                mine.append(OWN_STATE)
        checksums = ranks.together(lambda: {name: crc32(part / name) for name in mine})
        ranks.first(finish)
    except FAULTS as e:
        fault = f"cannot be written ({reason(e)}); is the disk full? The last checkpoint: {newest(out)}"
        raise everywhere(OSError(f"{part}: {fault}")) from e


def newest(out: str | Path) -> str:
    """Where to resume from, for messages."""
    return max((str(path) for path in (Path(out) / "checkpoints").glob("step-??????")), default="none")


def saved(out: Path) -> str:
    """What a run has kept so far and how to use it, for whoever interrupts it."""
    if (out / "model").is_dir():
        return f"the model is complete: {out / 'model'}"
    last = newest(out)
    if last == "none":
        return f"no checkpoint in {out} yet; the same command starts anew"
    return f"saved: {last}; resume with the same command and --out {shlex.quote(str(out))}"


def crc32(path: Path) -> int:
    """Checksum of a file as it now stands on the disk."""
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def damage(path: Path, ranks: Ranks) -> list[str]:
    """What is wrong with a checkpoint; the ranks share the reading."""

    def look() -> list[str]:
        try:
            known = read_json(path / CHECKSUMS)
        except ValueError as e:
            return [str(e)]
        if not known:
            return [f"{CHECKSUMS} lists no files"]
        share = sorted(known)[ranks.rank :: ranks.size]
        intact = {name for name in share if (path / name).is_file() and crc32(path / name) == known[name]}
        return [f"{name} is missing or has changed" for name in share if name not in intact]

    return [fault for of_rank in ranks.together(look) for fault in of_rank]


def resume(out: Path, model: Llama, optimizer: torch.optim.Optimizer, objective: Named, ranks: Ranks) -> int:
    """Put the newest intact checkpoint's state in place; returns how many steps it has behind it, 0 without one.

    The ranks may be more or fewer than those that saved it. Newer, damaged ones are renamed. The log is cut to those
    steps, so that none is there twice.

    Raises:
        ValueError: there are checkpoints, and none is intact.
    """
    own_state(objective)  # what could not be saved is refused before the first step
    paths = ranks.first(lambda: sorted((out / "checkpoints").glob("step-??????"), reverse=True))
    step, damaged = 0, []
    for path in paths:
        if faults := damage(path, ranks):
            print(f"{path}: damaged ({faults[0]}); looking for an older one")
            damaged.append(path)
            continue
        step, loaded = int(path.name.removeprefix("step-")), state(model, optimizer)
        try:
            dcp.load(loaded, checkpoint_id=path, no_dist=ranks.size == 1, process_group=ranks.patient)
        except FAULTS as e:
            raise ValueError(f"{path}: cannot be read ({reason(e)}); move it away to resume from an older one") from e
        for name, p in model.named_parameters():
            moments = {moment: loaded[f"{moment}.{name}"] for moment in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}
        if hasattr(objective, "load_state_dict"):
            objective.load_state_dict(torch.load(path / OWN_STATE, ranks.device, weights_only=True))
        break
    if damaged and not step:
        begin = "move them away to begin again from the first step"
        raise ValueError(f"{out / 'checkpoints'}: no checkpoint is intact; {begin}")
    ranks.first(lambda: tidy(out, step, damaged))
    return step


def tidy(out: Path, step: int, damaged: list[Path]) -> None:
    for path in damaged:
        free = (path.with_suffix(f".damaged{n or ''}") for n in count())
        path.rename(next(name for name in free if not name.exists()))
    log = out / "metrics.jsonl"
    if log.is_file():
        part = log.with_suffix(".part")
        part.write_text("".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[:step]), encoding="utf-8")
        part.replace(log)


def reason(e: BaseException) -> str:
    """The first line of a fault, of whichever rank had it."""
    return first_line(next(iter(getattr(e, "failures", {}).values()), (e,))[0])


# The end.


def finite(model: Llama, dtype: torch.dtype, ranks: Ranks, when: str, cure: str) -> None:
    """Refuse, on every rank, weights that would not be finite in the type in which they will be saved."""
    if faults := [*filter(None, ranks.together(lambda: weights.not_finite(model, dtype)))]:
        raise everywhere(ValueError(f"{when} {faults[0]}; {cure} --save-dtype"))


def export(model: Llama, tokenizer: Tokenizer, template: str, dtype: torch.dtype, out: Path, ranks: Ranks) -> None:
    """OUT/model in the published layout; a folder of that name is complete.

    A matrix at a time is gathered; rank 0 holds a file's worth.

    Raises:
        ValueError: the last update left weights that are not finite in `dtype`.
    """
    finite(model, dtype, ranks, f"{out}: after the last update", "no model written. Lower --lr, or choose a wider")

    def full(p: torch.Tensor) -> torch.Tensor:
        return p.full_tensor() if isinstance(p, DTensor) else p

    def write() -> None:
        tokenizer.save(part, template)
        part.rename(out / "model")

    part = out / "model.part"
    if ranks.rank == 0:
        weights.save(model, part, dtype, full, changed=tokenizer.ids(template))
    else:
        for p in model.parameters():
            full(p.detach().to(dtype))
    ranks.first(write)  # the others wait: rank 0 may write for longer than a step takes
