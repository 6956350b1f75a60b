"""Everything worth measuring on one GPU, by one command: a table of what was predicted, hoped for and measured.

    python bench/gpu.py                       nine minutes at most on one H100 or H200: gpu.json and gpu.md
    python bench/gpu.py --tiny --out FOLDER   every part on tiny shapes, where there is no GPU: do they work?

Beside torch and this checkout it takes pytest and transformers, for a part each. No data and no network: weights are
random in the published layout, tokens are random in the lengths of bench/lengths.json.

A part is a process of its own, with a limit in seconds: neither a fault nor what it leaves in memory reaches the next
one. Both files are written after each row, so what ends early leaves what it measured. A fault is a row, too; its
traceback goes to gpu.log. Times are medians, taken after the GPU has finished, without the steps that warm up.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from unittest.mock import patch

os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import data
import train
from bench import lengths
from bench.roofline import SHAPES, folder_of
from eval.score import log_likelihoods
from model import Llama
from published.files import write_json
from support import report, scores
from support.generate import generate
from support.named import named
from support.ranks import Ranks, first_line

GO, CE = {"grouper": "tfidf"}, {"grouper": "none", "lam_max": 0.0}
RECIPES = {"lima": {"batch_size": 64}, "alpaca": {"batch_size": 32}}


@dataclass
class Row:
    """A line of the table. Without a value, `note` says why."""

    what: str
    value: float | None = None
    unit: str = ""
    goal: str = ""
    note: str = ""
    part: str = ""


@dataclass
class Bench:
    """What the parts measure on; `known` holds the values so far, by Row.what."""

    tiny: bool
    known: dict[str, float] = field(default_factory=dict)

    @cached_property
    def ranks(self) -> Ranks:
        return Ranks()

    @cached_property
    def memory(self) -> int:
        """Bytes of the GPU."""
        return torch.cuda.get_device_properties(0).total_memory if self.gpu else 0

    @property
    def gpu(self) -> bool:
        return self.ranks.device.type == "cuda"

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable, repeat: int = 7) -> float:
        """The median of some runs, after one that does not count."""
        times = []
        for _ in range(repeat + 1):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    def model(self, shape: str, dtype=torch.float32, **flags) -> Llama:
        """Random weights, drawn on the device, as train.py builds a model."""

        def fill(model: Llama, folder, device, seed, part=None) -> Llama:
            model.to(dtype).to_empty(device=device).tie()
            torch.manual_seed(0)
            for p in model.parameters():
                torch.nn.init.ones_(p) if p.ndim == 1 else torch.nn.init.normal_(p, 0, 0.02)
            return model

        with tempfile.TemporaryDirectory() as folder, patch.object(Llama, "fill", fill), torch.no_grad():
            cfg = train.Config(model=folder, data="-", **flags)
            return train.build(cfg, folder_of(Path(folder), "tiny" if self.tiny else shape), self.ranks)

    def corpus(self, name: str, model: Llama) -> data.Corpus:
        return lengths.corpus(name, model.cfg.vocab_size, 64 if self.tiny else 4096)

    def limit(self, model: Llama, recompute: bool = False) -> int:
        """The most tokens of a micro-batch whose plan leaves a twentieth of the GPU free."""
        parameters = sum(p.numel() for p in model.parameters())
        for tokens in (8192, 4096, 2048) if self.gpu else ():
            planned = sum(report.memory_needed(model.cfg, parameters, tokens, 2, 1, recompute).values())
            if planned < 0.95 * self.memory:
                return tokens
        return 256 if self.tiny else 2048

    def train(self, model: Llama, name: str, steps: int, most: int, warm: int = 3, **flags) -> list[dict]:
        """The lines of metrics.jsonl of some steps of train.py's own loop, after some that warm up."""
        steps, corpus = (1 if self.tiny else steps) + warm, self.corpus(name, model)
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as out:
            how = {"max_steps": steps, "checkpoint_every": 0, "context": min(4096, most), "out": out}
            how |= {"batch_size": 8} if self.tiny else RECIPES[name]
            cfg = train.Config(model="-", data="-", micro_batch_tokens=most, **how, **flags)
            objective, grouper = named(cfg.objective, "--objective"), named(cfg.grouper, "--grouper")
            prior = scores.without_model(grouper, corpus, 0)
            groups = report.groups_of_corpus(None, cfg.eta, corpus, prior)
            train.loop(cfg, (objective, None, 2), model, corpus, prior, groups, self.ranks)
            return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()][warm:]

    def rate(self, model: Llama, name: str, rows: list[dict]) -> tuple[float, float]:
        """Tokens per second, and how many FLOP/s of them are the formula's: no recomputation, causal attention."""
        n = self.corpus(name, model).lengths - 1
        speeds, flops = [], []
        for row in rows:
            supervised = row["important_tokens"] + row["unimportant_tokens"]
            squares = row["tokens"] * float((n**2).sum() / n.sum())
            flops.append(3 * report.forward_flops(model.cfg, row["tokens"], supervised, squares) / row["seconds"])
            speeds.append(row["tokens_per_second"])
        return statistics.median(speeds), statistics.median(flops)

    def step(self, label: str, model: Llama, name: str, most: int, goal="", steps=8, **flags) -> Iterator[Row]:
        """The rows of one way to train; `known` gets the seconds of a token."""
        rows = self.train(model, name, steps, most, **flags)
        speed, flops = self.rate(model, name, rows)
        self.known[label] = speed
        yield Row(label, speed, "tokens/s", note=f"micro-batches of {most:,} tokens")
        if peak := self.known.get("matmul, 8192 x 8192 x 8192"):
            yield Row(f"{label}: useful work", 100 * flops / peak / 1e12, "% of the matmul rate", goal)
        if self.gpu:
            parameters = sum(p.numel() for p in model.parameters())
            planned = report.memory_needed(model.cfg, parameters, most, 2, 1, model.recompute)
            note = f"the plan says {sum(planned.values()) / 1e9:.1f} GB"
            yield Row(f"{label}: peak memory", rows[-1]["peak_memory_bytes"] / 1e9, "GB", "90-105 % of the plan", note)


