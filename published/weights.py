"""A model folder's safetensors, in and out. A model here is any module whose parameters carry the published names."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from published.files import read_json, read_tensor, tensor_shapes, write_json, write_safetensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FLOATING = ("F64", "F32", "F16", "BF16")  # as safetensors writes them
PICKLE = "a pickle, which can run code when opened"
FOREIGN = dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".pkl"), PICKLE)  # weights of other kinds
FOREIGN |= {".gguf": "llama.cpp's", ".h5": "TensorFlow's", ".msgpack": "Flax's", ".npz": "numpy's"}
UNFINISHED = {".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp"}
Part = Callable[
    [nn.Parameter], tuple[Tensor, slice]
]  # a parameter -> the tensor to fill, and which of its rows that is


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file of a model folder that transformers takes, too; empty without any weights.

    The files' headers are read, so none of them is missing or cut short.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder}: a LoRA adapter (adapter_config.json); merge it into its base model first")
    names, beside = {}, f"; {single.name} is beside it: remove the one that is not meant" * single.is_file()
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
            raise ValueError(f"{index}: no weight_map from tensors to files; download the index again{beside}")
        if others := sorted({n for n in names.values() if not n.endswith(".safetensors")}):
            kind = FOREIGN.get(Path(others[0]).suffix, "no safetensors file")
            raise ValueError(f"{index}: names {others[0]}, {kind}; convert the weights to safetensors{beside}")
        if lost := sorted({n for n in names.values() if Path(n).name != n or not (folder / n).is_file()}):
            fix = f"is the download complete{unfinished(folder)}?{beside}"
            raise ValueError(f"{index}: names {', '.join(lost[:3])}, not in this folder; {fix}")
        held = {name: tensor_shapes(folder / name) for name in sorted({*names.values()})}
        if astray := [tensor for tensor, name in names.items() if tensor not in held[name]]:
            fix = f"index and weights do not belong together; fetch or save both again{beside}"
            raise ValueError(f"{index}: names {astray[0]} in {names[astray[0]]}, which does not hold it: {fix}")
    if single.is_file():  # as transformers does, also where an index is beside it
        if not (held := tensor_shapes(single)):
            raise ValueError(f"{single}: holds no tensor; is the download complete?")
        return dict.fromkeys(held, single)
    if names:
        return {tensor: folder / name for tensor, name in names.items()}
    if shards := sorted(folder.glob("*.safetensors")):
        missing = f"neither model.safetensors nor its index; is the download complete{unfinished(folder)}?"
        raise ValueError(f"{folder}: {shards[0].name} but {missing}")
    if others := sorted((p.name, kind) for p in folder.iterdir() for s, kind in FOREIGN.items() if s in p.suffixes):
        raise ValueError(f"{folder}: weights only as {others[0][0]}, {others[0][1]}; convert them to safetensors")
    return {}


def unfinished(folder: Path) -> str:
    """What a download that was broken off left in the folder or in the Hub's cache around it, for a message."""
    places = [*folder.iterdir(), *(folder / ".cache/huggingface").rglob("*"), *folder.glob("../../blobs/*")]
    left = sorted(str(p.relative_to(folder)) for p in places if p.suffix in UNFINISHED or not p.exists())
    return f" (it left {left[0]})" if left else ""


def fitting(model: nn.Module, folder: Path, fresh: bool = False) -> dict[str, Path]:
    """`weight_files`, which hold this model's tensors and no others, in its shapes; empty only where `fresh` is meant.

    Nothing but headers is read: before anything slow it costs nothing.
    """
    files = weight_files(folder)
    if not files and not fresh:
        fix = f"is the download complete{unfinished(Path(folder))}? `train.py --fresh` starts from random ones"
        raise ValueError(f"{folder}: no weights in the folder, only a configuration; {fix}")
    if not files:
        return {}
    wanted = dict(model.named_parameters())  # a tied head is one parameter, under the embedding's name
    several = len(paths := {*files.values()}) > 1
    where = folder if several else paths.pop()
    if missing := sorted(wanted.keys() - files.keys()):
        names = ", ".join(missing[:3]) + ", …" * (len(missing) > 3)
        found = "".join(f"; found {', '.join(names)}" for names in [sorted(files.keys() - wanted.keys())[:3]] if names)
        meta = "; these are in Meta's layout, this loader reads Hugging Face's" * ("tok_embeddings.weight" in files)
        raise ValueError(f"{where}: {len(missing)} of {len(wanted)} tensors missing ({names}){found}{meta}")
    extra = sorted(n for n in files.keys() - wanted.keys() - {HEAD} if not n.endswith("rotary_emb.inv_freq"))
    if extra:
        names = ", ".join(extra[:3])
        raise ValueError(
            f"{where}: {len(extra)} tensors this Llama does not have ({names}); does config.json fit them?"
        )
    held = {path: tensor_shapes(path) for path in {*files.values()}}
    for name, path in files.items():
        expected = tuple(wanted.get(name, wanted[EMBEDDING]).shape)  # a tied head is as the embedding
        shape, dtype = held[path][name]
        if (name in wanted or name == HEAD) and shape != expected:
            raise ValueError(f"{path}: {name} is {shape}, but config.json makes it {expected}")
        if dtype not in FLOATING:
            raise ValueError(f"{path}: {name} is of type {dtype}, quantized; expected {', '.join(FLOATING)}")
    return files


