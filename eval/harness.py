"""A model folder as an lm-evaluation-harness `LM`, so that any of its tasks runs on our model and our scorer.

    python -m eval.harness --model OUT/model --tasks lambada_openai,gsm8k

Needs the extra `harness`. The harness fetches its tasks' data itself.
"""

import json
import sys
from difflib import get_close_matches
from pathlib import Path

if not __package__:  # python PATH/eval/harness.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from eval import command_line, say
from eval.generate import NEUTRAL, UNUSED, end_tokens, not_greedy, respond
from eval.results import write_new
from eval.score import Encoder, log_likelihoods
from eval.sharing import packed
from model import Llama
from published.config import read_config
from published.hub import resolve
from published.tokenizer import Tokenizer
from published.weights import DTYPES
from support.ranks import command

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ImportError as e:
    sys.exit(f'error: eval.harness needs lm-eval ({e}); install it with: pip install -e ".[harness]"')


class SFTGO(LM):
    """Our Llama and our scorer behind the harness's three questions."""

    def __init__(self, model: str | Path, bos: str = "never", dtype: str = "bfloat16", device: str | None = None):
        super().__init__()
        folder = resolve(model)
        self.encoder = Encoder(Tokenizer(folder, read_config(folder)["vocab_size"]), bos)
        self.stop_ids = end_tokens(folder, self.encoder.tokenizer)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = Llama.from_pretrained(folder, DTYPES[dtype], DTYPES[dtype], self._device)

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        names = [f"{r.task_name}: item {getattr(r, 'doc_id', i)}" for i, r in enumerate(requests)]
        pairs = list(self.encoder.pairs([r.args for r in requests], names))
        values, greedy = log_likelihoods(self.model, pairs)
        return list(zip(values.tolist(), greedy.tolist()))

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Every token of a text predicted once, in windows as the harness cuts them."""
        windows, owners = [], []
        for i, ids in enumerate(self.encoder([r.args[0] for r in requests])):
            cut = get_rolling_token_windows(ids, self.encoder.tokenizer.bos, self.model.cfg.max_position_embeddings, 1)
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((packed(context), continuation))
                owners.append(i)
        values, _ = log_likelihoods(self.model, windows)
        return np.bincount(owners, values, len(requests)).tolist()

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Greedy only; ValueError where a task asks for samples, or for anything else that changes the text."""
        prompts = []
        for request in requests:
            text, given = request.args
            how = normalize_gen_kwargs({name: value for name, value in given.items() if value is not None}, 256)
            until, most = how.pop("until", []), how.pop("max_gen_toks")
            other = [*not_greedy(how), *sorted(how.keys() - UNUSED - NEUTRAL.keys())]
            if other := "sampling" if how.get("do_sample") else ", ".join(other):
                raise ValueError(f"{request.task_name}: asks for {other} ({given}), and generation here is greedy")
            prompts.append((text, most, tuple(filter(None, until))))
        return respond(self.model, self.encoder, prompts, self.stop_ids)


def run(argv: list[str] | None = None) -> None:
    about = "Run tasks of the lm-evaluation-harness on a model folder, with this project's model and scorer."
    parser = command_line("python -m eval.harness", about, scores=True)
    add = parser.add_argument
    add("--tasks", required=True, metavar="A,B", help="the harness's names")
    add("--include-path", metavar="PATH", help="folder with task files of your own")
    add("--num-fewshot", type=int, metavar="N", help="examples in each prompt (default: the task's)")
    add("--out", type=Path, metavar="FILE.json", help="where to write the harness's results")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: expected at least 1")
    if args.out and args.out.exists():
        raise ValueError(f"{args.out}: exists; choose another --out, or move it away")
    names, manager = args.tasks.split(","), TaskManager(include_path=args.include_path)
    for name in names:
        if name not in manager.all_tasks:
            near = ", ".join(get_close_matches(name, manager.all_tasks)) or "none; `lm-eval ls tasks` lists them"
            raise ValueError(f"--tasks {name}: the harness has no such task; nearest: {near}")
    how = {"num_fewshot": args.num_fewshot, "limit": args.limit, "task_manager": manager, "log_samples": False}
    found = simple_evaluate(SFTGO(args.model, args.bos, args.dtype), tasks=names, **how)
    say(make_table(found) + ("\n" + make_table(found, "groups") if found.get("groups") else ""))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: found[name] for name in ("results", "groups", "versions", "n-shot", "n-samples") if name in found}
        kept = {"model": args.model, "bos": args.bos, "dtype": args.dtype, **kept}
        kept = json.loads(
            json.dumps(kept, default=lambda x: x.item() if hasattr(x, "item") else str(x)),
            parse_constant=lambda name: None,
        )  # NaN is no JSON: null
        say(f"wrote {write_new(args.out, json.dumps(kept, indent=2, ensure_ascii=False) + chr(10))}")


def main(argv: list[str] | None = None) -> None:
    command(lambda: run(argv), "leave the GPU to this job alone", "interrupted; nothing was written")


if __name__ == "__main__":
    main()