# The parts, most important first.


def checks(bench: Bench) -> Iterator[Row]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PARTS["checks"].limit - 5)
    count = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", ran.stdout[-500:])}
    failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    note = " ".join(failed)[:300] or ", ".join(f"{n} {word}" for word, n in count.items()) or ran.stderr[-200:]
    yield Row("tests marked gpu that pass", count.get("passed", 0), "tests", "all", note)


def ceilings(bench: Bench) -> Iterator[Row]:
    device, small = bench.ranks.device, 64 if bench.tiny else 1
    rows = {"matmul, 8192 x 8192 x 8192": (8192, 8192, 8192)}
    rows |= {"matmul, 8192 rows of 3B's feed-forward": (8192, 3072, 8192), "its q and o": (8192, 3072, 3072)}
    rows |= {"its k and v": (8192, 3072, 1024), "its head, 4096 rows": (4096, 3072, 128256)}
    for name, shape in rows.items():
        m, k, n = (x // small for x in shape)
        a, b = (torch.randn(s, device=device, dtype=torch.bfloat16) for s in ((m, k), (k, n)))
        yield Row(name, 2 * m * k * n / bench.seconds(lambda a=a, b=b: a @ b) / 1e12, "TFLOP/s")
    x = torch.empty(2**32 // small**2, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    yield Row("copy, read and write", 2 * x.nbytes / bench.seconds(lambda: y.copy_(x)) / 1e12, "TB/s")


def lima(bench: Bench) -> Iterator[Row]:
    model = bench.model("3b")
    most = bench.limit(model)
    yield from bench.step("3B LIMA, SFT-GO", model, "lima", most, "55", **GO)
    yield from bench.step("3B LIMA, cross-entropy", model, "lima", most, "55", **CE)
    ratio = bench.known["3B LIMA, cross-entropy"] / bench.known["3B LIMA, SFT-GO"]
    yield Row("3B LIMA: time of SFT-GO over cross-entropy", ratio, "times", "1.03")


def compiled(bench: Bench) -> Iterator[Row]:
    model = bench.model("3b", compile=True)
    yield from bench.step(
        "3B LIMA, SFT-GO, --compile", model, "lima", bench.limit(model), "62, stretch 68", compile=True, **GO
    )


def alpaca(bench: Bench) -> Iterator[Row]:
    model = bench.model("3b")
    yield from bench.step("3B Alpaca, SFT-GO", model, "alpaca", bench.limit(model), **GO)


def one_copy(bench: Bench) -> Iterator[Row]:
    """Without the bf16 copy of the weights that a step of several micro-batches makes where it fits."""
    with patch.object(Llama, "cast_once", lambda self: contextlib.nullcontext()):
        model = bench.model("3b")
        yield from bench.step("3B LIMA, SFT-GO, weights cast anew", model, "lima", bench.limit(model), **GO)


def large(bench: Bench) -> Iterator[Row]:
    if bench.gpu and bench.memory < 140e9:
        yield Row("8B LIMA, recomputed", note="needs a card of 140 GB")
        return
    model = bench.model("8b", checkpoint_activations=True)
    yield from bench.step("8B LIMA, SFT-GO, recomputed", model, "lima", bench.limit(model, True), steps=4, **GO)


PEERS = [(8, False), (4, False), (2, False), (8, True), (4, True), (2, True), (1, True)]  # rows at once, recomputed


def transformers(bench: Bench) -> Iterator[Row]:
    """LlamaForCausalLM on the same rows: sdpa, bf16 autocast over float32 weights (as ours), fused AdamW, padded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours, device = bench.model("3b"), bench.ranks.device
    corpus = bench.corpus("lima", ours)
    settings = {name: x for name, x in ours.cfg.raw.items() if name != "torch_dtype"}
    with torch.device(device):
        peer = LlamaForCausalLM._from_config(LlamaConfig(**settings), attn_implementation="sdpa", dtype=torch.float32)
    peer.load_state_dict(ours.state_dict())
    peer.train()
    size = 8 if bench.tiny else RECIPES["lima"]["batch_size"]
    order = data.epoch_order(len(corpus), size, 0, 0)[:5]
    theirs = padded(corpus, np.sort(order[0])[:1], device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        batch = data.pack(corpus, np.zeros(len(corpus.ids)), np.sort(order[0])[:1]).to(device)
        difference = float(abs(peer(**theirs).loss - batch.nll(ours).sum() / batch.loss_mask.sum()))
    yield Row("transformers: difference of the loss of a sample", difference, "nats", "0.01")
    del ours, batch
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-5, fused=True)
    for p in peer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # its moments are there before the first attempt
    for grouped, goal in ((False, "3"), (True, "1.3")):
        steps = [np.array(sorted(o, key=lambda i: corpus.lengths[i])) if grouped else o for o in order]
        for rows, recompute in PEERS:
            if recompute != peer.is_gradient_checkpointing:
                peer.gradient_checkpointing_enable() if recompute else peer.gradient_checkpointing_disable()
            try:
                times = [peer_step(bench, peer, optimizer, corpus, samples, rows) for samples in steps]
                break
            except torch.OutOfMemoryError:
                optimizer.zero_grad()
                torch.cuda.empty_cache()
        tokens = [int((corpus.lengths[samples] - 1).sum()) for samples in steps]
        speed = statistics.median(n / s for n, s in list(zip(tokens, times))[1:])
        label = f"transformers, 3B LIMA, {'rows grouped by length' if grouped else 'padded'}"
        yield Row(label, speed, "tokens/s", note=f"{rows} rows at once" + ", recomputed" * recompute)
        for name in ("3B LIMA, cross-entropy", "3B LIMA, SFT-GO, --compile"):
            if name in bench.known:
                yield Row(f"{name} over {label}", bench.known[name] / speed, "times", goal)


def padded(corpus: data.Corpus, samples: np.ndarray, device) -> dict:
    shape = len(samples), int(corpus.lengths[samples].max())
    ids, labels, there = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100), torch.zeros(shape)
    for row, i in enumerate(samples):
        span = slice(corpus.starts[i], corpus.starts[i + 1])
        sample = torch.from_numpy(corpus.ids[span].astype(np.int64))
        ids[row, : len(sample)], there[row, : len(sample)] = sample, 1
        labels[row, : len(sample)] = torch.where(torch.from_numpy(corpus.loss_mask[span]), sample, -100)
    return {
        name: x.to(device) for name, x in (("input_ids", ids), ("labels", labels), ("attention_mask", there.long()))
    }


def peer_step(bench: Bench, peer, optimizer, corpus: data.Corpus, samples: np.ndarray, rows: int) -> float:
    """Seconds of one step, its padding and its copy to the GPU included."""
    bench.wait()
    began, device = time.perf_counter(), bench.ranks.device
    supervised = sum(int(corpus.loss_mask[corpus.starts[i] + 1 : corpus.starts[i + 1]].sum()) for i in samples)
    for start in range(0, len(samples), rows):
        batch = padded(corpus, samples[start : start + rows], device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = peer(**batch, num_items_in_batch=supervised, use_cache=False).loss
        loss.backward()
    torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    bench.wait()
    return time.perf_counter() - began


def decoding(bench: Bench) -> Iterator[Row]:
    model = bench.model("3b", torch.bfloat16)
    rng, times, size = np.random.default_rng(0), [], (4, 64, 8) if bench.tiny else (64, 500, 512)
    prompts = [
        rng.integers(model.cfg.vocab_size, size=n).tolist() for n in rng.integers(size[1] // 5, size[1], size[0])
    ]
    generate(model, prompts[:2], 4)
    generate(model, prompts, size[2], ended=lambda new: times.append((len(new), time.perf_counter())))
    first = [t for (n, t), (before, _) in zip(times[1:], times) if n != before]  # of each token but the first
    each = np.diff(first)[2:] * 1e3
    yield Row("3B, decoding, 64 rows of 100 to 1,000 tokens", float(np.median(each)), "ms a token", "5")
    yield Row("the slowest twentieth of the tokens", float(np.quantile(each, 0.95)), "ms a token", "5")


def suite(bench: Bench) -> Iterator[Row]:
    """A sixteenth of each task, its time times what of the task's tokens it is."""
    model, whole, known = bench.model("3b", torch.bfloat16), 0.0, lengths.lengths()
    for task in lengths.SUITE:
        pairs = lengths.pairs(task, model.cfg.vocab_size)[: 40 if bench.tiny else None]
        read = sum(row.size for row in lengths.pack(pairs, lengths.WINDOW, lengths.ROW))
        seconds = bench.seconds(lambda pairs=pairs: log_likelihoods(model, pairs), 1)
        whole += seconds * known[task]["read"] / read
        yield Row(f"scorer, {task}", read / seconds, "tokens/s", note=f"{len(pairs):,} requests, {read:,} tokens")
    yield Row("scorer, the complete suite, extrapolated", whole, "s", "120, stretch 76")


GROUPS = {  # kinds of kernels, by what their names have in them; the first that fits
    "attention": r"flash|fmha|attn|attention",
    "matmul": r"gemm|cutlass|nvjet|xmma|sm90_|cublas|::mm|addmm",
    "optimizer": r"adam|multi_tensor|lpnorm|foreach",
    "copies, casts": r"copy|memcpy|memset|fill|cat",
    "norm": r"norm",
    "loss and other reductions": r"reduce|scatter|gather|softmax|index|embedding",
    "elementwise": r"elementwise|triton|vectorized",
}


def profile(bench: Bench) -> Iterator[Row]:
    """Where a step's time goes: kernels of three steps, by their names."""
    model = bench.model("3b")
    most = bench.limit(model)
    bench.train(model, "lima", 1, most, **GO)
    with torch.profiler.profile(acc_events=True) as seen:
        seconds = sum(row["seconds"] for row in bench.train(model, "lima", 3, most, 0, **GO))
    found, slowest = dict.fromkeys([*GROUPS, "other"], 0.0), {}
    for event in seen.key_averages():
        micros = event.self_device_time_total if bench.gpu else event.self_cpu_time_total
        if micros and (str(event.device_type).endswith("CUDA") or not bench.gpu):
            kind = next((kind for kind, names in GROUPS.items() if re.search(names, event.key, re.I)), "other")
            found[kind] += micros
            slowest.setdefault(kind, []).append((micros, event.key[:60]))
    whole = sum(found.values())
    yield Row("3B LIMA, SFT-GO: the GPU is busy", whole / seconds / 1e4, "% of the time", "100")
    for kind, micros in found.items():
        note = "; ".join(f"{t / whole:.1%} {name}" for t, name in sorted(slowest.get(kind, []))[:-4:-1])
        yield Row(f"3B LIMA, SFT-GO: time in {kind}", 100 * micros / whole, "%", note=note)


@dataclass(frozen=True)
class Part:
    run: Callable[[Bench], Iterator[Row]]
    seconds: int  # at least this much must be left to begin it
    limit: int  # it is ended after so many


PARTS = {
    "checks": Part(checks, 20, 90),
    "ceilings": Part(ceilings, 10, 40),
    "lima": Part(lima, 30, 90),
    "compiled": Part(compiled, 40, 100),
    "transformers": Part(transformers, 40, 100),
    "decoding": Part(decoding, 15, 50),
    "suite": Part(suite, 20, 60),
    "profile": Part(profile, 20, 60),
    "one copy": Part(one_copy, 20, 50),
    "alpaca": Part(alpaca, 15, 40),
    "8b": Part(large, 40, 90),
}


def work(name: str, bench: Bench, out: Path, pipe) -> None:
    """One part, in a process of its own."""
    log = open(out / "gpu.log", "a", encoding="utf-8")  # noqa: SIM115, until the process ends
    with contextlib.redirect_stdout(log):
        try:
            if name == "ceilings":
                where = torch.cuda.get_device_name() if bench.gpu else "cpu, tiny shapes: no measurement"
                pipe.send(Row("device", note=f"{where}, torch {torch.__version__}"))
            for row in PARTS[name].run(bench):
                pipe.send(replace(row, part=name))
        except Exception as e:
            traceback.print_exc(file=log)
            pipe.send(Row(name, note=f"{type(e).__name__}: {first_line(e)}", part=name))


def measured(name: str, bench: Bench, out: Path, left: float) -> Iterator[Row]:
    """The rows of a part, as they come."""
    if left < PARTS[name].seconds:
        yield Row(name, note="no time left", part=name)
        return
    spawn = multiprocessing.get_context("fork")  # torch is imported once; here CUDA is never begun
    (receiver, sender), end = spawn.Pipe(duplex=False), time.monotonic() + min(left, PARTS[name].limit)
    process = spawn.Process(target=work, args=(name, bench, out, sender))
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0, end - time.monotonic())):
            yield receiver.recv()
        yield Row(name, note="stopped: its time was over", part=name)
    except EOFError:
        process.join()
        if process.exitcode:
            yield Row(name, note=f"its process ended with {process.exitcode}", part=name)
    finally:
        process.kill()
        process.join()


