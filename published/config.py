"""A model folder's config.json as the fields of a Llama, checked."""

from pathlib import Path

from published.files import read_json

ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}
ONLY |= {"transformers_weights": None}  # another file than model.safetensors, which transformers would read
WHOLE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL_WHOLE = ("num_key_value_heads", "head_dim", "max_position_embeddings")
NUMBERS = ("rms_norm_eps", "rope_theta", "initializer_range")
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(folder: str | Path) -> dict:
    """The fields of `LlamaConfig` from a model folder's config.json; ValueError where it is not a Llama of ours."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json here; expected a model folder in the published (Hub) layout")
    return checked(read_json(path), str(path))


def checked(raw: dict, source: str = "config") -> dict:
    """The same from the file's object, in either spelling of its rotary settings; `source` names it in errors."""

    def expect(holds: bool, found: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"{source}: {found}, expected {expected}")

    def number(name: str, value, kinds: tuple, expected: str) -> None:
        expect(type(value) in kinds and value > 0, f"{name} is {value!r}", expected)

    model = raw.get("model_type")
    expect(model == "llama", f"model_type is {model!r}", "'llama': only Llama models are read here")
    for name, only in ONLY.items():
        expect(raw.get(name, only) == only, f"{name} is {raw.get(name)!r}", f"{only!r}: this Llama has no other")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    expect(isinstance(rope, dict), f"rotary settings are {rope!r}", "an object")
    rope = {name: value for name, value in rope.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    expect(kind in ("default", "llama3"), f"rotary scaling is {kind!r}", "'default' or 'llama3'")
    for name in SCALING if kind == "llama3" else ():
        number(f"rotary {name}", rope.get(name), (int, float), "a number above 0")
    values = {name: value for name, value in raw.items() if value is not None}
    values |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    for name in (*WHOLE, *(name for name in OPTIONAL_WHOLE if name in values)):
        number(name, values.get(name), (int,), "a whole number above 0")
    for name in (name for name in NUMBERS if name in values):
        number(name, values[name], (int, float), "a number above 0")
    tied = values.get("tie_word_embeddings", False)
    expect(isinstance(tied, bool), f"tie_word_embeddings is {tied!r}", "true or false")
    heads = values["num_attention_heads"]
    values = {"num_key_value_heads": heads, "head_dim": values["hidden_size"] // heads} | values
    kv_heads, width = values["num_key_value_heads"], values["head_dim"]
    shape = f"{heads} query heads, {kv_heads} key/value heads of width {width}"
    expect(heads % kv_heads == 0 == width % 2, shape, "query heads in equal groups, and an even width")
    fields = {
        name: values[name] for name in (*WHOLE, *OPTIONAL_WHOLE, *NUMBERS, "tie_word_embeddings") if name in values
    }
    return fields | {"rope_scaling": rope if kind == "llama3" else None, "raw": raw}
