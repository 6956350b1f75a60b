"""Training here beside TRL's SFTTrainer and transformers in a bare loop: same weights, rows, dtype and threads.

    python bench/peers.py                                    about eight minutes on two cores
    python bench/peers.py --sides ours sft-go --model small  ours alone; the others need `pip install -e ".[peers]"`
    python bench/peers.py --objective                        SFT-GO beside cross-entropy, step by step in one process

Each side is a process of its own, on the same samples of LIMA, 8 a step, as data.py tokenized them, with fused AdamW,
gradients clipped to norm 1, in bf16: here float32 weights are cast at use, the others run torch's autocast over float32
weights, TRL's default. The first step warms up and is not counted; in it every side must find the same cross-entropy,
to 0.001 nats. Tokens are those of the samples, without padding. A ratio compares two runs of one round.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "TQDM_DISABLE": "1"}
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SHARED = Path(os.environ.get("SFTGO_SHARED", ROOT.parent / "shared"))

import numpy as np
import torch
import torch.nn.functional as F

import data
import groupers
import train
from model import Llama, LlamaConfig
from published.config import read_config
from published.files import read_json, write_json
from published.hub import resolve
from published.tokenizer import Tokenizer
from support.guess import Guess, groups_before
from support.named import named
from support.ranks import Ranks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LARGE = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8)
LARGE |= dict(num_key_value_heads=4, head_dim=64)  # changes of demo/base's config.json: 40M parameters
CONTEXT, BATCH = 1024, 8  # BATCH samples of CONTEXT tokens fit one packed row of ours, and are TRL's default
SETTINGS = dict(template="plain", context=CONTEXT, batch_size=BATCH, micro_batch_tokens=BATCH * CONTEXT, eta=(0.9,))
ADAMW = dict(lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95))
SETTINGS |= dict(lam_max=0.9, schedule="linear", clip=1.0, **ADAMW)


def lay_out(folder: Path) -> Path:
    """The 40M Llama: demo/base's tokenizer, fresh weights."""
    base = ROOT / "demo" / "base"
    folder.mkdir()
    write_json(folder / "config.json", read_json(base / "config.json") | LARGE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder)
    Llama.from_pretrained(folder, seed=0).save_pretrained(folder)
    return folder


def now() -> float:
    """Seconds, once the device has finished."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# Sides: (model folder, data file, its corpus, samples of each step) -> cross-entropy of step 1, seconds of each step.


def ours(folder: Path, file: Path, corpus, order: list[np.ndarray], grouper="none") -> tuple[float, list[float]]:
    """A run of train.py; what it logs."""
    with tempfile.TemporaryDirectory() as out:
        run = dict(model=str(folder), data=str(file), out=f"{out}/run", max_steps=len(order), checkpoint_every=0)
        train.train(train.Config(**run, **SETTINGS, grouper=grouper))
        rows = [json.loads(line) for line in Path(out, "run", "metrics.jsonl").read_text().splitlines()]
    return rows[0]["ce"], [row["seconds"] for row in rows]


def trl(folder: Path, file: Path, corpus, order: list[np.ndarray], grouped=False, **changes) -> tuple:
    """TRL's trainer on padded batches; `grouped`: all counted samples sorted by length before they are dealt."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends, losses = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            ends.append(now())

        def on_log(self, args, state, control, logs, **rest):
            losses.append(logs.get("loss"))

    samples, rows = np.concatenate(order), []
    if grouped:  # no more padding than the trainer's own group_by_length leaves; the first step stays
        samples[BATCH:] = sorted(samples[BATCH:], key=corpus.lengths.item)
    for i in samples:
        tokens = slice(corpus.starts[i], corpus.starts[i + 1])
        labels = np.where(corpus.loss_mask[tokens], corpus.ids[tokens], -100)
        rows.append({"input_ids": corpus.ids[tokens].tolist(), "labels": labels.tolist()})
    beta1, beta2 = ADAMW["betas"]
    adamw = dict(learning_rate=ADAMW["lr"], weight_decay=ADAMW["weight_decay"], adam_beta1=beta1, adam_beta2=beta2)
    ready = dict(dataset_kwargs={"skip_prepare_dataset": True}, train_sampling_strategy="sequential")
    quiet = dict(logging_first_step=True, save_strategy="no", report_to="none", disable_tqdm=True)
    with tempfile.TemporaryDirectory() as out:
        run = dict(output_dir=out, max_steps=len(order), use_cpu=DEVICE.type == "cpu", **ready, **quiet)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config, tokenizer = SFTConfig(**run, **adamw, **changes), AutoTokenizer.from_pretrained(folder)
        trainer = SFTTrainer(model, config, None, Dataset.from_list(rows), processing_class=tokenizer)
        trainer.add_callback(Clock)
        began = now()
        trainer.train()
    return losses[0], np.diff([began, *ends]).tolist()


