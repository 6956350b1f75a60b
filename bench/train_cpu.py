"""Time one fixed training workload on this machine's CPU: two Llamas, LIMA, SFT-GO with TF-IDF groups, complete steps.

    python bench/train_cpu.py                        a minute on two cores
    python bench/train_cpu.py --out numbers.json     the same numbers, to keep

    small     demo/base's shape
    large     a Llama of about 40M parameters, same tokenizer and vocabulary

Both start from fresh weights. Each is a run of train.py itself, in a process of its own, so the loop that people use
is what is timed; the numbers come from the run's metrics.jsonl. A step's seconds include packing, forward, backward,
clipping and AdamW. Peak memory is the process's, so it includes reading and tokenizing the data. Nothing is kept but
--out.

Compare peak memory at equal --steps only: on a CPU, torch keeps oneDNN's kernels for each new row length, so it rises
for some dozens of steps.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from model import Llama, LlamaConfig
from published.config import read_config
from published.files import read_json, write_json

SHARED = Path(os.environ.get("SFTGO_SHARED", ROOT.parent / "shared"))
DTYPE = "bfloat16"
WORKLOAD = {"template": "plain", "context": 1024, "batch-size": 8, "micro-batch-tokens": 8 * 1024, "grouper": "tfidf"}
WORKLOAD |= {"eta": 0.9, "lam-max": 0.9, "lr": 1e-4, "clip": 1.0, "seed": 0, "dtype": DTYPE}
LARGE = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8)
SHAPES = {  # what each changes of demo/base's config.json
    "small": {},
    "large": LARGE | dict(num_key_value_heads=4, head_dim=64),
}
STEPS = {"small": 12, "large": 4}  # the first one of each warms up and is not counted


def lay_out(base: Path, folder: Path, shape: dict) -> int:
    """A model folder without weights, from demo/base's config and tokenizer; returns the model's parameters."""
    read_config(base)  # refuses what is not a Llama
    folder.mkdir()
    write_json(folder / "config.json", read_json(base / "config.json") | shape)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder / name)
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(LlamaConfig(**read_config(folder))).parameters())


def train(model: Path, data: Path, out: Path, steps: int) -> list[dict]:
    """Run train.py on the CPU; returns its metrics, one row a step. It shows its errors and its progress bar itself."""
    flags = {"model": model, "data": data, "out": out, "max-steps": steps} | WORKLOAD
    command = [sys.executable, ROOT / "train.py", *(part for name, x in flags.items() for part in (f"--{name}", x))]
    command.append("--fresh")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    code = subprocess.run([*map(str, command)], stdout=subprocess.DEVNULL, env=environment).returncode
    if code:
        killed = f"error: {model.name}: train.py was killed by signal {-code}; is there enough memory?"
        sys.exit(code if code > 0 else killed)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def summary(model: str, parameters: int, rows: list[dict]) -> dict:
    """One model's numbers, from its steps after the first."""
    seconds = [row["seconds"] for row in rows[1:]]
    tokens = sum(row["tokens"] for row in rows[1:])
    supervised = sum(row["important_tokens"] + row["unimportant_tokens"] for row in rows[1:])
    return {
        "model": model,
        "parameters": parameters,
        "steps": len(seconds),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "tokens_per_second": tokens / sum(seconds),
        "supervised_tokens_per_second": supervised / sum(seconds),
        "seconds_per_step_median": statistics.median(seconds),
        "seconds": seconds,
        "peak_memory_bytes": rows[-1]["peak_memory_bytes"],
    }


def machine() -> dict:
    """What the numbers depend on besides the code; `load` is what else was running before we began."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {
        "cpu": facts.get("model name", "unknown"),
        "bf16_instructions": sorted({"amx_bf16", "avx512_bf16"} & set(facts.get("flags", "").split())),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "dtype": DTYPE,
    }


def bench(base: Path, data: Path, models: list[str], steps: int | None, out: Path | None) -> None:
    if not data.is_file():
        raise ValueError(f"{data}: no such file; set SFTGO_SHARED to the folder that has data/lima, or give --data")
    if steps is not None and steps < 2:
        raise ValueError(f"--steps {steps}: expected at least 2, the first one warms up and is not counted")
    if out and not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: no such folder; create it first")
    about, results = machine(), []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        parameters = {name: lay_out(base, work / name, SHAPES[name]) for name in models}
        cpu = f"{about['cpu']} ({', '.join(about['bf16_instructions']) or 'no bf16 instructions known'})"
        cores = f"cores {about['cores']}, threads {about['threads']}, load {about['load']}"
        print(f"machine   {cpu}, {cores}; torch {about['torch']}, {about['dtype']}", flush=True)
        for name in models:
            rows = train(work / name, data, work / f"{name}-run", steps or STEPS[name])
            results.append(r := summary(name, parameters[name], rows))
            speed = f"{r['tokens_per_second']:,.0f} tokens/s"
            speed += f" | {r['supervised_tokens_per_second']:,.0f} supervised tokens/s"
            speed += f" | {r['seconds_per_step_median']:.3f} s/step (median)"
            size = f"{r['parameters'] / 1e6:.1f}M parameters | {r['steps']} steps"
            print(f"{name:<8}  {size} | {speed} | peak {r['peak_memory_bytes'] / 1e9:.2f} GB", flush=True)
    if out:
        write_json(out, {"machine": about, "workload": WORKLOAD, "data": str(data), "results": results})


def main() -> None:
    intro, _, rest = __doc__.partition("\n\n")
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("train_cpu.py", None, intro, rest, formatter_class=shape, allow_abbrev=False)
    flag, lima, base = parser.add_argument, SHARED / "data/lima/train.jsonl.gz", ROOT / "demo/base"
    flag("--data", type=Path, default=lima, metavar="FILE", help="LIMA (default: the one in SFTGO_SHARED)")
    flag("--base", type=Path, default=base, metavar="FOLDER", help="its config and tokenizer (default: demo/base)")
    flag("--one", choices=tuple(SHAPES), help="time this model only")
    flag("--steps", type=int, metavar="N", help="steps, the first not counted (default: 12 small, 4 large)")
    flag("--out", type=Path, metavar="FILE.json", help="write the numbers here too")
    args = parser.parse_args()
    try:
        bench(args.base, args.data, [args.one] if args.one else list(SHAPES), args.steps, args.out)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
