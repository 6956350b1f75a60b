"""The files that `python -m eval` writes: the results, one JSON file; where asked for, the samples of each task."""

import hashlib
import json
from itertools import count
from pathlib import Path

from filelock import FileLock  # comes with torch

from eval import say
from published.digests import of_file
from published.files import read_json, write_json
from published.weights import weight_files

FINGERPRINTED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
SETTINGS = {"bos": str, "dtype": str, "limit": int | None}  # which decide the scores
HEAD = f"{'task':<16}{'items':>7}{'seconds':>9}{'items/s':>9}   scores, % (± standard error)"


def read(path: Path) -> dict:
    if not path.is_file():
        inside = f"; but {path}/eval.json is there" if (path / "eval.json").is_file() else ""
        raise ValueError(f"{path}: no such file; `python -m eval` writes it{inside}")
    result, where = read_json(path), f"{path}: not a result of `python -m eval`"
    typed(where, result, {"model": str, "fingerprint": str, "settings": dict, "tasks": dict})
    typed(where, {"run": None, "limit": None} | result | result["settings"], SETTINGS | {"run": dict | None})
    typed(where, tasks := result["tasks"], dict.fromkeys(tasks, dict))
    for task in tasks.values():
        typed(where, {"made": {}} | task, {"made": dict})
    return result


def typed(where: str, values: dict, kinds: dict) -> None:
    """ValueError where one of the values is missing or of another type."""
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            expected = getattr(kind, "__name__", kind)
            raise ValueError(f"{where} ({name} is {values.get(name)!r:.40}, expected {expected})")


def run_of(model: Path) -> dict | None:
    """What trained a run's model: its configuration and digests; None for any other model."""
    path = model.parent / "config.json"
    about = read_json(path) if model.name == "model" and path.is_file() else {}
    return about["config"] | {"digests": about.get("digests", {})} if isinstance(about.get("config"), dict) else None


def fingerprint(folder: Path) -> str:
    """SHA-256 of what makes the model and its texts: weights, configuration, tokenizer."""
    files = [folder / name for name in FINGERPRINTED if (folder / name).is_file()]
    digests = [f"{path.name} {of_file(path)}" for path in files + sorted(set(weight_files(folder).values()))]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def earlier(out: Path, about: dict, samples: dict[str, Path]) -> dict:
    """The results so far, or `about`, which has no task yet; ValueError where the files hold anything else."""
    for path in (out, *samples.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.with_name(f".{out.name}.lock")):
        before = read(out) if out.exists() else about
    if other := difference(before, about):
        raise ValueError(f"{out}: holds {other}; choose another --out, or move it away")
    for name, path in samples.items():
        if name not in before["tasks"] and path.exists():
            raise ValueError(f"{path}: exists; choose another --samples, or move it away")
        made = before["tasks"].get(name, {}).get("made", {})
        if name in before["tasks"] and not (path.is_file() and of_file(path) == made.get("samples_sha256")):
            raise ValueError(f"{out}: has {name} without {path}; to score it again choose another --out")
    return before


def difference(before: dict, about: dict) -> str:
    """What the results before are of, where that is not the same model in the same settings."""
    if before["fingerprint"] != about["fingerprint"]:
        return f"another model's results ({before['model']})"
    was, now = before["settings"], about["settings"]
    return "".join([f"results with {x} {was.get(x)}, now {now[x]}" for x in now if was.get(x) != now[x]][:1])


def record(out: Path, about: dict, name: str, summary: dict, samples: Path | None, rows: list[dict]) -> Path:
    """Add a task to the results, beside what another command has written there since, and write its samples.

    Returns the results file: the next free name where `out` has become that of another model or other settings.
    """
    with FileLock(out.with_name(f".{out.name}.lock")):
        before = read(out) if out.exists() else about
        if other := difference(before, about):
            taken = f"{out}: holds {other} by now"
            out, before = write_new(out, json.dumps(about)), about
            say(f"{taken}; results go to {out}")
        if name not in before["tasks"]:
            if samples:
                lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
                samples = write_new(samples, "".join(f"{line}\n" for line in lines))
                summary["made"] |= {"samples": str(samples), "samples_sha256": of_file(samples)}
            before["tasks"][name] = summary
        else:
            say(f"{out}: another command has written {name} in the meantime; its scores and samples stay")
        about["tasks"] |= before["tasks"]
        write_json(out, about)
    return out


def write_new(path: Path, text: str) -> Path:
    """Write a new file, and return its name: the path, or where that exists with -2, -3, … before the suffix."""
    for n in count(1):
        found = path if n == 1 else path.with_name(f"{path.stem}-{n}{path.suffix}")
        try:
            with open(found, "x", encoding="utf-8") as f:
                f.write(text)
            return found
        except FileExistsError:
            continue
        except OSError:
            found.unlink(missing_ok=True)
            raise


def line(name: str, n: int, summary: dict, seconds: float) -> str:
    """One task's line for the terminal."""
    found, scores = dict(summary), []
    for part in ("mc1", "mc2"):
        found |= {f"{part}_{key}": value for key, value in summary.get(part, {}).items()}
    for key, value in found.items():
        if key.endswith("acc") or key == "acc_norm":
            error = found.get(f"{key}_stderr")
            label = key.removesuffix("_acc").replace("_level", "")
            scores.append(f"{label} {100 * value:.2f}" + ("" if error is None else f" ± {100 * error:.2f}"))
    scores += [f"{key} {100 * part['acc']:.2f}" for key, part in summary.get("categories", {}).items() if part["n"]]
    if failed := summary.get("checks_failed"):
        scores.append(f"{failed} responses broke a check and count as failed")
    return f"{name:<16}{n:>7,}{seconds:>9.1f}{n / seconds:>9.1f}   {', '.join(scores)}"
