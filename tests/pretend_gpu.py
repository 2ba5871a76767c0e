"""A pretend GPU: a torch device that computes on the CPU but keeps the rules of CUDA, and counts.

What a CPU cannot show about code for a GPU is what CUDA refuses (operations that mix devices) and what costs time
there (every kernel launch, and every wait of the host for the device). This file registers a device named "pretend"
with torch. A tensor there is a Tensor whose `held` is a CPU tensor; every operation is computed on what is held.

Rules, those of CUDA:
- an operation takes tensors of one device. Excepted are a CPU tensor of 0 dimensions (it goes along as a number),
  copies, and CPU index tensors in x[index] (they are copied over, and the host waits). All else raises Refused;
- operators that only the CPU has (oneDNN, attention "for_cpu") and CPU random generators are refused as well;
- autocast casts what it casts on CUDA.

What is counted, by the line of this repository that asked for it (the innermost one outside of torch):
- a launch is one operator below autograd that is neither a view nor a mere allocation. On CUDA some operators launch
  several kernels (a sort, a cumulative sum, an indexed write), and elementwise ones over long lists of tensors too,
  so this is a lower bound that can be compared between versions of the code. A fused norm (rms_norm) and an attention
  (scaled_dot_product_attention, varlen_attn) count one each, whatever they are made of here;
- a wait is one operator after which the host cannot go on before the device has finished: a number or a copy brought
  to the host, a shape that depends on values (nonzero, a boolean index, unique ...), and a copy to the device that is
  not non_blocking (an index on the CPU is one).

    import pretend_gpu
    pretend_gpu.start()                        # once, and first of all; ends with pretend_gpu.leave()
    with pretend_gpu.counting() as tally:
        model.to("pretend")(row)
    tally.launches, tally.waits, tally.mixes   # Counters: (place, operator) -> how often

The back end behind this is experimental (torch.utils.backend_registration) and may abort the process when the
interpreter ends, so use it in a process of its own and end that with `leave`.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


class Refused(RuntimeError):
    """An operation that CUDA would refuse: its tensors lie on different devices, or it exists on the CPU only."""


# ---------------------------------------------------------------------------------------------------- what is counted


class Tally:
    """Launches, waits and mixes since it began, each a Counter of (place, operator); a place is "file.py:line"."""

    def __init__(self):
        self.launches, self.waits, self.mixes = Counter(), Counter(), Counter()

    def __sub__(self, other: "Tally") -> "Tally":
        """What came in between: the counts of this one that are more than those of an earlier copy."""
        between = Tally()
        between.launches, between.waits = self.launches - other.launches, self.waits - other.waits
        between.mixes = self.mixes - other.mixes
        return between

    def copy(self) -> "Tally":
        return self - Tally()


class State:
    """What the process is doing: the tallies that count, whether mixes are forgiven, and how deep we are within an
    operation that counts as one."""

    tallies: list[Tally] = []
    forgiving = False
    inside = 0


@contextmanager
def counting(forgiving: bool = False) -> Iterator[Tally]:
    """Count what happens in this block. forgiving: mixes of devices are only counted, and computed all the same."""
    tally, before = Tally(), State.forgiving
    State.tallies.append(tally)
    State.forgiving = forgiving or before
    try:
        yield tally
    finally:
        State.tallies.remove(tally)
        State.forgiving = before


def place() -> str:
    """The innermost line that is neither torch's nor this file's, as "file.py:line"; "elsewhere" if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and file.startswith(str(ROOT)) and "site-packages" not in file:
            return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def note(kind: str, operator: str) -> None:
    """Count one launch, wait or mix. Within an operation that counts as one, launches are not counted again."""
    if State.tallies and not (kind == "launches" and State.inside):
        key = place(), operator
        for tally in State.tallies:
            getattr(tally, kind)[key] += 1


