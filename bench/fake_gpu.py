"""A GPU that computes nothing: what a program would do on one, told by a machine that has none.

    with FakeGPU() as gpu:
        ...                     # tensors on gpu.device say cuda:0; their memory does not exist
    gpu.ops, gpu.peak           # every operation on it, the most bytes alive at once

Tensors on the CPU stay real. One on the GPU is a FakeTensor, of any shape at no cost. A small one also carries its
value, from its copy to the GPU on: counts of tokens, masks and groups are true. What comes from a large one is made up
(floats between 1 and 2, True), so a loss is a finite number, and not the right one.

Not seen: what a kernel does, demands and takes for itself, and its time.
"""

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.distributed.tensor import DTensor
from torch.distributed._tools import fake_collectives  # noqa: F401, what collectives return
from torch.optim.optimizer import _foreach_supported_types as OF_OPTIMIZERS
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _foreach_utils
from torch.utils._foreach_utils import _foreach_supported_types as OF_NORMS
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves, tree_map_only

aten, CPU = torch.ops.aten, torch.device("cpu")
FOR_AUTOGRAD = torch.device("meta:100")  # what C++ hears in the place of cuda:0, whose streams it would look for
SMALL = 2**17  # the most elements of a tensor that carries its value
COPIES = aten._to_copy.default, aten.copy_.default
BY_INDEX = aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default


class Seen(NamedTuple):
    """A tensor that an operation read or made."""

    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Op(NamedTuple):
    name: str  # aten.mm, c10d._allgather_base_, …
    args: tuple  # tensors as `Seen`
    inputs: list[Seen]
    outputs: list[Seen]
    waits: bool  # the CPU waits for the GPU: it reads a value, or data crosses between the two

    @property
    def crosses(self) -> bool:
        return {"cpu", "cuda"} <= {t.device for t in self.inputs + self.outputs}


