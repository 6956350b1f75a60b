"""Stand-ins for the two published LLMLingua-2 classifiers: their architectures and tokenizers, random weights."""

import json
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

# The folders' names contain what the method's own package tells the two kinds apart by.
MBERT, XLMR = "llmlingua-2-bert-base-multilingual-cased", "llmlingua-2-xlm-roberta-large"
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, initializer_range=0.5)
SHAPES = {  # of the published ones
    MBERT: dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    XLMR: dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}


def classifier_folder(
    parent: str | Path, kind: str, texts: list[str], vocab_size: int = 400, shape: dict = TINY, seed: int = 0
) -> Path:
    """Write a classifier of `kind` (MBERT or XLMR), its tokenizer trained on `texts`, its weights drawn from `seed`."""
    folder = Path(parent) / kind
    folder.mkdir(parents=True)
    tokenizer, special = (word_piece if kind == MBERT else sentence_piece)(texts, vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512, **special}))
    from transformers import BertConfig, BertForTokenClassification, XLMRobertaConfig, XLMRobertaForTokenClassification

    common = dict(vocab_size=tokenizer.get_vocab_size(), num_labels=2, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == MBERT:
            model = BertForTokenClassification(BertConfig(max_position_embeddings=512, **common))
        else:
            ids = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1, max_position_embeddings=514)
            model = XLMRobertaForTokenClassification(XLMRobertaConfig(**ids, **common))
    model.save_pretrained(folder)
    return folder


def word_piece(texts: list[str], vocab_size: int) -> tuple[Tokenizer, dict]:
    """As in bert-base-multilingual-cased."""
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    split = pre_tokenizers.BertPreTokenizer()
    words = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    characters = sorted({character for word in words for character in word})
    pieces = [*special.values(), *characters, *(f"##{character}" for character in characters)]
    frequent = sorted(words.keys() - {*pieces}, key=lambda word: (-words[word], word))
    pieces += frequent[: vocab_size - len(pieces)]  # the library's trainer would choose by a hash's order
    tokenizer = Tokenizer(models.WordPiece(dict(zip(pieces, range(len(pieces)))), unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens([*special.values()])
    return tokenizer, {"tokenizer_class": "BertTokenizer", "do_lower_case": False, **special}


def sentence_piece(texts: list[str], vocab_size: int) -> tuple[Tokenizer, dict]:
    """As in xlm-roberta."""
    special = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.Unigram())
    one_space = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), one_space])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    how = dict(special_tokens=[*special.values()], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=vocab_size, **how))
    tokenizer.add_special_tokens(["<mask>"])
    special |= {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    return tokenizer, {"tokenizer_class": "XLMRobertaTokenizer", **special}