# ---------------------------------------------------------------------------------------------------- the rules

ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"}
# The schemas of these do not say that they only give another view of the same memory.
VIEWS = {"_unsafe_view", "_reshape_alias", "lift_fresh", "alias", "detach"}
# The shape or the result of these is a value that the host has to read.
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "unique_dim", "unique_consecutive",
         "unique_dim_consecutive", "_unique", "_unique2", "bincount", "histc", "is_nonzero"}
COPIES = {"copy_", "_to_copy", "_copy_from", "copy"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


def name_of(operator) -> str:
    """The operator's name without its namespace and overload: "add" for aten::add.Tensor."""
    return operator._schema.name.rpartition("::")[2]


def is_pretend(value) -> bool:
    return isinstance(value, Pretend)


def on_cpu(value) -> bool:
    return isinstance(value, torch.Tensor) and not is_pretend(value) and value.device.type == "cpu"


def refuse(operator, what: str) -> None:
    """Raise Refused, or only count it."""
    note("mixes", str(operator))
    if not State.forgiving:
        raise Refused(f"{place()}: {operator}: {what}")


def check_devices(operator, args: tuple, kwargs: dict) -> None:
    """Refused for what CUDA refuses. CPU tensors that CUDA copies over by itself are counted as such."""
    name = name_of(operator)
    if "mkldnn" in str(operator) or name.endswith("_for_cpu"):
        refuse(operator, "only the CPU has this operator")
    if name.startswith("_varlen_attn") and args[0].dtype not in (torch.float16, torch.bfloat16):
        refuse(operator, f"no kernel for {args[0].dtype}")
    if name in COPIES:
        return
    copied = []
    if name in INDEXED and is_pretend(args[0]):  # args: self, indices, and the values to write, if it writes
        copied = [index for index in args[1] if on_cpu(index)]
        one_number = len(args) > 2 and on_cpu(args[2]) and not args[2].dim()
        if one_number and not fills_mask(name, args):
            copied.append(args[2])
    for _ in copied:
        note("launches", f"copy for {name}")
        note("waits", f"copy for {name}")
    for value in tree_flatten((args, kwargs))[0]:
        if on_cpu(value) and value.dim() and not any(value is tensor for tensor in copied):
            refuse(operator, f"a CPU tensor of shape {list(value.shape)} beside tensors on {NAME}")


def check_generator(operator, args: tuple, kwargs: dict) -> None:
    """Refused for random numbers on the device from a generator of the CPU."""
    for value in tree_flatten((args, kwargs))[0]:
        if isinstance(value, torch.Generator) and value.device.type == "cpu":
            refuse(operator, f"a random generator of the CPU for numbers on {NAME}")


def fills_mask(name: str, args: tuple) -> bool:
    """Whether x[mask] = number: CUDA then needs not know how many places the mask has."""
    if not name.startswith(("index_put", "_index_put")):
        return False
    indices = [index for index in args[1] if index is not None]
    return len(indices) == 1 and indices[0].dtype == torch.bool and args[2].numel() == 1


def is_launch(operator) -> bool:
    """Whether a GPU has something to compute: neither a view nor an allocation."""
    name = name_of(operator)
    if name in ALLOCATES or name in VIEWS or torch.Tag.inplace_view in operator.tags or operator.is_view:
        return False
    return True


def is_read(operator, args: tuple, kwargs: dict) -> bool:
    """Whether the host has to wait for a value or a shape, copies aside."""
    name = name_of(operator)
    if name == "repeat_interleave":  # with the size of the output given, nothing has to be read
        counts_are_known = kwargs.get("output_size") is not None
        return not counts_are_known
    if name in INDEXED:
        masks = [i for i in args[1] if isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)]
        return bool(masks) and not fills_mask(name, args)
    return name in READS


# ---------------------------------------------------------------------------------------------------- the tensors