@torch.library.custom_op("gpu::rms_norm", mutates_args=())
def fused_rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel that only a GPU has: it saves its input and a float32 number for each row."""
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("gpu::rms_norm_backward", mutates_args=())
def fused_rms_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def norm_gradient(ctx, grad: Tensor, _) -> tuple[Tensor, Tensor]:
    return fused_rms_norm_backward(grad, *ctx.saved_tensors)


for kernel in (fused_rms_norm, fused_rms_norm_backward):
    kernel.register_fake(kernel._init_fn)
fused_rms_norm.register_autograd(
    norm_gradient, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0], output[1], inputs[1])
)


class FakeGPU(TorchDispatchMode):
    """The GPU of the first of some `ranks`; the others are not there, and what they send is made up.

    ops: every operation on it, in order. alive, peak: bytes of its tensors; `peak = alive` begins anew.
    """

    device = torch.device("cuda", 0)

    def __init__(self, ranks: int = 1, memory: int = 80 * 10**9):
        super().__init__()
        self.ranks, self.memory, self.ops, self.alive, self.peak, self.held = ranks, memory, [], 0, 0, {}
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self):
        self.patches = ExitStack()
        plain = F.rms_norm
        dispatch, resize = FakeTensor.__torch_dispatch__, torch.UntypedStorage.resize_

        def hears(cls, func, types, args=(), kwargs=None):
            if func is torch.ops.prim.device.default and not args[0].fake_mode.in_kernel_invocation:
                return FOR_AUTOGRAD if args[0].fake_device.type == "cuda" else args[0].fake_device
            return dispatch(func, types, args, kwargs or {})

        def resized(storage, size):  # how fsdp frees what it gathered
            resize(storage, size)
            if storage._cdata in self.held:
                self.hold(storage)

        def rms_norm(x, shape, weight=None, eps=None):
            fused = isinstance(x, FakeTensor) and weight is not None and weight.dtype == x.dtype
            return fused_rms_norm(x, weight)[0] if fused else plain(x, shape, weight, eps)

        answers = {name: getattr(torch.cpu, name) for name in ("Stream", "Event", "stream", "current_stream")} | {
            **{"is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1},
            **{"current_device": lambda: 0, "set_device": lambda device: None},
            "synchronize": lambda device=None: self.ops.append(Op("synchronize", (), [], [], True)),
            "memory_allocated": lambda device=None: self.alive,
            "max_memory_allocated": lambda device=None: self.peak,
            "reset_peak_memory_stats": lambda device=None: setattr(self, "peak", self.alive),
            "mem_get_info": lambda device=None: (self.memory - self.alive, self.memory),
            "get_device_properties": lambda device=None: SimpleNamespace(name="fake", total_memory=self.memory),
            "is_current_stream_capturing": lambda: False,
        }
        for name, answer in answers.items():
            self.patches.enter_context(patch.object(torch.cuda, name, answer))
        is_cuda = property(lambda t: t.fake_device.type == "cuda")
        is_meta = property(lambda t: t.device.type == "meta")
        for owner, name, answer in (
            (FakeTensor, "__torch_dispatch__", classmethod(hears)),
            (FakeTensor, "is_cuda", is_cuda),
            (FakeTensor, "is_meta", is_meta),
            (DTensor, "device", property(lambda t: t._local_tensor.device)),
            (torch.UntypedStorage, "resize_", resized),
            (F, "rms_norm", rms_norm),
            (_foreach_utils, "_get_foreach_kernels_supported_devices", lambda: ["cuda", "meta"]),
        ):
            self.patches.enter_context(patch.object(owner, name, answer))
        for types in (OF_OPTIMIZERS, OF_NORMS):  # whose operations take many tensors at once
            types.append(FakeTensor)
            self.patches.callback(types.remove, FakeTensor)
        self.patches.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=cuda) begins on the CPU
        if self.ranks > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=self.ranks)
            self.patches.callback(dist.destroy_process_group)
        return super().__enter__()

    def __exit__(self, *fault):
        super().__exit__(*fault)
        self.patches.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return FakeTensor.__torch_dispatch__(func, types, args, kwargs)
        if any(is_traceable_wrapper_subclass_type(t) and not issubclass(t, FakeTensor) for t in types):
            return NotImplemented  # a DTensor asks again, with its local part
        given, to = tensors((args, kwargs)), torch.device(kwargs.get("device") or CPU)
        if to == FOR_AUTOGRAD:  # C++ makes one like another
            to, kwargs = self.device, kwargs | {"device": self.device}
        if to.type != "cuda" and not any(isinstance(t, FakeTensor) for t in given):
            return func(*args, **kwargs)
        if func is COPIES[0] and args[0].device == to and kwargs.get("dtype", args[0].dtype) == args[0].dtype:
            with self.fake:
                return aten.alias(args[0])  # nothing to do: C++ did not know that it is here already
        inputs = [seen(t) for t in given]
        out, waits = self.run(func, args, kwargs)
        name = str(func).removesuffix(".default")
        self.ops.append(Op(name, tree_map_only(Tensor, seen, args), inputs, [seen(t) for t in tensors(out)], waits))
        made = [t for t in tensors(out) if isinstance(t, FakeTensor)]
        for t in made:
            self.hold(t.untyped_storage())
        if all(t.numel() <= SMALL for t in made):
            known = all(value(t) is not None for t in given) and "empty" not in name and func.namespace == "aten"
            evaluate(made, partial(on_cpu, func, args, kwargs) if known else None)
        return out

    def run(self, func, args, kwargs):
        """What an operation returns, without its value, and whether the CPU waits for it."""
        waits = func is aten.masked_scatter_backward.default  # it counts the mask, inside
        if func in COPIES and (source := args[-1]).device.type != (to := kwargs.get("device", args[0].device)).type:
            if to.type == "cpu":
                real = torch.zeros(source.shape, dtype=source.dtype) if value(source) is None else value(source)
                return func(*args[:-1], real, **kwargs), True
            args, waits = (*args[:-1], self.here(source)), True
        if func in BY_INDEX:
            masks = [t is not None and t.dtype == torch.bool for t in args[1]]
            at = [value(t).nonzero().unbind(1) if mask else [t] for t, mask in zip(args[1], masks)]
            at = [[self.here(i) for i in part] if mask else part for part, mask in zip(at, masks)]
            args, waits = (args[0], sum(map(list, at), []), *args[2:]), any(masks)
        try:
            with self.fake:
                return func(*args, **kwargs), waits
        except (DataDependentOutputException, DynamicOutputShapeException):
            return tree_map_only(Tensor, self.here, on_cpu(func, args, kwargs)), True

    def here(self, real: Tensor) -> FakeTensor:
        with self.fake:
            fake = torch.empty(real.shape, dtype=real.dtype, device=self.device)
        fake.value = real
        return fake

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage's bytes, until it is gone."""
        key = storage._cdata
        if key not in self.held:
            weakref.finalize(storage, self.release, key)
        self.alive += storage.nbytes() - self.held.get(key, 0)
        self.held[key], self.peak = storage.nbytes(), max(self.peak, self.alive)

    def release(self, key: int) -> None:
        self.alive -= self.held.pop(key)


def tensors(tree) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def seen(t: Tensor) -> Seen:
    return Seen(t.device.type, t.dtype, tuple(t.shape), tuple(t.stride()))


def value(t: Tensor) -> Tensor | None:
    """The CPU tensor with its value, None where nobody knows it."""
    return getattr(t, "value", None) if isinstance(t, FakeTensor) else t


def on_cpu(func, args, kwargs):
    """An operation on the values of its tensors."""
    args, kwargs = tree_map_only(Tensor, value, (args, kwargs | {"device": CPU} if "device" in kwargs else kwargs))
    return func(*args, **kwargs)


def evaluate(made: list[FakeTensor], compute: Callable | None) -> None:
    """Give tensors on the GPU their values: computed where what they come from is known, else made up."""
    try:
        real = tensors(compute()) if compute else None
    except NotImplementedError:  # an operation of GPUs alone
        real = None
    for i, t in enumerate(made):
        if real is not None:
            t.value = real[i]
        elif value(t) is None:
            t.value = torch.full(t.shape, t.dtype == torch.bool, dtype=t.dtype, device=CPU)
            t.value = t.value.uniform_(1, 2) if t.is_floating_point() else t.value