def load(model: nn.Module, files: dict[str, Path], part: Part) -> None:
    """Fill every parameter in place, tensor by tensor; of a parameter that is here in part, only its rows are read.

    Args:
        files: what `fitting` returned.
    """
    wanted, finite = dict(model.named_parameters()), {}
    for name, path in files.items():
        if name not in wanted and name != HEAD:
            continue
        target, rows = part(wanted.get(name, wanted[EMBEDDING]))  # the other name of a tied head
        tensor = read_tensor(path, name, rows)
        if name in wanted:
            finite[name] = target.copy_(tensor).isfinite().all()  # a GPU is asked at the end: no wait in between
        elif tensor.isfinite().all() and not torch.equal(tensor, read_tensor(files[EMBEDDING], EMBEDDING, rows)):
            claim = "but config.json says they are tied (tie_word_embeddings)"
            raise ValueError(f"{path}: {HEAD} differs from the embedding, {claim}")
    if bad := [name for name, holds in finite.items() if not holds]:
        fix = "its maker's fault, or a damaged download"
        found = f"{bad[0]} is not finite: nan or infinity in {len(bad)} of {len(finite)} tensors"
        raise ValueError(f"{files[bad[0]]}: {found}; {fix}")


def not_finite(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """What of this rank's part of the model would be nan or infinite in `dtype`, for a message; "" if nothing."""
    for name, p in model.named_parameters():
        here = p.detach().to_local() if hasattr(p, "to_local") else p.detach()
        if not here.to(dtype or p.dtype).isfinite().all():
            wide = f", though it is in {p.dtype}: too large for that type" * bool(here.isfinite().all())
            return f"{name} is not finite in {dtype or p.dtype}{wide}".replace("torch.", "")
    return ""


def save(
    model: nn.Module,
    folder: Path,
    dtype: torch.dtype | None = None,
    read=lambda p: p,
    shard_bytes: int = 5 * 10**9,
    changed: dict | None = None,
) -> None:
    """config.json and the weights in `dtype` (None: as they are), sharded with an index above `shard_bytes`.

    Args:
        read:    gives a parameter's complete value, already in `dtype`; called once for each, in `parameters()`' order.
        changed: fields of config.json in the place of the model's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards, size, total = [{}], 0, 0
    for name, p in model.named_parameters():
        nbytes = p.numel() * (dtype or p.dtype).itemsize
        if size and size + nbytes > shard_bytes:
            shards, size = [*shards, {}], 0
        shards[-1][name] = p
        size, total = size + nbytes, total + nbytes
    n = len(shards)
    names = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)] if n > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards):
        tensors = {t: read(p.detach().to(dtype or p.dtype)).cpu().contiguous() for t, p in shard.items()}
        write_safetensors(folder / f"{name}.part", tensors, {"format": "pt"})
        saved_dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        del tensors  # one shard at a time is held in `dtype`
    for old in (*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"):
        old.unlink(missing_ok=True)  # of weights saved here before: a stale index would hide the new file
    for name in names:
        (folder / f"{name}.part").rename(folder / name)
    if n > 1:
        index = {"metadata": {"total_size": total}}
        index |= {"weight_map": {t: name for name, shard in zip(names, shards) for t in shard}}
        write_json(folder / "model.safetensors.index.json", index)
    fields = model.cfg.raw or {"model_type": "llama", **asdict(model.cfg)}
    fields = {k: v for k, v in fields.items() if k not in ("torch_dtype", "dtype", "raw")} | (changed or {})
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], **fields, "torch_dtype": saved_dtype})
