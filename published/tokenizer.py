"""A model folder's tokenizer, in and out: tokenizer.json, chat template, end tokens of generation_config.json."""

import json
from functools import cached_property
from pathlib import Path
from uuid import uuid4

import tokenizers
import torch

from published.files import read_json, read_tensor, write_json
from published.weights import EMBEDDING, weight_files

TEXT = (  # of a turn, whose content is a string or a list of parts; what training refuses is refused
    "{% if tools or documents %}{{ raise_exception('this model knows no tools and no documents') }}{% endif %}"
    "{% macro text(m) %}{% if m['tool_calls'] or m['reasoning_content'] %}"
    "{{ raise_exception('this model knows no tool_calls and no reasoning_content') }}{% endif %}"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% elif m['content'] is sequence and m['content'] is not mapping and m['content'] %}{% for part in m['content'] %}"
    "{% if part['text'] is not string or part['type'] not in ('text', 'input_text', 'output_text') %}"
    "{{ raise_exception('content has a part that is not text') }}{% endif %}{{ part['text'] }}{% endfor %}"
    "{% else %}{{ raise_exception('content is neither a string nor a list of parts') }}{% endif %}{% endmacro %}"
)
EACH = (  # `role` of each turn m
    "{{ bos_token }}{% for m in messages %}{% set role = 'system' if m['role'] == 'developer' else m['role'] %}"
    "{% if role not in ('system', 'user', 'assistant') %}{{ raise_exception('no turns of role ' ~ role) }}{% endif %}"
)
CHAT_TEMPLATES = {  # data.py's templates in Jinja, saved with the model; transformers' apply_chat_template reads them
    "plain": TEXT
    + EACH
    + (
        "{% if role == 'assistant' %}Assistant: {{ text(m) }}{{ eos_token }}"
        "{% else %}{{ role | capitalize }}: {{ text(m) }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "alpaca": TEXT
    + (
        "{% set roles = messages | map(attribute='role') | list %}"
        "{% if roles != ['user'] and (roles != ['user', 'assistant'] or add_generation_prompt) %}"
        "{{ raise_exception('this model knows one user turn and at most one answer, not ' ~ roles | join(', ')) }}"
        "{% endif %}{{ bos_token }}Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{{ text(messages[0]) }}"
        "{% if add_generation_prompt or messages[1:] %}{{ '\n\n### Response:' }}{% endif %}"
        "{% for m in messages[1:] %}{{ text(m) }}{{ eos_token }}{% endfor %}"
    ),
    "llama3": TEXT
    + EACH
    + (
        "<|start_header_id|>{{ role }}<|end_header_id|>\n\n{{ text(m) | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
}
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
KEPT = ("model_max_length", "padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces")


class Tokenizer:
    """A model folder's tokenizer.json, with the ids that begin and end a document.

    backend: as published; it reads benchmarks' prompts, where "<|end_of_text|>" means the token, and decodes.
    reader:  for data, where that is text: it knows each special token by another spelling only, `written`.
    apart:   `reader` without the blank that some tokenizers put before whatever they read.

    Raises:
        ValueError: no readable tokenizer.json, no begin or end token, or one that cannot be read beside text.
    """

    def __init__(self, folder: str | Path, vocab_size: int):
        self.folder, self.vocab_size = Path(folder), vocab_size
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder}: no tokenizer.json here; copy the one the model was trained with")
        self.raw = path.read_bytes()  # kept, because the folder may be gone when the model is saved
        try:
            self.backend = tokenizers.Tokenizer.from_str(self.raw.decode())
        except Exception as e:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizers file ({e})") from e
        self.backend.no_truncation()
        self.backend.no_padding()
        self.config = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second has the last word
            if (settings := self.folder / name).is_file():
                self.config |= {key: x for key, x in read_json(settings).items() if x is not None}
        tokens = {key: x for key, x in self.config.items() if key.endswith("_token")}  # strings, or with their flags
        tokens = {key: x.get("content") if isinstance(x, dict) else x for key, x in tokens.items()}
        self.named = {key: x for key, x in tokens.items() if isinstance(x, str) and self.has(x)}
        self.bos_token = self._name("bos_token", "<|begin_of_text|>")
        self.end_token = self._name("eos_token", "<|end_of_text|>")
        added = self.backend.get_added_tokens_decoder().values()
        self.tokens = {token.content for token in added} | {*self.named.values()}  # what transformers reads as tokens
        special = {token.content for token in added if token.special} | {*self.named.values()}
        special |= {self.bos_token, self.end_token, *filter(self.has, HEADERS)}
        self.special = {token: self.backend.token_to_id(token) for token in sorted(special)}
        secret = uuid4().hex
        self.spelling = {token: f"{secret}{i:06d}" for i, token in enumerate(self.special)}
        self.reader, self.known = self._reader(), {}
        self.bos, self.end = self.id(self.bos_token), self.id(self.end_token)

    def has(self, token: str) -> bool:
        return self.backend.token_to_id(token) is not None

    def _name(self, role: str, llama3: str) -> str:
        """Llama 3's own token where there is one, else what the folder's settings call it."""
        if self.has(llama3):
            return llama3
        if role in self.named:
            return self.named[role]
        tried = f"neither {llama3} nor a {role} of tokenizer_config.json or special_tokens_map.json"
        raise ValueError(f"{self.folder}: no {role}: {tried} is in tokenizer.json")

    def _reader(self, **changed) -> tokenizers.Tokenizer:
        """`backend` with the special tokens spelt otherwise, and no more than text makes of its vocabulary."""
        file = json.loads(self.raw) | {"truncation": None, "padding": None, "post_processor": None}
        model, spelt = file["model"], lambda token: self.spelling.get(token, token)
        added = {token["content"]: token for token in file.get("added_tokens") or []}
        alone = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        added |= {token: {"id": id, **alone} for token, id in self.special.items() if token not in added}
        file["added_tokens"] = [known | {"content": spelt(token)} for token, known in added.items()]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {spelt(token): id for token, id in model["vocab"].items()}
        else:  # Unigram's
            model["vocab"] = [[spelt(token), score] for token, score in model["vocab"]]
        if "merges" in model:  # text could be merged into a special token
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            model["merges"] = [pair for pair in pairs if not self.special.keys() & {*pair, "".join(pair)}]
        model |= {"unk_token": spelt(model["unk_token"])} if "unk_token" in model else {}
        file |= {part: change(file.get(part)) for part, change in changed.items()}
        return tokenizers.Tokenizer.from_str(json.dumps(file))

    @cached_property
    def apart(self) -> tokenizers.Tokenizer:
        return self._reader(normalizer=without_blank, pre_tokenizer=without_blank)

    def id(self, token: str) -> int:
        """The id of a special token; <|end_of_text|> is the end token, however it is called here."""
        token = self.end_token if token == "<|end_of_text|>" else token
        if token not in self.known:
            if not self.has(token):
                raise ValueError(f"{self.folder}: the tokenizer has no {token}; use another --template")
            if (found := self.special[token]) >= self.vocab_size:
                raise ValueError(self.unembedded(found))
            read = self.reader.encode(f"a{self.spelling[token]}a", add_special_tokens=False).ids.count(found) == 1
            if not read or token not in self.tokens:
                why = "beside a letter (single_word, normalized)" if not read else "as a token: added_tokens lacks it"
                raise ValueError(f"{self.folder / 'tokenizer.json'}: {token} would not be read {why}")
            self.known[token] = found
        return self.known[token]

    def check_template(self, strings: set[str]) -> None:
        """ValueError where a template's own text spells a special token: transformers would read that."""
        if spelt := [token for token in self.special for x in strings if token in x]:
            raise ValueError(f"{self.folder}: {spelt[0]!r} is a special token here, and the template writes it as text")

    def written(self, token: str) -> str:
        """How `reader` spells a special token."""
        self.id(token)
        return self.spelling[self.end_token if token == "<|end_of_text|>" else token]

    def unembedded(self, id: int) -> str:
        """What to say of an id beyond the model's embeddings."""
        known = f"the model embeds {self.vocab_size} tokens; do they belong together?"
        return f"{self.folder / 'tokenizer.json'}: {self.backend.id_to_token(id)!r} is token {id}, but {known}"

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    def stop_ids(self, template: str) -> list[int]:
        """Every token that ends an answer under `template`."""
        return sorted({self.end, self.id("<|eot_id|>")} if template == "llama3" else {self.end})

    def ids(self, template: str) -> dict:
        """The ids for a model's config.json, as trained; a padding id only where there is one that ends nothing."""
        ends, pad = self.stop_ids(template), self.special.get(self.named.get("pad_token"), self.vocab_size)
        eos = ends if len(ends) > 1 else ends[0]
        pad = None if pad in ends or pad >= self.vocab_size else pad
        return {"bos_token_id": self.bos, "eos_token_id": eos, "pad_token_id": pad}

    def save(self, folder: str | Path, template: str) -> None:
        """tokenizer.json unchanged, tokenizer_config.json with the chat template, generation_config.json.

        Of the settings only those stay that do not make transformers read text otherwise than tokenizer.json does.
        """
        folder = Path(folder)
        (folder / "tokenizer.json").write_bytes(self.raw)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {key: self.config[key] for key in KEPT if key in self.config} | self.named
        words = json.loads(self.raw).get("pre_tokenizer") or {}  # transformers 4 would put its own default in it
        config |= {key: words[key] for key in ("add_prefix_space",) if key in words}
        config |= {"bos_token": self.bos_token, "eos_token": "<|eot_id|>" if template == "llama3" else self.end_token}
        if template in CHAT_TEMPLATES:
            config["chat_template"] = CHAT_TEMPLATES[template]
        write_json(folder / "tokenizer_config.json", config)
        generation = {name: ids for name, ids in self.ids(template).items() if ids is not None}
        generation["eos_token_id"] = self.stop_ids(template)
        write_json(folder / "generation_config.json", generation)


def without_blank(part):
    """A normalizer or pre-tokenizer that puts no blank before the text."""
    if isinstance(part, list):
        return [without_blank(x) for x in part]
    if not isinstance(part, dict):
        return part
    part, kind = {key: without_blank(x) for key, x in part.items()}, part.get("type")
    if kind == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    never = {"prepend_scheme": "never"} if kind == "Metaspace" else {}
    return part | ({"add_prefix_space": False} | never if kind in ("Metaspace", "ByteLevel") else {})


def require_trained_headers(folder: Path, tokenizer: Tokenizer) -> None:
    """Refuse the llama3 template on a base model: its rows for the headers are far below the median, or alike."""
    files = weight_files(folder)
    if not files:
        return  # fresh weights: every row is untrained alike
    if EMBEDDING not in files:
        raise ValueError(f"{folder}: no {EMBEDDING} among the tensors; is this the published (Hub) layout?")
    rows = read_tensor(files[EMBEDDING], EMBEDDING).float()  # (V, D)
    found = rows[[tokenizer.id(token) for token in HEADERS]]  # (3, D)
    norms, median = found.norm(dim=1), float(rows.norm(dim=1).median())
    alike = float(torch.nn.functional.cosine_similarity(found, found.roll(1, 0)).min())
    # With a tied head, the rows of unused tokens all drift in the same direction, so their cosines approach 1.
    if norms.min() < median / 2 or alike > 0.95:
        measured = f"norms from {norms.min():.3g} (median row {median:.3g}) and cosines above {alike:.2f} to each other"
        raise ValueError(
            f"{folder}: this base model never trained {', '.join(HEADERS)}: their embeddings have {measured}, and at "
            "fine-tuning's learning rates they never will be trained; use --template plain, or an instruction-tuned "
            "checkpoint"
        )
