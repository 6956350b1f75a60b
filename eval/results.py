"""The files that `python -m eval` writes: the results, one JSON file; where asked for, the samples of each task."""

import hashlib
import json
from pathlib import Path

from eval.generate import Prompt
from eval.score import Item
from published.files import read_json
from published.weights import weight_files

FINGERPRINTED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")

HEAD = f"{'task':<16}{'items':>7}{'seconds':>9}{'items/s':>9}   scores, % (± standard error)"


def read(path: Path) -> dict:
    if not path.is_file():
        inside, missing = path / "eval.json", "no such file; `python -m eval` writes it"
        raise ValueError(f"{path}: " + (f"a folder; its results are {inside}" if inside.is_file() else missing))
    result = read_json(path)
    if not {"model", "fingerprint", "settings", "tasks"} <= result.keys() or not isinstance(result["tasks"], dict):
        raise ValueError(f"{path}: not a result of `python -m eval`")
    return result


def run_of(model: Path) -> dict | None:
    """The configuration that trained a run's model; None for any other model."""
    path = model.parent / "config.json"
    return read_json(path).get("config") if model.name == "model" and path.is_file() else None


def fingerprint(folder: Path) -> str:
    """SHA-256 of what makes the model and its texts: weights, configuration, tokenizer."""
    files, digests = [folder / name for name in FINGERPRINTED if (folder / name).is_file()], []
    for path in files + sorted(set(weight_files(folder).values())):
        with open(path, "rb") as f:
            digests.append(f"{path.name} {hashlib.file_digest(f, 'sha256').hexdigest()}")
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def earlier(out: Path, about: dict, samples: dict[str, Path]) -> dict:
    """The results so far, of this model under these settings; `about`, which has no task yet, where there are none.

    Raises:
        ValueError: results of another model, under other settings, or without the samples now asked for; a file that
            stands where samples would go.
    """
    for path in (out, *samples.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
    before, other = read(out) if out.exists() else about, None
    was, now = before["settings"], about["settings"]
    if before["fingerprint"] != about["fingerprint"]:
        other = f"another model's results ({before['model']})"
    elif was != now:
        other = "results with " + "; ".join(f"{k} {was.get(k)}, now {now[k]}" for k in now if was.get(k) != now[k])
    if other:
        raise ValueError(f"{out}: holds {other}; choose another --out, or move it away")
    for name, path in samples.items():
        task = before["tasks"].get(name)
        if task is None and path.exists():
            raise ValueError(f"{path}: exists; choose another --samples, or move it away")
        if task is not None and task.get("made", {}).get("samples") != str(path):
            raise ValueError(f"{out}: has {name} without {path}; to score it again choose another --out")
    return before


def write_samples(path: Path, items: list[Item] | list[Prompt], scored: list[dict]) -> None:
    """A line for each item: what was asked, what the model gave, its metrics."""
    part = Path(f"{path}.part")
    with open(part, "w", encoding="utf-8") as f:
        for item, row in zip(items, scored, strict=True):
            f.write(json.dumps(item.asked | row, ensure_ascii=False) + "\n")
    part.rename(path)


def line(name: str, n: int, summary: dict, seconds: float) -> str:
    """One task's line for the terminal."""
    flat, scores = {}, []
    for key, value in summary.items():
        flat |= {f"{key} {k}": v for k, v in value.items()} if key in ("mc1", "mc2") else {key: value}
    for key, value in flat.items():
        if key.endswith("acc") or key == "acc_norm":
            error = flat.get(f"{key}_stderr")
            label = key.removesuffix(" acc").removesuffix("_acc").replace("_level", "")
            scores.append(f"{label} {100 * value:.2f}" + ("" if error is None else f" ± {100 * error:.2f}"))
    scores += [f"{key} {100 * part['acc']:.2f}" for key, part in summary.get("categories", {}).items() if part["n"]]
    return f"{name:<16}{n:>7,}{seconds:>9.1f}{n / seconds:>9.1f}   {', '.join(scores)}"
