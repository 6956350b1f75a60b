"""Where a training step's time would go on a GPU that nobody has at hand, from its operations alone.

    python bench/roofline.py                                         3B on LIMA, one H100
    python bench/roofline.py --model 8B --ranks 8 --recompute --gpu H200

train.py's own step runs on tensors that have a shape and no memory (bench/fake_gpu.py). An operation takes the longer
of its FLOPs over the GPU's matmul rate and its bytes over the memory's; a view takes nothing. Layers are alike: two
depths are recorded, the others follow. fsdp's collectives overlap with the rest, so the longer of the two counts. The
objective is plain cross-entropy; SFT-GO does the same operations wherever its prices are guessed right.

It is a floor. Starting kernels, waits, and what a kernel wastes are not in it; attention counts at the matmul rate.
"""

import argparse
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch.utils.flop_counter import flop_registry

import data
import train
from bench import lengths
from bench.memory import SHAPES
from model import Llama
from support import report
from support.named import named

KINDS = "matmul", "attention", "norms, rotary, elementwise", "loss", "casts, gradients", "optimizer", "collectives"
FREE = "empty", "new_empty", "_unsafe_view"  # beside views
SPARSE = "embedding", "gather", "scatter_add_"  # which touch few places of a large tensor


def one_kernel(gpu, name: str):
    """A function of x, and perhaps a weight, for which CUDA has a kernel each way, and the fake GPU a dozen."""
    from bench.fake_gpu import Op, seen

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            ctx.save_for_backward(*given)
            gpu.ops.append(Op(f"aten.{name}", (), [*map(seen, given)], [seen(given[0])], False))
            return torch.empty_like(given[0])

        @staticmethod
        def backward(ctx, grad):
            given = ctx.saved_tensors
            gpu.ops.append(Op(f"aten.{name}_backward", (), [*map(seen, (grad, *given))], [*map(seen, given)], False))
            return tuple(map(torch.empty_like, given))

    return Kernel.apply


def record(shape: str, name: str, layers: int, ranks: int, recompute: bool, most: int) -> tuple[list, SimpleNamespace]:
    """The operations of one rank's second step, and facts of it."""
    from bench.fake_gpu import FakeGPU

    with tempfile.TemporaryDirectory() as folder, FakeGPU(ranks) as gpu, patch.object(Llama, "fill", lengths.filled):
        norm, silu = one_kernel(gpu, "rms_norm"), one_kernel(gpu, "silu")
        functions = {"rms_norm": lambda x, shape, weight, eps: norm(x, weight), "silu": silu}
        with patch.multiple(torch.nn.functional, **functions):
            place = SimpleNamespace(rank=0, size=ranks, device=gpu.device, reducer=lambda: lambda t: t, sum=lambda t: t)
            how = {"shard": "fsdp" if ranks > 1 else None, "checkpoint_activations": recompute}
            cfg = train.Config(model=folder, data="-", micro_batch_tokens=most, context=min(4096, most), **how)
            model = train.build(cfg, lengths.folder_of(Path(folder), shape, num_hidden_layers=layers), place)
            corpus = lengths.corpus(name, model.cfg.vocab_size, min(4096, most))
            samples = data.epoch_order(len(corpus), lengths.BATCH[name], 0, 0)[0]
            prior = np.zeros(len(corpus.ids), np.int64)
            batches = data.micro_batches(corpus, prior, samples, most, 0, ranks, prior)
            model.room_to_cast = ranks == 1
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            for done in range(2):
                gpu.ops.clear()
                batch, method = (
                    [batch.to(gpu.device) for batch in batches],
                    (named("cross_entropy", "--objective"), None, 2),
                )
                train.update(model, optimizer, batch, cfg, method, done, 9, place)
    rows = [batch.layout.lengths for batch in batches]
    squares = [sum(n * n for n in row) for row in rows]
    supervised = sum(int(batch.loss_mask.sum()) for batch in batches)
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
    facts = dict(squares=squares, supervised=supervised, shapes=shapes, cfg=model.cfg, rows=rows)
    return [op for op in gpu.ops if op.name != "synchronize"], SimpleNamespace(**facts)


@cache
def packet(name: str):
    """The operation that torch has under this name, an overload of a packet; None for a name of our own."""
    space, op, overload = (*name.split("."), "default")[:3]
    found = getattr(getattr(torch.ops, space), op, None) if "." in name else None
    return getattr(found, overload, None)