class Pretend(torch.Tensor):
    """A tensor that says it lies on the device; `held` is the CPU tensor it stands for."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        shape = held.shape
        made = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(NAME, 0))
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Pretend({self.held})"

    def __reduce_ex__(self, protocol):
        """A copy in a file is read back on the CPU, as with map_location="cpu"; writing it, the host waits."""
        note("launches", "save")
        note("waits", "save")
        return self.held.__reduce_ex__(protocol)

    def tolist(self):
        note("launches", "tolist")
        note("waits", "tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return compute(operator, args, kwargs or {})  # in threads that the mode below does not reach


def held(value):
    return value.held if is_pretend(value) else value


def wrapped(value):
    return Pretend(value) if isinstance(value, torch.Tensor) and not is_pretend(value) else value


def compute(operator, args: tuple, kwargs: dict):
    """The operator on what its tensors hold; the result lies where CUDA would put it."""
    values = tree_flatten((args, kwargs))[0]
    asked = kwargs.get("device")
    asked = asked and torch.device(asked)
    here = any(is_pretend(value) for value in values)  # whether a tensor on the device takes part
    if not here and (asked is None or asked.type != NAME):
        return operator(*args, **kwargs)
    name = name_of(operator)
    check_generator(operator, args, kwargs)
    if here:
        check_devices(operator, args, kwargs)
        if is_read(operator, args, kwargs):
            note("waits", name)
    if is_launch(operator):
        note("launches", name)
    to_device = asked.type == NAME if asked else is_pretend(args[0]) if name == "copy_" else True
    if name in COPIES:
        source = args[1] if name == "copy_" else args[0]
        blocking = not kwargs.get("non_blocking") and not (name == "copy_" and len(args) > 2 and args[2])
        if not to_device or (blocking and on_cpu(source) and source.dim()):
            note("waits", f"{name} to the {'device' if to_device else 'host'}")
        if name == "copy_" and on_cpu(source) and not source.dim() and to_device:
            note("waits", f"{name} to the device")
    if asked:
        kwargs = {**kwargs, "device": CPU, "pin_memory": None} if "pin_memory" in kwargs else {**kwargs, "device": CPU}
    result = operator(*tree_map(held, args), **tree_map(held, kwargs))
    if not to_device:
        return args[0] if name == "copy_" else result
    result = return_and_correct_aliasing(operator, args, kwargs, tree_map(wrapped, result))
    for value in values:  # what an operator does to the shape of its argument must have reached the wrapper
        if is_pretend(value) and value.shape != value.held.shape:
            raise NotImplementedError(f"{place()}: {operator} changes a shape in place: not on {NAME}")
    return result


class Computing(TorchDispatchMode):
    """Sends to `compute` also the operators that none of our tensors takes part in: factories, and copies to here."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return compute(operator, args, kwargs or {})


ONE_KERNEL = {F.rms_norm: "rms_norm", torch.rms_norm: "rms_norm",
              F.scaled_dot_product_attention: "scaled_dot_product_attention"}


class Functions(TorchFunctionMode):
    """What differs from CUDA above the operators: functions that CUDA has one kernel for, but that come apart
    elsewhere, count one; x[index] = number makes its number on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.__setitem__ and is_pretend(args[0]) and isinstance(args[2], (bool, int, float)):
            return function(args[0], args[1], torch.tensor(args[2], dtype=args[0].dtype))
        if function not in ONE_KERNEL or not is_pretend(args[0]):
            return function(*args, **kwargs)
        note("launches", ONE_KERNEL[function])
        State.inside += 1
        try:
            return function(*args, **kwargs)
        finally:
            State.inside -= 1


# ---------------------------------------------------------------------------------------------------- the device


class Module:
    """What torch asks of `torch.pretend`."""

    _initialized = True  # torch.utils.checkpoint then keeps the random state of the device

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """The device draws its random numbers from the CPU's generator, which torch.manual_seed seeds."""

    @staticmethod
    @contextmanager
    def device(index: int) -> Iterator[None]:
        yield

    @staticmethod
    def get_rng_state(device=0) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device=0) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @staticmethod
    def synchronize(device=None) -> None:
        note("waits", "synchronize")