def table(rows: list[Row], tiny: bool) -> str:
    head = "# One GPU\n\n`python bench/gpu.py` writes this page.\n\n"
    lines = ["| part | what | measured | goal | |", "|---|---|---|---|---|"]
    for row in rows:
        value = "not measured" if row.value is None or tiny else f"{row.value:,.4g} {row.unit}"
        lines.append(f"| {row.part} | {row.what} | {value} | {row.goal} | {row.note.replace('|', '/')} |")
    return head + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: shows that the parts work, measures nothing")
    parser.add_argument("--minutes", type=float, default=9, help="in all (default: 9)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the tables (default: bench)")
    args = parser.parse_args()
    names, end = args.parts.split(","), time.monotonic() + 60 * args.minutes
    if unknown := [name for name in names if name not in PARTS]:
        sys.exit(f"error: --parts {unknown[0]}: expected some of {', '.join(PARTS)}")
    if not args.out.is_dir():
        sys.exit(f"error: --out {args.out}: no such folder; create it first")
    rows, bench = [], Bench(args.tiny)
    for name in names:
        began = time.monotonic()
        for row in measured(name, bench, args.out, end - began):
            rows.append(row)
            bench.known |= {row.what: row.value} if row.value is not None else {}
            write_json(args.out / "gpu.json", [asdict(row) for row in rows])
            (args.out / "gpu.md").write_text(table(rows, args.tiny), encoding="utf-8")
            print(f"{row.part:<14}{row.what:<60}{row.value or 0:>12,.4g} {row.unit} {row.note}", flush=True)
        print(f"{name:<14}{time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
