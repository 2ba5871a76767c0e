"""A pretend GPU: a torch device that computes on the CPU but keeps the rules of CUDA, and counts.

A CPU does not show what CUDA refuses (operations that mix devices), nor what costs time there:
every launch of a kernel, and every wait of the host for the device. This file registers a device
named "pretend". A tensor there says that it is on CUDA (`is_cuda`), so that code takes its ways for
CUDA; its `held` is a CPU tensor, and every operator computes on what is held.

Rules, those of CUDA:
- an operator takes tensors of one device. Excepted are a CPU tensor without dimensions (it goes
  along as a number), copies, and CPU index tensors in x[index] (CUDA copies them over, and the host
  waits). All else raises Refused, as do random generators of the CPU for numbers of the device, and
  variable-length attention in float32;
- autocast casts as on CUDA, for the operators that this repository uses.

Counted, by the line of this repository that asked for it (the innermost one outside of torch):
- a launch is one operator below autograd that is neither a view nor a mere allocation: a lower
  bound, since some operators launch several kernels on CUDA. A fused norm and attention count one;
- a wait is one operator after which the host cannot go on before the device has finished: a number
  or a copy brought to the host, a shape that depends on values (nonzero, a boolean index, unique
  ...), and a copy to the device that is not non_blocking (an index on the CPU is one).

    import pretend_gpu
    pretend_gpu.start()                       # once, first of all, in a process of its own
    model.to("pretend")
    with pretend_gpu.counting() as tally:     # a Counter of (kind, "file.py:line", operator)
        model(row)
    pretend_gpu.total(tally, "waits")
    pretend_gpu.leave(0)                      # ends the process

The back end behind this (torch.utils.backend_registration) is experimental and may abort the process
when the interpreter ends: hence `leave`. A real card is hidden from the process, since torch takes
one accelerator at a time. Backward passes run in the thread that calls them. Not covered: several
ranks, streams, pinned memory, and what code does only where device.type is "cuda".
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._foreach_utils import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
HALF = (torch.float16, torch.bfloat16)
HERE = Path(__file__).resolve()
ROOT = f"{HERE.parent.parent}{os.sep}"


class Refused(RuntimeError):
    """An operation that CUDA would refuse."""


# ------------------------------------------------------------------------------ counting

tallies: list[Counter] = []  # those that count at the moment
fused = [0]  # how deep we are within an operation that counts as one launch


@contextmanager
def counting() -> Iterator[Counter]:
    """Count what happens in this block: (kind, place, operator), of the kind launches or waits."""
    tally = Counter()
    tallies.append(tally)
    try:
        yield tally
    finally:
        tallies.pop()


def total(tally: Counter, kind: str) -> int:
    """How many of the tally are of a kind."""
    return sum(count for (found, _, _), count in tally.items() if found == kind)


def place() -> str:
    """The innermost line that is neither torch's nor this file's, as file.py:line."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and file != str(HERE) and "site-packages" not in file:
            return f"{file.removeprefix(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def note(kind: str, operator: str) -> None:
    """Count one; no launch within what counts as one."""
    if not (kind == "launches" and fused[0]):
        for tally in tallies:
            tally[kind, place(), operator] += 1


# ------------------------------------------------------------------------------ the rules

# Neither these nor views give a GPU something to do (of the last three no schema says so).
FREE = "empty empty_like empty_strided new_empty new_empty_strided".split()
FREE += "_unsafe_view _reshape_alias is_same_size".split()
# The result of these, or its shape, is something that the host has to read.
READS = "_local_scalar_dense equal is_nonzero nonzero masked_select bincount _unique2".split()
READS += "unique_dim unique_consecutive repeat_interleave".split()
COPIES = ("copy_", "_to_copy")
INDEXES = "index index_put index_put_ _index_put_impl_".split()  # arguments: tensor, indices, ...


def name_of(operator) -> str:
    """The operator's name without its namespace and overload: "add" for aten::add.Tensor."""
    return operator._schema.name.rpartition("::")[2]


def on_cpu(value) -> bool:
    """Whether it is a CPU tensor that CUDA would not take for a number."""
    plain = isinstance(value, Tensor) and not isinstance(value, Pretend)
    return plain and value.device.type == "cpu" and value.dim() > 0