def bare(folder: Path, file: Path, corpus, order: list[np.ndarray]) -> tuple[float, list[float]]:
    """transformers' Llama on our packed rows; positions that restart make its mask keep documents apart."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW, fused=True)
    prior, losses, ends = groupers.none(corpus), [], [now()]
    for samples in order:
        (batch,) = data.micro_batches(corpus, prior, samples, SETTINGS["micro_batch_tokens"])
        batch = batch.to(DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = model(batch.tokens, position_ids=batch.layout.positions, use_cache=False).logits[0]  # (T, V)
        loss = F.cross_entropy(logits.float(), batch.targets.where(batch.loss_mask, -100))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS["clip"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        ends.append(now())
    return losses[0], np.diff(ends).tolist()


SIDES = {
    "ours": (ours, "train.py, cross-entropy"),
    "sft-go": (partial(ours, grouper="tfidf"), "train.py, SFT-GO with TF-IDF groups"),
    "trl": (trl, "TRL's SFTTrainer by default: padded, activations recomputed"),
    "trl-grouped": (partial(trl, grouped=True), "TRL, samples grouped by length"),
    "trl-kept": (
        partial(trl, grouped=True, gradient_checkpointing=False),
        "TRL, grouped, activations kept (no default)",
    ),
    "bare": (bare, "transformers in a bare loop on our packed rows"),
}
USUAL = ["ours", "sft-go", "trl", "trl-grouped", "bare"]


def quiet() -> None:
    """A side's process prints nothing but its errors, and ends at Ctrl-C."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def apart(side, *args) -> tuple[float, list[float]]:
    """What a side returns, from a new process."""
    with ProcessPoolExecutor(1, get_context("spawn"), quiet) as pool:
        return pool.submit(side, *args).result()


def beside(folder: Path, file: Path, corpus, steps: int, rounds: int, sides: list[str]) -> list[dict]:
    """Every side once a round, in the opposite order in every second one."""
    order = data.epoch_order(len(corpus), BATCH, 0, 0, drop_last=True)[:steps]  # as train.py has them
    tokens = sum(int((corpus.lengths[samples] - 1).sum()) for samples in order[1:])
    speed, losses = {name: [] for name in sides}, {}
    for i in range(rounds):
        for name in sides if i % 2 == 0 else sides[::-1]:
            losses[name], seconds = apart(SIDES[name][0], folder, file, corpus, order)
            known = next(iter(losses.values()))
            if not abs(losses[name] - known) <= 1e-3:
                found = f"step 1 has a loss of {losses[name]:.5f}, {sides[0]} {known:.5f} on the same rows"
                raise ValueError(f"{name}: {found}")
            speed[name].append(tokens / sum(seconds[1:]))
            print(f"round {i + 1}   {name:<12} loss {losses[name]:.5f}   {speed[name][-1]:>8,.0f} tokens/s", flush=True)
    print(f"\n{'side':<12}{'loss':>9}{'tokens/s':>10}{sides[0] + ' is':>14}   least to most of {rounds} rounds")
    results = []
    for name in sides:
        found, ratios = losses[name], np.divide(speed[sides[0]], speed[name])
        middle, spread = np.median(ratios), f"{ratios.min():.2f} to {ratios.max():.2f}"
        row = f"{name:<12}{found:>9.4f}{np.median(speed[name]):>10,.0f}{middle:>11.2f} ×   {spread:<15}"
        print(row, SIDES[name][1])
        results.append({"side": name, "loss": found, "tokens_per_second": speed[name], "ratios": ratios.tolist()})
    return results


def objectives(folder: Path, corpus, pairs: int, parts: int) -> dict:
    """Steps of SFT-GO and of cross-entropy in turn, `parts` micro-batches each, by train.update: ratio of seconds.

    Both go over the rows of the same three steps again and again, so that neither meets a row length first; the first
    time over them is not counted. Groups are TF-IDF's, made before. What a step costs depends on how its prices came
    about, so each kind has a median of its own, too.
    """
    prior, orders = groupers.tfidf(corpus), data.epoch_order(len(corpus), BATCH, 0, 0, drop_last=True)[:3]
    groups = groups_before(groupers.tfidf, SETTINGS["eta"], corpus, prior, 0)
    runs, seconds, kinds = [], np.zeros((len(orders) + pairs, 2)), []
    for name in ("cross_entropy", "sft_go"):
        cfg = train.Config(model=str(folder), data="-", objective=name, **SETTINGS)
        model = Llama.from_pretrained(folder, torch.bfloat16, device=DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), **ADAMW, fused=True)
        runs.append((model, optimizer, cfg, (named(name, "--objective"), None, 2), Guess()))
    with Ranks() as ranks:
        for i in range(len(seconds)):
            rows = np.array_split(orders[i % len(orders)], parts)
            for side in (0, 1) if i % 2 else (1, 0):
                model, optimizer, cfg, method, guess = runs[side]
                batches = [data.pack(corpus, prior, samples, groups).to(DEVICE) for samples in rows]
                counts = sum(batch.group[batch.loss_mask].bincount(minlength=2) for batch in batches).double()
                before, began = guess.steps.copy(), now()
                train.update(model, optimizer, batches, cfg, method, i, len(seconds), ranks, guess, counts)
                seconds[i, side] = now() - began
                kinds += [*(guess.steps - before), "held"][:1] if side else []  # cross-entropy's are constant
    ratios = seconds[len(orders) :, 1] / seconds[len(orders) :, 0]
    draws = np.random.default_rng(0).choice(ratios, (10_000, pairs))
    low, high = np.quantile(np.median(draws, 1), (0.025, 0.975))
    middle, kinds = float(np.median(ratios)), np.array(kinds[len(orders) :])
    prices = {
        str(kind): [int((kinds == kind).sum()), float(np.median(ratios[kinds == kind]))] for kind in np.unique(kinds)
    }
    how = ", ".join(f"{kind} in {n}: {ratio:.3f}" for kind, (n, ratio) in prices.items())
    found = f"SFT-GO {middle:.3f} × cross-entropy, 95 % {low:.3f} to {high:.3f}"
    print(f"{parts} micro-batches a step: {found} ({pairs} pairs; prices {how})", flush=True)
    return dict(micro_batches=parts, ratio=middle, interval=[low, high], ratios=ratios.tolist(), prices=prices)


