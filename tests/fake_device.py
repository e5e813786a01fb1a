"""A device `fake` beside the CPU, for tests on machines that have no other: torch's place for foreign backends
(PrivateUse1), whose tensors lie in
ordinary memory and whose arithmetic is the CPU's. An operation that mixes it with the CPU fails as it would on CUDA,
and what a GPU must be waited for is counted."""

import contextlib
import ctypes
import functools
from collections import Counter

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CPU, FOREIGN = 1, 12  # kDLCPU and kDLExtDev of DLPack
COPIES = ("_to_copy", "copy_", "_copy_from")  # the operations that may see two devices
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")  # and indices may lie on the CPU: they are moved
WAITS = {  # operations that hold the program until a GPU is done: their result, or its size, is needed by the CPU
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "unique_dim_consecutive", "equal", "is_nonzero", "bincount",
}
waits: Counter = Counter()  # what was waited for, by operation, since the last `counted`
calls: Counter = Counter()  # operations that ran on the device
no_double = [False]  # True: the device has no float64, like mps


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("number", ctypes.c_int32)]


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device", _Device)]


_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _relabel(tensor: torch.Tensor, kind: int) -> torch.Tensor:
    "The same memory as a tensor of the other device."
    if kind == FOREIGN and tensor.dtype == torch.float64 and no_double[0]:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    capsule = torch._C._to_dlpack(tensor)
    address = _pointer(capsule, b"dltensor")
    ctypes.cast(address, ctypes.POINTER(_Tensor)).contents.device.type = kind
    return torch._C._from_dlpack(capsule)


def _is_fake(value) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "fake"


def _name(op) -> str:
    return op._schema.name.removeprefix("aten::")


def _check(op, tensors: list[torch.Tensor]) -> None:
    "One device for all, as on CUDA: only single numbers of the CPU may take part, and indices, which cost a wait."
    left = [t for t in tensors if not _is_fake(t) and t.dim() > 0]
    if left and _name(op) in INDEXED and _is_fake(tensors[0]):
        waits["copy to device"] += 1
    elif left and _name(op) not in COPIES and any(map(_is_fake, tensors)):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found fake:0 and {left[0].device} in {op}"
        )


def _count(op, args: list) -> None:
    "Note what a GPU would be waited for."
    name, tensors = _name(op), [a for a in args if isinstance(a, torch.Tensor)]
    calls[name] += 1
    put = (
        name == "_index_put_impl_" and any(t.dtype == torch.bool for t in tensors[1:-1]) and tensors[-1].numel() != 1
    )  # one value: masked_fill
    slow = name == "_grouped_mm" and tensors[0].dtype != torch.bfloat16  # a loop, which has to know the sizes of groups
    if name in WAITS or put or slow or name == "repeat_interleave":
        waits[name] += 1


def _fallback(op, *args, **kwargs):
    "Any operation on the device: the CPU's, on the same memory."
    values, spec = tree_flatten((args, kwargs))
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    _check(op, tensors)
    target = kwargs.get("device")
    if _name(op) in COPIES:
        return _copy(op, *args, **kwargs)
    if op is torch.ops.aten.set_.source_Tensor:  # how parametrizations (LoRA of the experts) put a tensor in place
        args[0].data = args[1]
        return args[0]
    _count(op, values)
    raw = [
        _relabel(v, CPU) if _is_fake(v) else torch.device("cpu") if isinstance(v, torch.device) else v for v in values
    ]
    known = {id(r): v for r, v in zip(raw, values, strict=True) if isinstance(r, torch.Tensor)}
    raw_args, raw_kwargs = tree_unflatten(raw, spec)
    raw_args = [
        torch.tensor(v) if str(a.type) == "Tensor" and isinstance(v, (bool, int, float)) else v
        for v, a in zip(raw_args, op._schema.arguments)
    ]
    sized = {a.name: kwargs[a.name] for a in op._schema.arguments if a.is_out and _is_fake(kwargs.get(a.name))}
    raw_kwargs |= {
        name: torch.empty(0, dtype=given.dtype) for name, given in sized.items()
    }  # borrowed memory cannot grow
    out = op(*raw_args, **raw_kwargs)
    if sized:
        for name, given in sized.items():
            made = raw_kwargs[name]
            if given.shape == made.shape:
                _relabel(given, CPU).copy_(made)
            else:
                given.data = _relabel(made, FOREIGN)
        return given if len(sized) == 1 else tuple(sized.values())
    to_fake = any(map(_is_fake, tensors)) if target is None else torch.device(target).type == "fake"

    def back(value):
        if not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else _relabel(value, FOREIGN) if to_fake else value

    if _name(op) in ("resize_", "set_"):
        raise NotImplementedError(f"{op} on the fake device")
    return tree_map(back, out)