# What autocast does on CUDA, by ATen/autocast_mode.h: computed in the autocast type, ...
LOWERED = ("addmm", "mm", "bmm", "baddbmm", "matmul", "linear", "einsum", "linalg_vecdot", "mv",
           "scaled_dot_product_attention")
# ... in float32, ...
RAISED = ("exp", "expm1", "log", "log1p", "log2", "reciprocal", "rsqrt", "pow.Tensor_Scalar", "pow.Tensor_Tensor",
          "pow.Scalar", "rms_norm", "layer_norm", "native_layer_norm", "logsumexp", "softplus", "nll_loss")
# ... with a result in float32, ...
SUMMED = ("sum", "sum.dim_IntList", "cumsum", "cumprod", "prod", "softmax.int", "log_softmax.int")
# ... or in the widest type among the inputs.
WIDENED = ("addcmul", "addcdiv", "index_put", "scatter_add", "dot", "cat", "stack")


def cast(value, dtype: torch.dtype):
    """The value, if it is a tensor of floating-point numbers on the device, in the type; not from float64."""
    known = is_pretend(value) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if known and value.dtype != dtype else value


def autocast_kernel(operator, policy: str):
    """What autocast runs in place of the operator."""
    disabled = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(disabled):
            types = {v.dtype for v in tree_flatten((args, kwargs))[0] if is_pretend(v) and v.is_floating_point()}
            if policy == "summed":
                if is_pretend(args[0]) and args[0].dtype in (torch.float16, torch.bfloat16):
                    kwargs = {**kwargs, "dtype": kwargs.get("dtype") or torch.float32}
                return operator(*args, **kwargs)
            if policy == "lowered":
                dtype = torch.get_autocast_dtype(NAME)
            else:
                dtype = torch.float32 if policy == "raised" or torch.float32 in types else None
            if dtype is not None:
                args, kwargs = tree_map(lambda v: cast(v, dtype), (args, kwargs))
            return operator(*args, **kwargs)

    return kernel


libraries = []  # what is registered lives as long as these


def start() -> None:
    """Register the device, and from now on see every operation of this thread. To be called once."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    aten = torch.library.Library("aten", "IMPL")
    libraries.append(aten)

    # torch.tensor(values, device=...) and x[[1, 2]] make a CPU tensor and copy it behind the dispatch of Python.
    def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        return Pretend(torch.empty(size, dtype=dtype))

    def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
        return Pretend(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source, target, non_blocking=False):
        note("launches", "copy_")
        if not non_blocking or is_pretend(source):
            note("waits", f"copy_ to the {'device' if is_pretend(target) else 'host'}")
        held(target).copy_(held(source))
        return target

    aten.impl("empty.memory_format", empty, "PrivateUse1")
    aten.impl("empty_strided", empty_strided, "PrivateUse1")
    aten.impl("_copy_from", copy_from, "PrivateUse1")
    rest = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel)  # what has no policy is left alone
    libraries.append(rest)
    policies = {"lowered": LOWERED, "raised": RAISED, "summed": SUMMED, "widened": WIDENED}
    for policy, names in policies.items():
        for full in names:
            name, _, overload = full.partition(".")
            operator = getattr(getattr(torch.ops.aten, name), overload or "default")
            aten.impl(full, autocast_kernel(operator, policy), "AutocastPrivateUse1")

    _foreach_supported_types.append(Pretend)  # an exact list of types decides; on CUDA they are in it
    torch.autograd.set_multithreading_enabled(False)  # backward passes in this thread, where the modes are
    Functions().__enter__()
    Computing().__enter__()


def leave(status: int = 0) -> None:
    """End the process now: the interpreter's own end is not safe with this back end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
