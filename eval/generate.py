"""Greedy continuations of prompts, to the harness's rules: in batches of like length, each ended by its stop strings."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data import Tokenizer
from eval.score import ALONE, Encoder
from files import read_json
from model import Llama

OTHERS = "or score the others: --tasks mmlu,mmlu_5shot,mathqa,arc_challenge,openbookqa,hellaswag,truthfulqa_mc"  # without an extra


@dataclass(frozen=True)
class Prompt:
    """One item that is answered in words."""

    task: str
    doc_id: int
    text: str
    max_new_tokens: int
    stops: tuple[str, ...]
    judge: Callable[[str], dict]  # the response -> its metrics


def respond(
    model: Llama,
    encoder: Encoder,
    prompts: list[tuple[str, int, tuple[str, ...]]],
    stop_ids: tuple[int, ...],
    world=ALONE,
    cached_tokens: int | None = None,
    name: str = "writing",
) -> list[str]:
    """What the model writes after each prompt.

    Args:
        prompts: (text, most new tokens, stop strings); a prompt is cut from the left so that they fit the model's window.
        stop_ids: tokens that end a sequence.
        world: ranks that share the batches; rank 0 gets all texts, the others an empty list.
        cached_tokens: positions in one batch's key/value cache; None: 32,768 on a CPU, what two fifths of the free memory hold on a GPU.

    Returns:
        the decoded new tokens of each, without special tokens, up to the first of its stop strings or of the end token's text.

    Raises:
        ValueError: the new tokens alone would fill the window.
    """
    window, tokenizer = model.cfg.max_position_embeddings, encoder.tokenizer
    for _, most, _ in prompts:
        require_room(most, window, name)
    cached_tokens = cached_tokens or room_for(model)
    ids = [found[-(window - most) :] or [tokenizer.bos] for (_, most, _), found in zip(prompts, encoder([text for text, *_ in prompts]))]
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i][1:], len(ids[i])), reverse=True)
    batches = [order[:1]]
    for i in order[1:]:
        batch, (_, most, stops) = batches[-1], prompts[batches[-1][0]]
        alike = prompts[i][1:] == (most, stops)
        if not alike or (len(batch) + 1) * (len(ids[batch[0]]) + most) > cached_tokens or len(batch) * world.size >= len(prompts):
            batches.append([])
        batches[-1].append(i)
    mine = batches[world.rank :: world.size]
    texts: dict[int, str] = {}
    with tqdm(desc=name, total=sum(map(len, mine)), unit="item", disable=None, leave=False) as bar:
        for batch in mine:
            _, most, stops = prompts[batch[0]]
            stopper = Stopper(stops, tokenizer.decode, bar)
            for i, tokens in zip(batch, model.generate([ids[i] for i in batch], most, stop_ids=stop_ids, ended=stopper)):
                texts[i] = trimmed(tokenizer.decode(tokens), (*stops, tokenizer.end_token))
            bar.update(len(batch) - stopper.stopped)
    parts = world.gather(name, list(texts.items()))
    texts = {i: text for part in parts for i, text in part}
    return [texts[i] for i in range(len(prompts))] if parts else []


def require_room(most: int, window: int, name: str) -> None:
    if most >= window:
        raise ValueError(f"{name}: up to {most:,} new tokens leave no room for a prompt in this model's window of {window:,} tokens")


def room_for(model: Llama) -> int:
    """How many positions' keys and values one batch may hold."""
    if (device := model.lm_head.weight.device).type == "cpu":
        return 32_768
    cfg = model.cfg
    each = 2 * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim * model.compute_dtype.itemsize  # bytes
    return int(0.4 * torch.cuda.mem_get_info(device)[0] / each)


class Stopper:
    """Whether a sequence's newest tokens complete a stop string; as it is asked at every token, it also moves the progress bar."""

    def __init__(self, stops: tuple[str, ...], decode: Callable[[list[int]], str], bar: tqdm):
        self.stops, self.decode, self.bar = stops, decode, bar
        self.recent = max(map(len, stops), default=0) + 4  # tokens that may hold one: a character or more each, but for a few bytes
        self.tokens = self.stopped = 0

    def __call__(self, tokens: list[int]) -> bool:
        self.tokens += 1
        if self.tokens % 1000 == 0:
            self.bar.set_postfix_str(f"{self.tokens:,} tokens of this batch")
        recent = self.decode(tokens[-self.recent :]) if self.stops else ""
        found = any(stop in recent for stop in self.stops) and any(stop in self.decode(tokens) for stop in self.stops)
        self.stopped += found
        self.bar.update(int(found))
        return found


def trimmed(text: str, stops: tuple[str, ...]) -> str:
    """What stands before each stop string's first occurrence."""
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text


def end_tokens(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a text: those of the folder's generation_config.json, else the tokenizer's.

    Raises:
        ValueError: the file asks for what changes greedy decoding, which the harness would heed.
    """
    path = folder / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    for name, neutral in (("repetition_penalty", 1.0), ("no_repeat_ngram_size", 0), ("num_beams", 1)):
        if settings.get(name) not in (None, neutral):
            raise ValueError(f"{path}: {name} is {settings[name]}, and generation here is plain greedy; take it out to score without it")
    named = settings.get("eos_token_id")
    return tuple(named) if isinstance(named, list) else (tokenizer.end if named is None else named,)


def write(
    model: Llama, encoder: Encoder, prompts: list[Prompt], stop_ids: tuple[int, ...], world=ALONE, name: str = "writing"
) -> list[dict]:
    """What each item gives: the response and its metrics (rank 0; the others get nothing)."""
    texts = respond(model, encoder, [(p.text, p.max_new_tokens, p.stops) for p in prompts], stop_ids, world, name=name)
    return [{"response": text, "metrics": prompt.judge(text)} for prompt, text in zip(prompts, texts)]