def refuse(operator, why: str) -> None:
    raise Refused(f"{place()}: {operator}: {why}")


def check(operator, name: str, args: tuple, kwargs: dict) -> None:
    """Refused for what CUDA refuses; CPU indices, which CUDA copies over by itself, are counted."""
    if name.startswith("_varlen_attn") and args[0].dtype not in HALF:
        refuse(operator, f"no kernel for {args[0].dtype}")
    indices = args[1] if name in INDEXES and isinstance(args[0], Pretend) else []
    for index in filter(on_cpu, indices):
        note("launches", f"copy for {name}")
        note("waits", f"copy for {name}")
    for value in _pytree.tree_leaves((args, kwargs)):
        if on_cpu(value) and not any(value is index for index in indices):
            refuse(operator, f"a CPU tensor of shape {list(value.shape)} beside those on {NAME}")


def count(operator, name: str, args: tuple, kwargs: dict) -> None:
    """Count the launch, and the wait for a value or a shape."""
    if not operator.is_view and name not in FREE:
        note("launches", name)
    masks = (torch.bool, torch.uint8)
    reads_shape = name in INDEXES and any(i is not None and i.dtype in masks for i in args[1])
    if reads_shape or name in READS and kwargs.get("output_size") is None:
        note("waits", name)


def count_copy(source, to_device: bool, non_blocking: bool) -> None:
    """Count the wait that a copy is: to the host always, to the device unless non_blocking."""
    if not to_device or not isinstance(source, Pretend) and not non_blocking:
        note("waits", "copy to the device" if to_device else "copy to the host")


# ------------------------------------------------------------------------------ the tensors


class Pretend(Tensor):
    """A tensor that says it lies on the device; `held` is the CPU tensor it stands for."""

    is_cuda = True

    @staticmethod
    def __new__(cls, held: Tensor):
        layout = dict(strides=held.stride(), storage_offset=held.storage_offset())
        how = dict(**layout, dtype=held.dtype, device=torch.device(NAME, 0))
        made = Tensor._make_wrapper_subclass(cls, held.shape, **how)
        made.held = held
        return made

    def tolist(self):
        return self.cpu().tolist()  # torch does not do that for tensors of another class

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return compute(operator, args, kwargs or {})  # in threads that `Operators` does not reach


def held(value):
    return value.held if isinstance(value, Pretend) else value


def wrapped(value):
    plain = isinstance(value, Tensor) and not isinstance(value, Pretend)
    return Pretend(value) if plain else value


def compute(operator, args: tuple, kwargs: dict):
    """The operator on what its tensors hold; the result lies where CUDA would put it."""
    takes_part = any(isinstance(x, Pretend) for x in _pytree.tree_leaves((args, kwargs)))
    asked = kwargs.get("device")
    to_device = takes_part if asked is None else torch.device(asked).type == NAME
    if not takes_part and not to_device:
        return operator(*args, **kwargs)  # all of it is on the CPU
    name = name_of(operator)
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        refuse(operator, f"a generator of the CPU for numbers on {NAME}")
    if takes_part and name not in COPIES:
        check(operator, name, args, kwargs)
    count(operator, name, args, kwargs)
    if name == "copy_":  # arguments: target, source, non_blocking
        to_device = isinstance(args[0], Pretend)
        count_copy(args[1], to_device, kwargs.get("non_blocking") or len(args) > 2 and args[2])
    elif name == "_to_copy":
        count_copy(args[0], to_device, kwargs.get("non_blocking"))

    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    held_args, held_kwargs = _pytree.tree_map(held, (args, kwargs))
    result = operator(*held_args, **held_kwargs)
    if not to_device:
        return args[0] if name == "copy_" else result
    result = _pytree.tree_map(wrapped, result)
    return return_and_correct_aliasing(operator, args, kwargs, result)


