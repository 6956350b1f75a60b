"""The run folder: who may write it, what it records, the picture and the model it ends with. Off the reading path.

OUT/config.json  OUT/metrics.jsonl  OUT/losses.png  OUT/model/  OUT/cache/
"""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from itertools import count
from pathlib import Path

import numpy as np
import torch

from data import Tokenizer
from model import Llama, read_json, write_json

OURS = ("metrics.jsonl", "losses.png", "model", "model.part", "config.json")  # what --overwrite removes, in this order; cached tokens stay
WHERE_ONLY = ("recipe", "out", "cache", "overwrite", "dry_run")  # settings that do not change what is trained


def finished(cfg) -> bool:
    """Whether --out already holds this very run, complete. Looks only; nothing is written before data and model have been read.

    Raises:
        ValueError: it holds no run at all (--overwrite replaces runs, nothing else), another or an unfinished one without
            --overwrite, or the very model or data that this run reads.
    """
    out = Path(cfg.out) if cfg.out else None
    if out is None or not out.exists():
        return False
    if not out.is_dir():
        raise ValueError(f"{out}: a file, expected a folder")
    if all(path.name == "cache" for path in out.iterdir()):
        return False
    about = read_json(out / "config.json") if (out / "config.json").is_file() else {}
    before = about.get("config")
    if about.keys() != {"config", "versions", "git_commit"} or not isinstance(before, dict) or "lam_max" not in before:
        raise ValueError(f"{out}: not empty, and not a run of this program; choose another --out")
    for name in ("model", "data", "reference", "llmlingua_model"):
        path = getattr(cfg, name)
        if path and Path(path).exists() and Path(path).resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{out}: --{name.replace('_', '-')} {path} lies in it; choose another --out")
    if cfg.overwrite:
        return False
    elsewhere = "choose another --out, or --overwrite"
    now = json.loads(json.dumps(asdict(cfg)))
    if changed := [name for name in now if name not in WHERE_ONLY and before.get(name) != now[name]]:
        names, name = ", ".join(changed[:3]) + ", …" * (len(changed) > 3), changed[0]
        raise ValueError(f"{out}: holds a run with another {names} ({name} {before.get(name)}, now {now[name]}); {elsewhere}")
    if not (out / "model").is_dir():
        raise ValueError(f"{out}: holds an unfinished run of this configuration; {elsewhere}")
    return True


def claim(cfg) -> Path:
    """Create the run folder and its config.json; without --out, the next free runs/<recipe>-<n>.

    Only --overwrite removes an earlier run's files. Of two processes that start on one folder, the second is refused.
    """
    if cfg.out:
        out = Path(cfg.out)
        out.mkdir(parents=True, exist_ok=True)
        for path in (out / name for name in OURS) if cfg.overwrite else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    else:
        Path("runs").mkdir(exist_ok=True)
        for n in count(1):
            out = Path("runs") / f"{cfg.recipe or 'run'}-{n}"
            try:
                out.mkdir()
                break
            except FileExistsError:
                continue
    try:
        (out / "config.json").touch(exist_ok=False)
    except FileExistsError:
        raise ValueError(f"{out}: another run took it in the meantime; choose another --out") from None
    about = {"python": sys.version.split()[0], **{name: version(name) for name in ("torch", "safetensors", "tokenizers", "numpy")}}
    write_json(out / "config.json", {"config": asdict(cfg), "versions": about, "git_commit": git_commit()})
    return out


def git_commit() -> str | None:
    """The checkout's commit; None outside one, or without git."""
    try:
        git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return git.stdout.strip() or None


def export(model: Llama, tokenizer: Tokenizer, template: str, dtype: torch.dtype, out: Path) -> None:
    """OUT/model in the published layout; a folder of that name is complete."""
    part = out / "model.part"
    model.save_pretrained(part, dtype)
    tokenizer.save(part, template)
    part.rename(out / "model")


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