def _count_copy(from_fake: bool, to_fake: bool, blocking: bool) -> None:
    "A copy to the CPU waits; one to the device does, too, unless it is asked not to (`non_blocking`)."
    if from_fake and not to_fake:
        waits["copy to cpu"] += 1
    if to_fake and not from_fake and blocking:
        waits["copy to device"] += 1


def _copy(op, *args, **kwargs):
    "Between the devices."
    if _name(op) != "_to_copy":
        target, source = args[:2] if _name(op) == "copy_" else args[1::-1]
        blocking = not (kwargs.get("non_blocking") or True in args[2:])
        _count_copy(_is_fake(source), _is_fake(target), blocking)
        (_relabel(target, CPU) if _is_fake(target) else target).copy_(
            _relabel(source, CPU) if _is_fake(source) else source
        )
        return target
    source, target = args[0], kwargs.pop("device", None)
    target = source.device if target is None else torch.device(target)
    calls["_to_copy"] += 1
    _count_copy(_is_fake(source), target.type == "fake", not kwargs.get("non_blocking"))
    out = op(_relabel(source, CPU) if _is_fake(source) else source, **kwargs | {"device": torch.device("cpu")})
    return _relabel(out, FOREIGN) if target.type == "fake" else out


def _convolution_backward(grad, rows, weight, *settings):
    "The gradients of a convolution: of its input, its weight and, if asked for, its bias."
    sizes = [weight.shape[1] * settings[5] if settings[3] else weight.shape[0]]
    return _fallback(torch.ops.aten.convolution_backward.default, grad, rows, weight, sizes, *settings)


def _low(op, *args, **kwargs):
    "What autocast does to matrix products."
    dtype = torch.get_autocast_dtype("fake")

    def cast(value):
        return (
            value.to(dtype)
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
            else value
        )

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return op(*tree_map(cast, args), **tree_map(cast, kwargs))


def _copied(tensor: torch.Tensor, memo: dict):
    "`copy.deepcopy` of a tensor: torch would copy the memory, which is not the tensor's own."
    if not _is_fake(tensor):
        return _plain_copy(tensor, memo)
    if id(tensor) not in memo:
        memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]


_libraries: list = []
_plain_copy = torch.Tensor.__deepcopy__


def possible() -> bool:
    "Whether this torch takes a device that is written in Python."
    return hasattr(torch._C, "_acc")


def start() -> torch.device:
    "Make the device known to torch, once in a process."
    if not _libraries:
        from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

        class Module(_DummyBackendModule):
            def get_amp_supported_dtype(self):
                return [torch.bfloat16, torch.float16]

        _setup_privateuseone_for_python_backend("fake", backend_module=Module())
        library = torch.library.Library("_", "IMPL")
        library.fallback(_fallback, "PrivateUse1")
        makers = torch.library.Library(
            "aten", "IMPL"
        )  # torch would make these by resizing, which borrowed memory does not allow
        for name in (
            "arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m", "randperm", "randperm.generator",
        ):
            packet, _, overload = name.partition(".")
            makers.impl(
                name, functools.partial(_fallback, getattr(getattr(torch.ops.aten, packet), overload or "default")),
                "PrivateUse1",
            )
        makers.impl("_grouped_mm", functools.partial(_fallback, torch.ops.aten._grouped_mm.default), "PrivateUse1")
        makers.impl(
            "convolution_overrideable", functools.partial(_fallback, torch.ops.aten.convolution.default), "PrivateUse1"
        )
        makers.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
        library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        for name in ("linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention"):
            makers.impl(name, functools.partial(_low, getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")
        torch.Tensor.__deepcopy__ = _copied
        _libraries.extend([library, makers])
    return torch.device("fake")


@contextlib.contextmanager
def counted():
    "Yield the Counter of waits in the block."
    waits.clear()
    calls.clear()
    yield waits
