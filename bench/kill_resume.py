"""Kill a run at random moments, start it again each time, and compare it with an undisturbed one, bit for bit.

    python bench/kill_resume.py                     20 SIGKILLs over a run of the demo's model, some minutes
    python bench/kill_resume.py --ranks 2           the same under torchrun with fsdp, where a kill ends all ranks

The moments are drawn evenly over the time the run takes, saves included (a checkpoint every 3 steps). Compared are the
metrics of every step, except its times, and every weight of the model.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from safetensors import safe_open

TIMES = ("seconds", "tokens_per_second", "peak_memory_bytes")


def command(out: Path, ranks: int, steps: int) -> list[str]:
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}".split()
    flags = f"--recipe demo --max-steps {steps} --epochs 30 --checkpoint-every 3 --lam-min 0.1 --out {out}"
    return [sys.executable, *(torchrun if ranks > 1 else []), str(ROOT / "train.py"), *flags.split()]


def result(out: Path) -> tuple[list[dict], dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    with safe_open(out / "model" / "model.safetensors", framework="pt") as f:
        weights = {name: f.get_tensor(name) for name in f.keys()}
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows], weights


def steps_logged(out: Path) -> int:
    log = out / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def parts(out: Path) -> set:
    """Unfinished checkpoints, each with when it was begun."""
    return {(path.name, path.stat().st_ctime_ns) for path in out.glob("checkpoints/*.part")}


def ranks_of(pid: int) -> list[int]:
    """The processes that torchrun started; they are in sessions of their own."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("kill_resume.py", description=__doc__, formatter_class=shape)
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="how often (default: 20)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks (default: 1)")
    parser.add_argument(
        "--steps", type=int, default=90, metavar="N", help="steps of the run, 41 an epoch (default: 90)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT, "env": environment}
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, out = Path(folder) / "whole", Path(folder) / "out"
        subprocess.run(command(whole, args.ranks, args.steps), check=True, **quiet)
        seconds = sum(json.loads(line)["seconds"] for line in (whole / "metrics.jsonl").read_text().splitlines())
        print(f"undisturbed: {args.steps} steps, {seconds:.0f} s of steps", flush=True)
        kills, in_saves, starts = 0, 0, 0
        while True:
            starts += 1
            began_at, left = steps_logged(out), parts(out)
            process = subprocess.Popen(command(out, args.ranks, args.steps), start_new_session=True, **quiet)
            if kills < args.kills:
                share = (args.steps - began_at) / (args.kills - kills + 1)  # of the steps left
                more = rng.uniform(0, 2 * share)
                while process.poll() is None and steps_logged(out) < began_at + more:
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 2 * seconds / args.steps))  # anywhere in a step or a save
                if process.poll() is None:
                    saving = parts(out) - left
                    for pid in [*ranks_of(process.pid), process.pid]:
                        os.kill(pid, signal.SIGKILL)
                    kills, in_saves = kills + 1, in_saves + bool(saving)
                    print(f"kill {kills} after {steps_logged(out)} steps", flush=True)
            process.wait()
            if process.returncode == 0:
                break
            if process.returncode != -signal.SIGKILL:
                sys.exit(f"error: start {starts} ended with {process.returncode}")
        (one, weights), (other, weights_other) = result(whole), result(out)
        same = one == other and all(weights[name].equal(weights_other[name]) for name in weights)
        print(
            f"{kills} kills, {in_saves} of them inside a save, {starts} starts: {'identical' if same else 'DIFFERENT'}"
        )
        print(f"steps in the log: {[row['step'] for row in other] == [*range(1, args.steps + 1)] and 'each once'}")
        if kills < args.kills:
            print(f"only {kills} of {args.kills} kills happened before the end")
        sys.exit(not same or kills < args.kills)


if __name__ == "__main__":
    main()
