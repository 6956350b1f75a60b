"""Everything worth measuring on one GPU, by one command: a table of what was predicted, hoped for and measured.

    python bench/gpu.py                       nine minutes at most on one H100 or H200: gpu.json and gpu.md
    python bench/gpu.py --tiny --out FOLDER   every part on tiny shapes, where there is no GPU: do they work?

Beside torch and this checkout it takes pytest and transformers, for a part each. No data and no network: weights are
random in the published layout, tokens are random in the lengths of bench/lengths.json.

A part is a process of its own, with a limit in seconds: neither a fault nor what it leaves in memory reaches the next
one. Both files are written after each row, so what ends early leaves what it measured; rows of parts that were not
asked for stay, so ask on the same card. A fault is a row, too; its traceback goes to gpu.log. Times are medians, taken
after the GPU has finished, without the steps that warm up.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import signal
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

os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import data
import train
from bench import lengths
from eval.score import log_likelihoods
from model import Llama
from published.files import write_json
from support import report, scores
from support.generate import generate
from support.named import named
from support.ranks import Ranks, first_line

GO, CE = {"grouper": "tfidf"}, {"grouper": "none", "lam_max": 0.0}
RATE = "matmul, 8192 x 8192 x 8192"


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
    prices: str = ""  # how train.py's last loop knew them
    fullest: int = 0  # tokens of its largest step
    known: dict[str, float] = field(default_factory=dict)

    @cached_property
    def ranks(self) -> Ranks:
        return Ranks()

    @property
    def gpu(self) -> bool:
        return self.ranks.device.type == "cuda"

    @property
    def memory(self) -> int:
        return torch.cuda.get_device_properties(0).total_memory if self.gpu else 0

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

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def model(self, shape: str, dtype=torch.float32, **flags) -> Llama:
        """As train.py builds it, with random weights that are drawn on the device."""

        def fill(model: Llama, folder, device, *_) -> Llama:
            lengths.filled(model.to(dtype), folder, device)
            torch.manual_seed(0)
            for p in model.parameters():
                torch.nn.init.ones_(p) if p.ndim == 1 else torch.nn.init.normal_(p, 0, 0.02)
            return model

        with tempfile.TemporaryDirectory() as folder, patch.object(Llama, "fill", fill), torch.no_grad():
            cfg = train.Config(model=folder, data="-", **flags)
            return train.build(cfg, lengths.folder_of(Path(folder), "tiny" if self.tiny else shape), self.ranks)

    def corpus(self, name: str, model: Llama) -> data.Corpus:
        return lengths.corpus(name, model.cfg.vocab_size, 64 if self.tiny else min(4096, self.limit(model)))

    def planned(self, model: Llama, tokens: int, several: bool = True, cast_once: bool = False) -> int:
        """Bytes that the plan gives a step of such micro-batches."""
        how = model.recompute, several, cast_once
        return sum(
            report.memory_needed(model.cfg, sum(p.numel() for p in model.parameters()), tokens, 2, 1, *how).values()
        )

    def limit(self, model: Llama) -> int:
        """The most tokens of a micro-batch whose plan leaves a twentieth of the GPU free."""
        fits = [tokens for tokens in (8192, 4096) if self.planned(model, tokens) < 0.95 * self.memory]
        return 256 if self.tiny else [*fits, 2048][0]

    def train(self, model: Llama, name: str, steps: int, warm: int = 3, cast_once: bool = True, **flags) -> list[dict]:
        """The lines of metrics.jsonl of some steps of train.py's own loop, after some that warm up."""
        corpus, most = self.corpus(name, model), self.limit(model)
        model.room_to_cast = cast_once and self.planned(model, most, True, True) < 0.95 * self.memory  # as plans decide
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as out:
            how = {"batch_size": 8 if self.tiny else lengths.BATCH[name], "out": out, "checkpoint_every": 0, "lr": 1e-4}
            how |= {"max_steps": warm + (1 if self.tiny else steps), "context": min(4096, most)}
            cfg = train.Config(model="-", data="-", micro_batch_tokens=most, **how, **flags)
            objective, grouper = named(cfg.objective, "--objective"), named(cfg.grouper, "--grouper")
            prior = scores.without_model(grouper, corpus, 0)
            groups = report.groups_of_corpus(None, cfg.eta, corpus, prior)
            with contextlib.redirect_stdout(io.StringIO()) as said:
                train.loop(cfg, (objective, None, 2), model, corpus, prior, groups, self.ranks)
            self.prices = "; ".join(line for line in said.getvalue().splitlines() if line.startswith("prices"))
            rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
        self.fullest = max(row["tokens"] for row in rows)
        return rows[warm:]