class Operators(TorchDispatchMode):
    """Sends every operator to `compute`, factories and copies to the device as well."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return compute(operator, args, kwargs or {})


def set_data(tensor: Tensor, data: Tensor) -> None:
    """tensor.data = data, also where that moves the tensor to the device, or from it."""
    if isinstance(tensor, Pretend) and isinstance(data, Pretend):
        tensor.held = data.held
        Tensor.data.__set__(tensor, data)
        return
    moved = data.detach()
    if isinstance(tensor, torch.nn.Parameter):
        moved = torch.nn.Parameter(moved)
    torch.utils.swap_tensors(tensor, moved.requires_grad_(tensor.requires_grad))


ONE_KERNEL = (F.rms_norm, torch.rms_norm, F.scaled_dot_product_attention)


class Functions(TorchFunctionMode):
    """What differs from CUDA above the operators: functions that CUDA has one kernel for come apart
    on other devices; x[index] = number makes a tensor of the number, on CUDA a CPU tensor; and
    x.data = y changes x without any operator."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is Tensor.__setitem__ and isinstance(args[0], Pretend):
            target, index, value = args
            if isinstance(value, (bool, int, float)):
                value = torch.tensor(value, dtype=target.dtype)
            return function(target, index, value)
        if function == Tensor.data.__set__ and any(isinstance(x, Pretend) for x in args):
            return set_data(*args)
        if function not in ONE_KERNEL or not isinstance(args[0], Pretend):
            return function(*args, **kwargs)
        note("launches", function.__name__)
        if function is F.scaled_dot_product_attention and not torch.is_grad_enabled():
            check(function, function.__name__, args, kwargs)
            return wrapped(function(*map(held, args), **kwargs))  # whose scores are float32
        fused[0] += 1
        try:
            return function(*args, **kwargs)
        finally:
            fused[0] -= 1


# ------------------------------------------------------------------------------ autocast

# What autocast does on CUDA (ATen/autocast_mode.h), of the operators that this repository uses
# within it and their neighbours: computed in the autocast type, in float32, or in the widest type
# among the inputs.
LOWERED = "linear matmul mm addmm bmm einsum scaled_dot_product_attention".split()
RAISED = "rms_norm layer_norm exp log rsqrt pow.Tensor_Scalar logsumexp sum softmax.int".split()
RAISED += "sum.dim_IntList log_softmax.int cumsum".split()
WIDENED = "addcmul cat stack index_put".split()


def autocast_kernel(operator, policy: list[str]):
    """What runs in place of an operator within autocast."""
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def is_cast(value) -> bool:
        return isinstance(value, Pretend) and value.dtype in (*HALF, torch.float32)

    def kernel(*args, **kwargs):
        target = torch.get_autocast_dtype(NAME) if policy is LOWERED else torch.float32
        found = {x.dtype for x in _pytree.tree_leaves((args, kwargs)) if is_cast(x)}
        keeps = policy is WIDENED and torch.float32 not in found
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            if not keeps:
                cast = lambda x: x.to(target) if is_cast(x) else x
                args, kwargs = _pytree.tree_map(cast, (args, kwargs))
            return operator(*args, **kwargs)

    return kernel


# ------------------------------------------------------------------------------ the device


class Module:
    """What torch asks of `torch.pretend`."""

    def is_available(self) -> bool:
        return False  # else torch.distributed.checkpoint would ask for streams

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return list(HALF)


libraries: list[torch.library.Library] = []  # what is registered lives as long as these


def start() -> None:
    """Hide any CUDA card, register the device, and from now on see every operation of this
    thread."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    if torch.cuda.is_available():
        raise RuntimeError("CUDA has started in this process: start the pretend GPU first of all")
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    aten = torch.library.Library("aten", "IMPL")
    others = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    libraries.extend([aten, others])
    others.fallback(torch.library.fallthrough_kernel)  # autocast leaves other operators alone
    for policy in (LOWERED, RAISED, WIDENED):
        for full_name in policy:
            name, _, overload = full_name.partition(".")
            operator = getattr(getattr(torch.ops.aten, name), overload or "default")
            aten.impl(full_name, autocast_kernel(operator, policy), "AutocastPrivateUse1")

    _foreach_supported_types.append(Pretend)  # a list of exact types, among them that of CUDA
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(values, device=...) copies them there
    torch.autograd.set_multithreading_enabled(False)
    Functions().__enter__()
    Operators().__enter__()


def leave(status: int) -> None:
    """End the process at once: the interpreter's own end is not safe with this back end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
