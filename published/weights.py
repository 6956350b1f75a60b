"""A model folder's safetensors, in and out. A model here is any module whose parameters carry the published names."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from published.files import open_safetensors, read_json, read_tensor, tensor_shape, write_json, write_safetensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Part = Callable[
    [nn.Parameter], tuple[Tensor, slice]
]  # a parameter -> the tensor to fill, and which of its rows that is


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a model folder; empty when it has no weights at all."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
            raise ValueError(f"{index}: no weight_map from tensors to files; download the index again")
        if lost := sorted({n for n in names.values() if Path(n).name != n or not (folder / n).is_file()}):
            raise ValueError(f"{index}: names {', '.join(lost[:3])}, not in this folder; is the download complete?")
        return {tensor: folder / name for tensor, name in names.items()}
    single = folder / "model.safetensors"
    if single.is_file():
        with open_safetensors(single) as f:
            if not f.keys():
                raise ValueError(f"{single}: holds no tensor; remove it to start from fresh weights")
            return dict.fromkeys(f.keys(), single)
    if shards := sorted(folder.glob("*.safetensors")):
        missing = "neither model.safetensors nor its index; is the download complete?"
        raise ValueError(f"{folder}: {shards[0].name} but {missing}")
    if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")):
        danger = "a pickle, which can run code when opened; convert them to safetensors"
        raise ValueError(f"{folder}: weights only as {pickles[0]}, {danger}")
    return {}


def load(model: nn.Module, files: dict[str, Path], part: Part) -> None:
    """Fill every parameter in place, tensor by tensor; of a parameter that is here in part, only its rows are read."""
    wanted = dict(model.named_parameters())  # a tied head is one parameter, under the embedding's name
    where = next(iter(files.values())).parent
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
    for name, path in files.items():
        if name not in wanted and name != HEAD:
            continue
        param = wanted.get(name, wanted[EMBEDDING])  # the other name of a tied head
        target, rows = part(param)
        if (shape := tensor_shape(path, name)) != tuple(param.shape):
            raise ValueError(f"{path}: {name} is {shape}, but config.json makes it {tuple(param.shape)}")
        tensor = read_tensor(path, name, rows)
        if name in wanted:
            target.copy_(tensor)
        elif not torch.equal(tensor, read_tensor(files[EMBEDDING], EMBEDDING, rows)):
            claim = "but config.json says they are tied (tie_word_embeddings)"
            raise ValueError(f"{path}: {HEAD} differs from the embedding, {claim}")


def save(
    model: nn.Module, folder: Path, dtype: torch.dtype | None = None, read=lambda p: p, shard_bytes: int = 5 * 10**9
) -> None:
    """config.json and the weights in `dtype` (None: as they are), sharded with an index above `shard_bytes`.

    `read` gives a parameter's complete value, already in `dtype`; it is called once for each, in `parameters()`' order.
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
    fields = {k: v for k, v in fields.items() if k not in ("torch_dtype", "dtype", "raw")}
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], **fields, "torch_dtype": saved_dtype})