# The parts, the most important first.


def checks(bench: Bench) -> Iterator[Row]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PARTS["checks"][1] - 5)
    lines = ran.stdout.splitlines() or ran.stderr.splitlines()
    passed, failed = re.search(r"(\d+) passed", lines[-1]), [x for x in lines if x.startswith(("FAILED", "ERROR"))]
    yield Row("tests marked gpu", int(passed[1]) if passed else 0, "passed", "all", "; ".join([lines[-1], *failed]))


def ceilings(bench: Bench) -> Iterator[Row]:
    where = torch.cuda.get_device_name() if bench.gpu else "cpu"
    yield Row("device", bench.memory / 1e9, "GB", note=f"{where}, torch {torch.__version__}")
    device, small = bench.ranks.device, 64 if bench.tiny else 1
    rows = {RATE: (8192, 8192, 8192), "matmul, 8192 rows of 3B's feed-forward": (8192, 3072, 8192)}
    rows |= {"matmul, its q and o": (8192, 3072, 3072), "matmul, its k and v": (8192, 3072, 1024)}
    for name, shape in (rows | {"matmul, 4096 rows of its head": (4096, 3072, 128_256)}).items():
        m, k, n = (x // small for x in shape)
        a, b, y = (torch.randn(s, device=device, dtype=torch.bfloat16) for s in ((m, k), (k, n), (m, n)))
        each = bench.seconds(lambda a=a, b=b, y=y: [torch.mm(a, b, out=y) for _ in range(20)]) / 20  # as hot as a step
        yield Row(name, 2 * m * k * n / each / 1e12, "TFLOP/s")
    x, y = (torch.zeros(2**32 // small**2, dtype=torch.uint8, device=device) for _ in range(2))
    yield Row("copy, read and write", 2 * x.nbytes / bench.seconds(lambda: y.copy_(x)) / 1e12, "TB/s")


def step(bench: Bench, label: str, model: Llama, name: str, goal: str = "", steps: int = 8, **flags) -> Iterator[Row]:
    """What some steps of training take; useful work is the formula's FLOPs, without what is computed again."""
    n, most = bench.corpus(name, model).lengths - 1, bench.limit(model)
    device = torch.cuda.get_device_name() if bench.gpu else ""
    gpu, parameters = next((g for g in report.GPUS if g in device), "H100"), sum(p.numel() for p in model.parameters())
    speeds, shares, rows = [], [], bench.train(model, name, steps, **flags)
    for row in rows:
        tokens, supervised = row["tokens"], row["important_tokens"] + row["unimportant_tokens"]
        work = tokens, supervised, tokens * float((n**2).sum() / n.sum())
        useful = 3 * report.forward_flops(model.cfg, *work) / row["seconds"]
        shares.append(100 * useful / 1e12 / bench.known.get(RATE, 700))
        speeds.append(row["tokens_per_second"])
    floor = report.seconds_needed(model.cfg, parameters, work, -(-tokens // most), 1, model.recompute, gpu)
    bench.known[label] = statistics.median(speeds)
    several, positions = bench.fullest > most, min(most, bench.fullest)
    by = f"micro-batches of up to {positions:,} tokens; {tokens / floor:,.0f} by arithmetic for {gpu}; {bench.prices}"
    yield Row(label, bench.known[label], "tokens/s", note=by)
    yield Row(f"{label}: useful work", statistics.median(shares), "% of the matmul rate", goal)
    plan = bench.planned(model, positions, several, several and model.room_to_cast) / 1e9
    peak = rows[-1]["peak_memory_bytes"] / 1e9
    beside = f"{peak:.1f} of {plan:.1f} GB"
    yield Row(f"{label}: peak memory over the plan's", peak / plan, "times", "0.90-1.05", beside)


def lima(bench: Bench) -> Iterator[Row]:
    model, go, ce = bench.model("3B"), "3B LIMA, SFT-GO", "3B LIMA, cross-entropy"
    yield from step(bench, go, model, "lima", "55", **GO)
    yield from step(bench, ce, model, "lima", "55", **CE)
    yield Row("3B LIMA: time of SFT-GO over cross-entropy", bench.known[ce] / bench.known[go], "times", "1.03")


def compiled(bench: Bench) -> Iterator[Row]:
    model = bench.model("3B", compile=True)
    yield from step(bench, "3B LIMA, SFT-GO, --compile", model, "lima", "62, stretch 68", compile=True, **GO)


def alpaca(bench: Bench) -> Iterator[Row]:
    yield from step(bench, "3B Alpaca, SFT-GO", bench.model("3B"), "alpaca", **GO)


def one_copy(bench: Bench) -> Iterator[Row]:
    """Without the bf16 copy of the weights that a step of several micro-batches makes where it fits."""
    label = "3B LIMA, SFT-GO, weights cast at each use"
    yield from step(bench, label, bench.model("3B"), "lima", cast_once=False, **GO)


def large(bench: Bench) -> Iterator[Row]:
    if bench.gpu and bench.memory < 140e9:
        yield Row("8B LIMA, SFT-GO, recomputed", note="needs a card of 140 GB")
        return
    model = bench.model("8B", checkpoint_activations=True)
    yield from step(bench, "8B LIMA, SFT-GO, recomputed", model, "lima", steps=4, **GO)


PEERS = [(8, False), (4, False), (2, False), (8, True), (4, True), (2, True), (1, True)]  # rows at once, recomputed


def transformers(bench: Bench) -> Iterator[Row]:
    """LlamaForCausalLM on the same rows: sdpa, bf16 autocast over float32 weights (as ours), fused AdamW, padded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours, device = bench.model("3B"), bench.ranks.device
    corpus, settings = bench.corpus("lima", ours), LlamaConfig(**ours.cfg.raw | {"torch_dtype": None})
    with torch.device(device):
        peer = LlamaForCausalLM._from_config(settings, attn_implementation="sdpa", dtype=torch.float32)
    peer.load_state_dict(ours.state_dict())
    peer.train()
    order = data.epoch_order(len(corpus), 8 if bench.tiny else lengths.BATCH["lima"], 0, 0)[:5]
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        batch = data.pack(corpus, np.zeros(len(corpus.ids)), order[0][:1]).to(device)
        expected = batch.nll(ours).sum() / batch.loss_mask.sum()
        difference = float(abs(peer(**padded(corpus, order[0][:1], device)).loss - expected))
    yield Row("transformers: its loss of a sample less ours", difference, "nats", "0.01")
    del ours, batch
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-5, fused=True)
    for p in peer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # its moments are there before the first attempt
    for grouped, goal in ((False, "3"), (True, "1.3")):
        steps = [o[np.argsort(corpus.lengths[o])] if grouped else o for o in order]
        label = f"transformers, 3B LIMA, {'grouped by length' if grouped else 'padded'}"
        tried = ((rows, again, peer_steps(bench, peer, optimizer, corpus, steps, rows, again)) for rows, again in PEERS)
        rows, again, times = next((found for found in tried if found[2]), (0, False, []))
        if not times:
            yield Row(label, note="out of memory")
            continue
        tokens = [int((corpus.lengths[samples] - 1).sum()) for samples in steps]
        speed = statistics.median([n / s for n, s in zip(tokens, times)][1:])
        yield Row(label, speed, "tokens/s", note=f"{rows} rows at once" + ", recomputed" * again)
        for name in ("3B LIMA, cross-entropy", "3B LIMA, SFT-GO, --compile"):
            if name in bench.known:
                yield Row(f"{name} over {label}", bench.known[name] / speed, "times", goal)


def peer_steps(bench: Bench, peer, optimizer, corpus, steps: list, rows: int, again: bool) -> list[float]:
    """Seconds of each step, with `again` recomputed; [] where memory is too small."""
    peer.gradient_checkpointing_enable() if again else peer.gradient_checkpointing_disable()
    try:
        return [peer_step(bench, peer, optimizer, corpus, samples, rows) for samples in steps]
    except torch.OutOfMemoryError:
        optimizer.zero_grad()
    torch.cuda.empty_cache()  # only here has the fault let go of its tensors
    return []


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
    model = bench.model("3B", torch.bfloat16)
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
    model, whole, known = bench.model("3B", torch.bfloat16), 0.0, lengths.lengths()
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
    "copies, casts": r"copy|memcpy|memset|fill|\bcat|CatArray",
    "norm": r"norm",
    "loss and other reductions": r"reduce|scatter|gather|softmax|index|embedding",
    "elementwise": r"elementwise|triton|vectorized",
}


def by_kind(events, gpu: bool) -> tuple[dict, dict]:
    """Microseconds of each of GROUPS, and the (microseconds, name) in it; of kernels, where there is no GPU operations.

    A named span of code has a time on the GPU, too: that of the kernels in it, which are counted.
    """
    found, names = dict.fromkeys([*GROUPS, "other"], 0.0), {}
    for event in events:
        micros = event.self_device_time_total if gpu else event.self_cpu_time_total
        if micros and not event.is_user_annotation and (str(event.device_type).endswith("CUDA") or not gpu):
            kind = next((kind for kind, name in GROUPS.items() if re.search(name, event.key, re.I)), "other")
            found[kind] += micros
            names.setdefault(kind, []).append((micros, event.key[:60]))
    return found, names


def profile(bench: Bench) -> Iterator[Row]:
    """Where a step's time goes: kernels of three steps, after the ones that warm up."""
    model, warm, speed = bench.model("3B"), 3, report.speed
    schedule = torch.profiler.schedule(wait=warm - 1, warmup=1, active=3, repeat=1)

    def timed(*args) -> dict:
        row = speed(*args)  # the GPU has finished
        seen.step()
        return row

    with torch.profiler.profile(schedule=schedule, acc_events=True) as seen, patch.object(report, "speed", timed):
        seconds = sum(row["seconds"] for row in bench.train(model, "lima", 3, warm, **GO))
    found, slowest = by_kind(seen.key_averages(), bench.gpu)
    whole = sum(found.values())
    yield Row("3B LIMA, SFT-GO: the GPU is busy", whole / seconds / 1e4, "% of the time", "100")
    for kind, micros in found.items():
        note = "; ".join(f"{t / whole:.1%} {name}" for t, name in sorted(slowest.get(kind, []))[:-4:-1])
        yield Row(f"3B LIMA, SFT-GO: time in {kind}", 100 * micros / whole, "%", note=note)


PARTS = {  # name: what it runs, the seconds after which it is ended; with a third of them left it still begins
    "checks": (checks, 90),
    "ceilings": (ceilings, 20),
    "lima": (lima, 75),
    "compiled": (compiled, 120),
    "transformers": (transformers, 90),
    "8b": (large, 75),
    "alpaca": (alpaca, 35),
    "decoding": (decoding, 40),
    "suite": (suite, 60),
    "profile": (profile, 45),
    "one copy": (one_copy, 40),
}


def work(name: str, bench: Bench, out: Path, pipe) -> None:
    """One part, in a process and a session of its own: Ctrl-C is its parent's, and what it starts ends with it."""
    os.setsid()
    with open(out / "gpu.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            for row in PARTS[name][0](bench):
                pipe.send(row)
        except Exception as e:
            traceback.print_exc(file=log)
            pipe.send(Row(name, note=f"{type(e).__name__}: {first_line(e)}"))


def measured(name: str, bench: Bench, out: Path, left: float) -> Iterator[Row]:
    """The rows of a part, as they come; at most `left` seconds."""
    if left < PARTS[name][1] / 3:
        yield Row(name, note="no time left")
        return
    fork = multiprocessing.get_context("fork")  # torch is imported once; CUDA begins in the part's process
    (receiver, sender), limit = fork.Pipe(duplex=False), PARTS[name][1] * (3 if bench.tiny else 1)  # a CPU is slow
    end = time.monotonic() + min(left, limit)
    process = fork.Process(target=work, args=(name, bench, out, sender))
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0, end - time.monotonic())):
            yield receiver.recv()
        yield Row(name, note="stopped: its time was over")
    except EOFError:
        process.join()
        if process.exitcode:
            yield Row(name, note=f"its process ended with {process.exitcode}")
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has not begun, or all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def shown(row: Row) -> str:
    return "not measured" if row.value is None else f"{row.value:,.4g} {row.unit}"


def table(rows: list[Row]) -> str:
    lines = ["# One GPU", "", "Written by `python bench/gpu.py`.", "", "| part | what | measured | goal | |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for row in rows:
        lines.append(f"| {row.part} | {row.what} | {shown(row)} | {row.goal} | {row.note.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def read(file: Path) -> list[Row]:
    """The rows of an earlier run, [] of none; ValueError where the file is another's."""
    try:
        return [Row(**row) for row in json.loads(file.read_text(encoding="utf-8")) if row["part"] in PARTS]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{file}: not a table of this program ({first_line(e)}); move it away") from e


def write(rows: list[Row], out: Path) -> None:
    """The parts in their order, whichever came first."""
    rows = sorted(rows, key=lambda row: [*PARTS].index(row.part))
    write_json(out / "gpu.json", [asdict(row) for row in rows])
    (out / "gpu.md.part").write_text(table(rows), encoding="utf-8")
    (out / "gpu.md.part").replace(out / "gpu.md")


def run(names: list[str], tiny: bool, minutes: float, out: Path) -> None:
    end, rows = time.monotonic() + 60 * minutes, [row for row in read(out / "gpu.json") if row.part not in names]
    bench = Bench(tiny, known={row.what: row.value for row in rows if row.value is not None})
    write(rows, out)
    for name in names:
        began = time.monotonic()
        with contextlib.closing(measured(name, bench, out, end - began)) as found:
            for row in found:
                bench.known |= {row.what: row.value} if row.value is not None else {}
                if tiny and row.value is not None:
                    row = replace(row, value=None, note="ran on tiny shapes")
                rows.append(replace(row, part=name))
                write(rows, out)
                print(f"{name:<14}{row.what:<68}{shown(row):>20}  {row.note}", flush=True)
        print(f"{name:<14}{time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flag = parser.add_argument
    flag("--tiny", action="store_true", help="tiny shapes: shows that the parts work, and measures nothing")
    flag("--minutes", type=float, default=9, metavar="X", help="in all (default: 9)")
    flag("--parts", default=",".join(PARTS), metavar="NAMES", help=f"some of {', '.join(PARTS)} (default: all)")
    flag("--out", type=Path, default=Path(__file__).parent, metavar="FOLDER", help="of the tables (default: bench)")
    args = parser.parse_args()
    names = args.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        sys.exit(f"error: --parts {unknown[0]}: expected some of {', '.join(PARTS)}")
    if not args.out.is_dir():
        sys.exit(f"error: --out {args.out}: no such folder; create it first")
    if not args.tiny and not torch.cuda.device_count():  # which begins no CUDA: the parts are forked
        sys.exit("error: no GPU here; --tiny shows that the parts work")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(names, args.tiny, args.minutes, args.out)
    except (OSError, ValueError) as e:
        sys.exit(f"error: --out {args.out}: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
