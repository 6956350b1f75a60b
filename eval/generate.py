"""Greedy continuations of prompts by the harness's rules, in batches of similar length, ended by stop strings."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from eval import say
from eval.score import ALONE, Encoder
from model import Llama
from published.files import read_json, write_json
from published.tokenizer import Tokenizer
from support.generate import generate, slots

# Settings of generation: those that are not used without sampling and beams, and the others with their neutral values.
UNUSED = {*"do_sample temperature top_p top_k min_p typical_p epsilon_cutoff eta_cutoff".split()}
UNUSED |= {"length_penalty", "early_stopping", "use_cache"}
NEUTRAL = dict.fromkeys("num_beams num_beam_groups num_return_sequences guidance_scale".split(), 1)
NEUTRAL |= dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), 1)
OFF = """no_repeat_ngram_size encoder_no_repeat_ngram_size diversity_penalty penalty_alpha min_length min_new_tokens
    frequency_penalty presence_penalty bad_words_ids force_words_ids sequence_bias suppress_tokens begin_suppress_tokens
    forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty stop_strings"""
NEUTRAL |= dict.fromkeys(OFF.split(), 0)
Asked = tuple[str, int, tuple[str, ...]]  # a prompt, the most new tokens, stop strings


@dataclass(frozen=True)
class Prompt:
    """One item that the model answers in words."""

    task: str
    doc_id: int
    text: str
    max_new_tokens: int
    stops: tuple[str, ...]
    judge: Callable[[str], dict]  # the response -> its metrics

    @property
    def asked(self) -> dict:
        return {"task": self.task, "doc_id": self.doc_id, "prompt": self.text}


def write(model: Llama, encoder: Encoder, items: list[Prompt], stop_ids, ranks, name: str, kept: Path) -> list[dict]:
    """Each item's response and its metrics, on every rank; the responses are `kept` in a file before any is judged."""
    texts = ranks.first(lambda: read_json(kept).get("responses") if kept.is_file() else None)
    if not isinstance(texts, list) or len(texts) != len(items) or not all(isinstance(text, str) for text in texts):
        prompts = [(p.text, p.max_new_tokens, p.stops) for p in items]
        texts = respond(model, encoder, prompts, stop_ids, ranks, name=name)
        ranks.first(lambda: write_json(kept, {"responses": texts}))
    else:
        say(f"{name}: judging the responses in {kept}")
    return [{"response": text, "metrics": item.judge(text)} for item, text in zip(items, texts, strict=True)]


def respond(
    model: Llama, encoder: Encoder, prompts: list[Asked], stop_ids, ranks=ALONE, cached_tokens=None, name="writing"
) -> list[str]:
    """What the model writes after each prompt, without special tokens, up to a stop string or the end token's text.

    A prompt is cut from the left so that it and its new tokens fit the model's window. The ranks share the batches, and
    each gets all texts. `cached_tokens` of one batch's key/value cache; None: 32,768 on a CPU, 2/5 of GPU memory.
    """
    window, tokenizer = model.cfg.max_position_embeddings, encoder.tokenizer
    require_room(max(most for _, most, _ in prompts), window, name)
    cached_tokens, encoded = cached_tokens or room_for(model), encoder([text for text, *_ in prompts])
    ids = [found[-(window - most) :] or [tokenizer.bos] for (_, most, _), found in zip(prompts, encoded)]
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i][1:], len(ids[i])), reverse=True)
    batches = [order[:1]]
    for i in order[1:]:
        batch, limits = batches[-1], prompts[batches[-1][0]][1:]
        full = (len(batch) + 1) * slots(len(ids[batch[0]]) + limits[0]) > cached_tokens
        if prompts[i][1:] != limits or full or len(batch) * ranks.size >= len(prompts):
            batches.append([])
        batches[-1].append(i)

    def work() -> dict[int, str]:
        texts = {}
        for batch in tqdm(batches[ranks.rank :: ranks.size], name, unit="batch", disable=None, leave=False):
            _, most, stops = prompts[batch[0]]
            ended = partial(stopped, stops=stops, decode=tokenizer.decode)
            try:
                new = generate(model, [ids[i] for i in batch], most, stop_ids=stop_ids, ended=ended)
            except ValueError as e:
                raise ValueError(f"{name}: {e}") from e
            texts |= {i: trimmed(tokenizer.decode(t), (*stops, tokenizer.end_token)) for i, t in zip(batch, new)}
        return texts

    texts = {i: text for part in ranks.together(work) for i, text in part.items()}
    return [texts[i] for i in range(len(prompts))]


def require_room(most: int, window: int, name: str) -> None:
    if most >= window:
        room = f"no room for a prompt in this model's window of {window:,} tokens"
        raise ValueError(f"{name}: up to {most:,} new tokens leave {room}")


def room_for(model: Llama) -> int:
    """How many positions' keys and values one batch may hold."""
    cfg, device = model.cfg, model.lm_head.weight.device
    each = 2 * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim * model.compute_dtype.itemsize  # bytes
    if device.type == "cpu":
        return 32_768
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, of what was scored
    return int(0.4 * (torch.cuda.mem_get_info(device)[0] + kept) / each)


def stopped(tokens: list[int], stops: tuple[str, ...], decode: Callable[[list[int]], str]) -> bool:
    """Whether the newest of a sequence's tokens complete a stop string; they alone are decoded at every token."""
    newest = decode(tokens[-(max(len(stop.encode()) for stop in stops) + 4) :]) if stops else ""  # a byte each or more
    return any(stop in newest for stop in stops) and any(stop in decode(tokens) for stop in stops)


def trimmed(text: str, stops: tuple[str, ...]) -> str:
    """The text before the first occurrence of each stop string."""
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text


def not_greedy(settings: dict) -> list[str]:
    """The settings that change what greedy decoding writes."""
    return [
        x
        for x, value in settings.items()
        if x in NEUTRAL and value is not False and value not in (None, [], {}, NEUTRAL[x])
    ]


def end_tokens(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a text: those of the folder's generation_config.json, else the tokenizer's."""
    path = folder / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    for name in not_greedy(settings):  # the harness would follow it
        raise ValueError(f"{path}: {name} is {settings[name]}, but generation here is plain greedy; take it out")
    named = settings.get("eos_token_id")
    named = named if isinstance(named, list) else [tokenizer.end if named is None else named]
    if not named or not all(type(id) is int and id >= 0 for id in named):
        raise ValueError(f"{path}: eos_token_id is {settings['eos_token_id']!r:.60}, expected token ids")
    return tuple(named)


def needed(task: str, packages: str) -> ValueError:
    others = "mmlu,mmlu_5shot,mathqa,arc_challenge,openbookqa,hellaswag,truthfulqa_mc"
    install = 'install it with: pip install -e ".[harness]"'
    return ValueError(f"{task} needs {packages}; {install}, or score the others: --tasks {others}")
