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
        inside = f"; but {path}/eval.json is there" if (path / "eval.json").is_file() else ""
        raise ValueError(f"{path}: no such file; `python -m eval` writes it{inside}")
    result = read_json(path)
    if not {"model", "fingerprint", "settings", "tasks"} <= result.keys() or not isinstance(result["tasks"], dict):
        raise ValueError(f"{path}: not a result of `python -m eval`")
    return result


def run_of(model: Path) -> dict | None:
    """What trained a run's model: its configuration, and the digests of a user's files; None for any other model."""
    path = model.parent / "config.json"
    about = read_json(path) if model.name == "model" and path.is_file() else {}
    return about["config"] | {"digests": about.get("digests", {})} if isinstance(about.get("config"), dict) else None


def fingerprint(folder: Path) -> str:
    """SHA-256 of what makes the model and its texts: weights, configuration, tokenizer."""
    files = [folder / name for name in FINGERPRINTED if (folder / name).is_file()]
    digests = []
    for path in files + sorted(set(weight_files(folder).values())):
        with open(path, "rb") as f:
            digests.append(f"{path.name} {hashlib.file_digest(f, 'sha256').hexdigest()}")
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def earlier(out: Path, about: dict, samples: dict[str, Path]) -> dict:
    """The results so far, or `about`, which has no task yet; ValueError where the files hold anything else."""
    for path in (out, *samples.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
    before = read(out) if out.exists() else about
    was, now = before["settings"], about["settings"]
    other = [f"results with {name} {was.get(name)}, now {now[name]}" for name in now if was.get(name) != now[name]]
    if before["fingerprint"] != about["fingerprint"]:
        other = [f"another model's results ({before['model']})"]
    if other:
        raise ValueError(f"{out}: holds {other[0]}; choose another --out, or move it away")
    for name, path in samples.items():
        if name not in before["tasks"] and path.exists():
            raise ValueError(f"{path}: exists; choose another --samples, or move it away")
        if name in before["tasks"] and before["tasks"][name].get("made", {}).get("samples") != str(path):
            raise ValueError(f"{out}: has {name} without {path}; to score it again choose another --out")
    return before


def write_samples(path: Path, items: list[Item] | list[Prompt], scored: list[dict]) -> None:
    """A line for each item: what was asked, what the model gave, its metrics."""
    rows = [json.dumps(item.asked | row, ensure_ascii=False) for item, row in zip(items, scored, strict=True)]
    part = Path(f"{path}.part")
    part.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    part.rename(path)


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
    return f"{name:<16}{n:>7,}{seconds:>9.1f}{n / seconds:>9.1f}   {', '.join(scores)}"