def machine() -> dict:
    """What the numbers depend on besides the code; `load` is what else was running before we began."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return {
        "cpu": "".join(re.findall(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)[:1]) or platform.machine(),
        "bf16_instructions": [name for name in ("amx_bf16", "avx512_bf16") if name in cpuinfo],
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        **{name: version(name) for name in ("torch", "transformers", "trl", "accelerate") if find_spec(name)},
    }


def bench(args) -> None:
    missing = [name for name in ("transformers", "trl") if not find_spec(name)]
    if missing and not args.objective and not set(args.sides) <= {"ours", "sft-go"}:
        raise ValueError(f'{" and ".join(missing)} missing; install with: pip install -e ".[peers]", or --sides ours')
    if not args.data.is_file():
        raise ValueError(f"{args.data}: no such file; set SFTGO_SHARED to the folder of data/lima, or give --data")
    if args.objective and (args.sides != USUAL or args.steps is not None):
        raise ValueError("--objective times our own step alone: it takes --pairs, but neither --sides nor --steps")
    if args.pairs is not None and args.pairs < 1:
        raise ValueError(f"--pairs {args.pairs}: expected 1 or more")
    if args.out and not args.out.absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: no such folder; create it first")
    about = machine()
    print("machine  " + ", ".join(f"{name} {x}" for name, x in about.items() if x), flush=True)
    with tempfile.TemporaryDirectory() as work:
        shapes = {"small": lambda: ROOT / "demo" / "base", "large": lambda: lay_out(Path(work, "large"))}
        folder = shapes.get(args.model, lambda: resolve(args.model))()
        llama = LlamaConfig(**read_config(folder))
        corpus = data.load_corpus(args.data, Tokenizer(folder, llama.vocab_size), SETTINGS["template"], CONTEXT)
        steps = 3 if args.steps is None else args.steps
        if not 2 <= steps <= len(corpus) // BATCH:
            raise ValueError(f"--steps {steps}: expected 2 to {len(corpus) // BATCH}, the first is not counted")
        print(f"work     {args.model}, {args.data.name}, {BATCH} samples a step, bf16", flush=True)
        if args.objective:
            results = [objectives(folder, corpus, args.pairs or 15, parts) for parts in (1, 4)]
        else:
            results = beside(folder, args.data, corpus, steps, args.pairs or 2, args.sides)
    if args.out:
        write_json(args.out, {"machine": about, "model": args.model, "data": str(args.data), "results": results})


def main() -> None:
    intro, _, rest = __doc__.partition("\n\n")
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("peers.py", None, intro, rest, formatter_class=shape, allow_abbrev=False)
    flag, lima = parser.add_argument, SHARED / "data/lima/train.jsonl.gz"
    flag("--model", default="large", metavar="small|large|FOLDER", help="demo/base, or 40M fresh weights (default)")
    flag("--data", type=Path, default=lima, metavar="FILE", help="LIMA (default: the one in SFTGO_SHARED)")
    usual = f"the first is compared with the others (default: {' '.join(USUAL)})"
    flag("--sides", nargs="+", choices=SIDES, default=USUAL, help=usual)
    flag("--steps", type=int, metavar="N", help="steps of a run, the first not counted (default: 3)")
    flag("--pairs", type=int, metavar="N", help="rounds (default: 2), or pairs of steps of --objective (default: 15)")
    flag("--objective", action="store_true", help="time SFT-GO against cross-entropy in our own loop")
    flag("--out", type=Path, metavar="FILE.json", help="write all numbers here")
    args = parser.parse_args()
    try:
        bench(args)
    except (ValueError, OSError, BrokenProcessPool) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