def kind_of(op, step: SimpleNamespace) -> str:
    name, shapes = op.name.split(".")[1], [t.shape for t in op.inputs + op.outputs]
    if op.name.startswith(("c10d", "_c10d")):
        return "collectives"
    if "varlen" in name:
        return "attention"
    if name in ("mm", "bmm"):
        return "matmul"
    if name.startswith(("_fused_adam", "_foreach")):
        return "optimizer"
    if "copy" in name or step.shapes & {*shapes} and "embedding" not in name:
        return "casts, gradients"
    return "loss" if any(s[-1:] == (step.cfg.vocab_size,) for s in shapes) else "norms, rotary, elementwise"


def seconds(op, kind: str, squares: int, ranks: int, gpu: str) -> float:
    """The longer of an operation's FLOPs and its bytes, over the GPU's rates; `squares` of its documents' lengths."""
    rate, memory, link = report.GPUS[gpu]
    torch_op, name, flops = packet(op.name), op.name.split(".")[1], 0
    returns = torch_op._schema.returns if torch_op else []
    if name.startswith(FREE) or any(r.alias_info and not r.alias_info.is_write for r in returns):
        return 0.0
    moved = sum(t.bytes for t in op.inputs + (op.inputs if kind == "optimizer" else op.outputs))  # it writes in place
    if kind == "collectives":
        return max(t.bytes for t in op.inputs + op.outputs) * (ranks - 1) / ranks / link
    if kind == "attention":
        _, heads, width = op.inputs[0].shape
        flops = 2 * heads * width * squares * (2.5 if "backward" in name else 1)
    elif kind == "matmul":
        flops = flop_registry[torch_op.overloadpacket](*(t.shape for t in op.inputs[:2]), out_val=op.outputs[0].shape)
    elif name in SPARSE:
        moved = 2 * min(t.bytes for t in op.inputs + op.outputs)
    return max(flops / rate, moved / memory)


def roofline(shape: str, name="lima", ranks=1, recompute=False, most=8192, gpu="H100") -> tuple[dict, float]:
    """Seconds of a rank's step by kind, and the share that its formula's FLOPs would take at the matmul rate."""
    found, layers = {}, lengths.SHAPES[shape]["num_hidden_layers"]
    for depth in (1, 2):
        ops, step = record(shape, name, depth, ranks, recompute, most)
        found[depth] = dict.fromkeys(KINDS, 0.0)
        kinds = [kind_of(op, step) for op in ops]
        attended = iter(np.repeat(step.squares, kinds.count("attention") // len(step.squares)))  # row after row
        for op, kind in zip(ops, kinds):
            found[depth][kind] += seconds(op, kind, next(attended) if kind == "attention" else 0, ranks, gpu)
    by_kind = {kind: found[1][kind] + (layers - 1) * (found[2][kind] - found[1][kind]) for kind in KINDS}
    step.cfg = SimpleNamespace(**vars(step.cfg) | {"num_hidden_layers": layers})
    flops = 3 * report.forward_flops(step.cfg, sum(map(sum, step.rows)), step.supervised, sum(step.squares))
    return by_kind, flops / report.GPUS[gpu][0]


def longest(by_kind: dict[str, float]) -> float:
    """Seconds of the step: collectives overlap with all else."""
    return max(by_kind["collectives"], sum(by_kind.values()) - by_kind["collectives"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flag = parser.add_argument
    flag("--model", type=str.upper, choices=(*SHAPES,), default="3B", help="shape (default: 3B)")
    flag("--data", choices=(*lengths.BATCH,), default="lima", help="lengths of the documents (default: lima)")
    flag("--ranks", type=int, default=1, help="GPUs, under fsdp (default: 1)")
    flag("--gpu", choices=(*report.GPUS,), default="H100", help="(default: H100)")
    flag("--micro-batch-tokens", type=int, default=8192, metavar="N", help="as train.py's (default: 8192)")
    flag("--recompute", action="store_true", help="as train.py's --checkpoint-activations")
    args = parser.parse_args()
    for name, least in (("--ranks", 1), ("--micro-batch-tokens", 2)):  # a token to read, one to say
        if (given := getattr(args, name[2:].replace("-", "_"))) < least:
            sys.exit(f"error: {name} {given}: expected {least} or more")
    by_kind, useful = roofline(args.model, args.data, args.ranks, args.recompute, args.micro_batch_tokens, args.gpu)
    step = longest(by_kind)
    print(f"{args.model} on {args.data}, {args.ranks} × {args.gpu}: a step of {step:.3f} s; {useful / step:.0%} useful")
    for kind, s in sorted(by_kind.items(), key=lambda item: -item[1]):
        print(f"{kind:<28}{1e3 * s:>9.1f} ms {s / step:>7.1%}")


if __name__ == "__main__":
    main()
