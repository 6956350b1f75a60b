"""Break the code once a line and see which claims of test_cuda_path.py notice: python tests/breaks_cuda_path.py [WORD]

Each break is made in a copy of the checkout; only those whose claim has WORD in it, where it is given.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BREAKS = (  # file, old text, new text, the claim that is broken: its first word is in the names of the tests to run
    ("model.py", "ends.int().to(device)", "ends.int()", "attention: boundaries on the GPU"),
    ("model.py", "ends.int().to(device)", "ends.to(device)", "attention: boundaries int32"),
    ("model.py", "max(self.lengths)  #", "self.ends[-1]  #", "attention: lengths are ints"),
    ("model.py", "[x[0].transpose(0, 1)", "[x[0].transpose(0, 1).mT.contiguous().mT", "attention: last stride 1"),
    ("model.py", "[:, None].to(self.compute_dtype)", "[:, None]", "attention: bf16"),
    ("model.py", "max(self.lengths)  #", "int(self.ends[-1])  #", "waits: none for each layer"),
    ("sftgo.py", "if not nll.is_cuda and", "if", "waits: no check of labels on a GPU"),
    ("groupers.py", "if not scores.is_cuda and", "if", "waits: no check of scores on a GPU"),
    ("model.py", "[None].to(device)", "[None]", "crosses: positions on the GPU"),
    ("data.py", "if x is not None}", 'if x is not None and name != "group"}', "crosses: groups on the GPU"),
    ("train.py", ".double().to(ranks.device)", ".double()", "crosses: counts on the GPU"),
    ("train.py", "nats, tokens, nats.detach()", "nats, tokens, nats.detach().cpu()", "crosses: sums on the GPU"),
    ("model.py", "self.weight.to(x.dtype), self.eps", "self.weight, self.eps", "multiplied: norms fused"),
    ("model.py", "(tokens).to(self.compute_dtype)", "(tokens)", "multiplied: in bf16"),
    ("train.py", "fused=True", "fused=False", "moments: fused AdamW"),
    ("train.py", "cfg.dtype], torch.float32,", "cfg.dtype], torch.bfloat16,", "fsdp_gathers: reduced in float32"),
    ("train.py", "(block, mesh=mesh, mp_policy=cast)", "(block, mesh=mesh)", "fsdp_gathers: bf16"),
    ("train.py", "fully_shard(block, mesh=mesh, mp_policy=cast)", "pass", "fsdp_gathers: each block by itself"),
    ("train.py", "(block, mesh", "(block, reshard_after_forward=False, mesh", "fsdp_gathers: a block is given back"),
    ("train.py", "all_reduce(grad)", "all_reduce(grad.bfloat16())", "ddp_sends: float32 gradients"),
    ("train.py", "total_norm(grads)", "total_norm(grads, foreach=False)", "kernels: clipping in one"),
    ("train.py", "ranks.sum(norm.square()).sqrt() if", "sum(ranks.sum(g.norm() ** 2) for g in grads).sqrt() if",
     "small: one sum of norms"),
    ("model.py", "_CastLinear.apply(x, w, self.cast)", "F.linear(x, w.to(x.dtype))", "memory: no cast weight is kept"),
    ("model.py", "if self.recompute else", "if False else", "memory: recomputed activations"),
    ("train.py", "optimizer.zero_grad()", "optimizer.zero_grad(False)", "memory: gradients are let go"),
    ("sftgo.py", "4096 if hidden.is_cuda", "16384 if hidden.is_cuda", "memory: chunks of logits"),
    ("sftgo.py", "(logits - lse", "(logits.float() - lse", "memory: one float32 copy of logits"),
    ("sftgo.py", "torch.mul(grad, grad_nll[rows, None], out=logits)", "(grad * grad_nll[rows, None]).to(hidden.dtype)",
     "memory: logits in place"),
    ("support/report.py", "several * gradients", "0 * gradients", "memory: the plan's gradients of several"),
    ("support/report.py", "(12 * parameters", "(16 * parameters", "memory: the plan's weights and moments"),
    ("support/report.py", "4 * root) if", "0) if", "memory: the plan's reduced gradient"),
    ("support/report.py", "2 * kv + 4 * ff) +", "2 * kv + 3 * ff) +", "one_layer: the plan's feed-forward rows"),
    ("support/report.py", "2 * q + 2 * kv + 4 * ff) +", "2 * q + 4 * ff) +", "one_layer: the plan's keys and values"),
    ("support/report.py", "(positions * c * D if", "(0 if", "one_layer: the plan's input of a recomputed layer"),
    ("published/weights.py", "read(p.detach().to(dtype or p.dtype)).cpu()", "read(p.detach()).cpu().to(dtype)",
     "exported: cast before it is copied"),
    ("support/generate.py", "q.new_zeros(B, 1, H // K, S)", "torch.zeros(B, 1, H // K, S, device=q.device)",
     "decoding: the mask in the type of q"),
    ("support/generate.py", "q.new_zeros(B, 1, H // K, S)", "q.new_zeros(B, 1, 1, S)", "decoding: a complete mask"),
    ("support/generate.py", "slots(self.longest)", "self.longest", "decoding: a new shape once in 128 tokens"),
    ("support/generate.py", "values[:, :, :S],", "values[:, :, :S].contiguous(),", "decoding: no copy of the cache"),
    ("support/generate.py", "(q.reshape(B, K, -1, hd), keys", "(q, keys", "decoding: queries of a key head together"),
    ("support/generate.py", "len(position), device=position.device", "len(position)", "decoding: rows on the GPU"),
    ("support/generate.py", "self.mask is None:", "self.positions.max() > 0:", "decoding: no wait in a layer"),
    ("support/generate.py", "sum(1).isfinite()", "sum(1).isfinite() & bool(logits.isfinite().all())",
     "decoding: one wait a token"),
    ("support/generate.py", "cache.keep(keep)", "cache.layers = [[x[keep] for x in kv] for kv in cache.layers]",
     "leave_the_cache: a layer at a time"),
    ("eval/generate.py", "[0] + kept)", "[0])", "batch_may: what torch holds free counts"),
    ("eval/sharing.py", "@cached_property\n    def bounds", "@property\n    def bounds", "row_s: bounds copied once"),
    ("eval/sharing.py", "@cached_property\n    def levels", "@property\n    def levels", "row_s: levels copied once"),
    ("eval/score.py", "order[ends[start] : ends[min(start + chunk, len(places))]]", "which // chunk == start // chunk",
     "row_s: no wait for a chunk of logits"),
    ("eval/score.py", "torch.empty(len(at), device=device)", "torch.empty(len(at))", "row_s: results on the GPU"),
    ("eval/sharing.py", "- self.past).int().to", "- self.past).to", "scorer: boundaries int32"),
    ("eval/sharing.py", "(x.to(self.device) for x in (*rows, *bounds))", "(*rows, *bounds)", "scorer: all on the GPU"),
    ("eval/sharing.py", "k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))", "pass",
     "float32_heads: repeated"),
    ("support/llmlingua2.py", "logits.softmax(-1)[:, 1:-1, 1].cpu().numpy()",
     "np.stack([x.softmax(-1)[1:-1, 1].cpu().numpy() for x in logits])", "classifier: one wait for a batch"),
    ("published/weights.py", "read(p.detach().to(dtype or p.dtype)).cpu().contiguous() for t, p in shard.items()}",
     "read(p.detach().to(dtype or p.dtype)) for t, p in shard.items()}\n"
     "        tensors = {t: x.cpu().contiguous() for t, x in tensors.items()}", "exported: a matrix at a time"),
)  # fmt: skip


def noticed(file: str, old: str, new: str, claim: str) -> str:
    """The first test that fails, "" if none does."""
    with tempfile.TemporaryDirectory() as place:
        for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
            (Path(place) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, Path(place) / name)
        text = (Path(place) / file).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}, expected one"
        (Path(place) / file).write_text(text.replace(old, new), encoding="utf-8")
        test = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "tests/test_cuda_path.py"]
        test += ["-k", claim.split(":")[0]]
        one = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(test, cwd=place, env=one, capture_output=True, text=True, check=False)
    failed = [line.split("::", 1)[1].split(" - ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert failed or done.returncode == 0, done.stdout + done.stderr
    return failed[0] if failed else ""


if __name__ == "__main__":
    tried = [row for row in BREAKS if sys.argv[1:] == [] or sys.argv[1] in row[3]]
    green = 0
    for row in tried:
        test = noticed(*row)
        green += not test
        print(f"{'red' if test else 'GREEN':6}{row[3]:45}{test}", flush=True)
    print(f"{len(tried)} breaks, {green} not noticed")
