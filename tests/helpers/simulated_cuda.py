"""
A CUDA device for machines without one: Python sees "cuda:0", the values are computed on the CPU.

A :class:`SimulatedTensor` is a meta tensor with CUDA's dispatch keys that holds a CPU tensor. While
a :class:`SimulatedCuda` runs, it sees every operator below autograd and autocast, and

* runs it on the CPU tensors, so losses and gradients equal the CPU's bit for bit;
* raises where CUDA would: devices that do not fit, ``numpy()``, a CPU tensor indexed by a CUDA one;
* notes an :class:`Event` for each time the host would wait for the device;
* follows ``torch.autocast("cuda")``: its lists of operators, and float16 that is computed as such;
* with ``track_memory`` counts the bytes that are alive, also for tensors that have no values
  (:meth:`SimulatedCuda.empty`).

Copies to the device count as a wait, unless they are non-blocking and come from pinned memory:
PyTorch waits for all others.

What it cannot show: the rounding of CUDA's kernels and their order of summation, races between
streams, kernels that do not exist for a type, workspaces of cuDNN, fragmentation, and speed.
"""

import contextlib
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision  # noqa: F401  registers its operators
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

DEVICE = torch.device("cuda", 0)
BLOCK = 512  # PyTorch's allocator rounds up to multiples of so many bytes
aten, vision = torch.ops.aten, torch.ops.torchvision

WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "boolean index",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten.bincount.default: "bincount",
    aten.equal.default: "equal",
    vision.nms.default: "nms",
}
INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default}
INDEXING |= {aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten._to_copy.default, aten.copy.default, aten.copy_.default}

# What autocast does to an operator on CUDA: torch/csrc has these lists in autocast_mode.h
LOW_PRECISION = """conv1d conv2d conv3d conv_transpose1d conv_transpose2d.input
conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm mv linear addbmm baddbmm
bmm chain_matmul linalg_multi_dot linalg_vecdot"""
FLOAT32 = """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan
pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm group_norm
cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss
kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss
soft_margin_loss triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist
cdist renorm logsumexp upsample_nearest1d upsample_nearest2d upsample_nearest2d.vec
upsample_bilinear2d upsample_bilinear2d.vec prod prod.dim_int softmax.int log_softmax.int cumprod
cumsum linalg_vector_norm sum sum.dim_IntList"""
WIDEST = """addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put scatter_add cat
stack"""


class Event(NamedTuple):
    """One wait of the host: its kind, the operator, and the innermost line of a project's code."""

    kind: str
    operator: str
    place: str  # "msrcnn_d2/modeling/roi_heads.py:12 function", or of Detectron2, or elsewhere


class SimulatedTensor(torch.Tensor):
    """A tensor that says that it is on "cuda:0"; its values are in :attr:`value`, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def get_device(self):
        return DEVICE.index

    def cuda(self, *args, **kwargs):
        return self

    @staticmethod
    def __new__(cls, value: torch.Tensor):
        shape = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
        self = torch.Tensor._make_subclass(cls, shape, False, device_for_backend_keys=DEVICE)
        self.value = value
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if SimulatedCuda.active is None:
            raise RuntimeError(f"{func} on a simulated tensor, but no simulation runs")
        with SimulatedCuda.active:  # it is not on in the threads of backward
            return func(*args, **(kwargs or {}))

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def tolist(self):
        return self.cpu().tolist()

    def cpu(self, *args, **kwargs):
        return self.to("cpu")

    def to(self, *args, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            device, dtype, layout = args[0].device, args[0].dtype, None
        else:
            known = {k: v for k, v in kwargs.items() if k != "copy"}
            device, dtype, _, layout = torch._C._nn._parse_to(*args, **known)
        stays = (device is None or device.type == "cuda") and dtype in (None, self.dtype)
        if stays and layout is None and not kwargs.get("copy"):
            return self
        return super().to(*args, **kwargs)

    def __repr__(self, **kwargs):
        return f"simulated {self.value}"

    def __reduce_ex__(self, protocol):
        return self.value.detach().clone().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            new = SimulatedTensor(self.value.clone())
            if getattr(self, "_is_param", False):
                new = torch.nn.Parameter(new, self.requires_grad)
            memo[id(self)] = new.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def data_ptr(self):
        return self.value.data_ptr()


class _WithIndex(TorchFunctionMode):
    """ "cuda" becomes "cuda:0": PyTorch would ask the driver which one is meant."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args = tuple(map(_with_index, args))
        return func(*args, **{k: _with_index(v) for k, v in (kwargs or {}).items()})


def _with_index(x):
    return DEVICE if isinstance(x, (str, torch.device)) and str(x) == "cuda" else x


class SimulatedCuda(TorchDispatchMode):
    """
    The device. ``with SimulatedCuda().running() as device:`` makes "cuda" work inside the block.

    Attributes:
        events: a list of :class:`Event`, in order; clear it to count anew.
        live, peak: bytes that are, and at most were, allocated (with `track_memory`).
        on_operator: called with the operator and its result on the CPU, after each operator.
    """

    active: "SimulatedCuda | None" = None

    def __init__(self, track_memory: bool = False):
        super().__init__()
        self.events: list[Event] = []
        self.track_memory = track_memory
        self.live = self.peak = 0
        self.on_operator = None
        self._storages: set[int] = set()

    @contextlib.contextmanager
    def running(self) -> Iterator["SimulatedCuda"]:
        """In this block "cuda" is the simulated device; outside its tensors cannot be used."""
        replaced = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "_lazy_init": lambda: None,
            "device_count": lambda: 1,
            "current_device": lambda: DEVICE.index,
            "set_device": lambda device: None,
            "get_device_name": lambda *args: "simulated",
            "get_device_capability": lambda *args: (9, 0),
            "synchronize": lambda *args: self.wait("synchronize", "torch.cuda.synchronize"),
            "max_memory_allocated": lambda *args: self.peak,
            "memory_allocated": lambda *args: self.live,
            "reset_peak_memory_stats": lambda *args: None,
            "empty_cache": lambda: None,
            "manual_seed": lambda seed: None,
            "manual_seed_all": lambda seed: None,
        }
        future = torch.__future__
        previous, saved = SimulatedCuda.active, {k: getattr(torch.cuda, k) for k in replaced}
        overwrite = future.get_overwrite_module_params_on_conversion()
        lift = torch._C._only_lift_cpu_tensors()
        torch._C._ensureCUDADeviceGuardSet()
        libraries = _autocast()
        try:
            SimulatedCuda.active = self
            for name, function in replaced.items():
                setattr(torch.cuda, name, function)
            future.set_overwrite_module_params_on_conversion(True)
            torch._C._set_only_lift_cpu_tensors(True)
            with _WithIndex(), self:
                yield self
        finally:
            SimulatedCuda.active = previous
            for name, function in saved.items():
                setattr(torch.cuda, name, function)
            future.set_overwrite_module_params_on_conversion(overwrite)
            torch._C._set_only_lift_cpu_tensors(lift)
            for library in libraries:
                library._destroy()

    def empty(self, *size: int, dtype=torch.float32) -> SimulatedTensor:
        """A tensor without values, for the memory of a model at full size."""
        with no_dispatch():
            value = torch.empty(*size, dtype=dtype, device="meta")
        self._allocated(value)
        return SimulatedTensor(value)

    def wait(self, kind: str, operator) -> None:
        self.events.append(Event(kind, str(operator), place()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        flat, spec = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        held = {id(x.value): x for x in tensors if isinstance(x, SimulatedTensor)}
        target = kwargs.get("device")
        # "meta": what C++ sees as the device of a simulated tensor in `x.to(other)`
        on_device = torch.device(target).type in ("cuda", "meta") if target else bool(held)
        if not held and not on_device:
            return func(*args, **kwargs)
        if held and any(not isinstance(x, SimulatedTensor) for x in tensors):
            _refuse(func, args, tensors)
        self._note_waits(func, args, kwargs, bool(held), on_device)

        if target is not None:
            without_values = on_device and any(x.value.is_meta for x in held.values())
            kwargs["device"] = torch.device("meta" if without_values else "cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        flat, spec = tree_flatten((args, kwargs))
        values = [x.value if isinstance(x, SimulatedTensor) else x for x in flat]
        plain_args, plain_kwargs = tree_unflatten(values, spec)
        out = func(*plain_args, **plain_kwargs)
        if self.on_operator is not None:
            self.on_operator(func, out)
        if args and isinstance(args[0], torch.Tensor) and _returns_its_first(func):
            if torch.Tag.inplace_view in func.tags and isinstance(args[0], SimulatedTensor):
                with no_dispatch():
                    size, stride = args[0].value.size(), args[0].value.stride()
                    aten.as_strided_.default(args[0], size, stride, 0)
            return args[0]
        if not on_device:
            return out
        return tree_map(lambda x: self._wrap(x, held) if isinstance(x, torch.Tensor) else x, out)

    def _wrap(self, value, held):
        if id(value) in held:
            return held[id(value)]
        self._allocated(value)
        return SimulatedTensor(value)

    def _note_waits(self, func, args, kwargs, from_device, on_device):
        if func is aten._to_copy.default and from_device != on_device:
            if from_device:
                self.wait("copy to host", func)
            elif not (kwargs.get("non_blocking") and args[0].is_pinned()):
                self.wait("copy to device", func)
        elif func is aten.copy_.default:
            to_device, from_device = (isinstance(x, SimulatedTensor) for x in args[:2])
            if to_device != from_device:
                self.wait("copy to device" if to_device else "copy to host", func)
        elif func in WAITS and from_device:
            self.wait(WAITS[func], func)
        elif func in INDEXING and isinstance(args[0], SimulatedTensor):
            for index in args[1]:
                if index is None:
                    continue
                if not isinstance(index, SimulatedTensor):
                    self.wait("copy to device", func)
                if index.dtype in (torch.bool, torch.uint8):
                    self.wait("boolean index", func)

    def _allocated(self, value):
        if not self.track_memory:
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self._storages.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key, size):
        self._storages.discard(key)
        self.live -= size


def _returns_its_first(func) -> bool:
    """Whether an operator writes into its first argument and returns it."""
    returns, arguments = func._schema.returns, func._schema.arguments
    first = arguments[0].alias_info if arguments else None
    aliased = len(returns) == 1 and returns[0].alias_info is not None
    return bool(first and first.is_write and aliased)


def _refuse(func, args, tensors) -> None:
    """Raise where CUDA refuses a CPU tensor beside one of its own."""
    if func in COPIES:
        return
    if func in INDEXING:
        if not isinstance(args[0], SimulatedTensor):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        others = [x for x in args[2:3] if not isinstance(x, SimulatedTensor)]  # the values to put
    else:
        others = [x for x in tensors if not isinstance(x, SimulatedTensor)]
        if func._schema.is_mutable and not isinstance(args[0], SimulatedTensor):
            raise RuntimeError(f"{func} writes values of cuda:0 into a tensor on the cpu")
    if any(x.dim() > 0 for x in others):  # a CPU tensor without dimensions is taken as a number
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
            f"and cpu! ({func})"
        )


def place() -> str:
    """The innermost line of msrcnn_d2 or Detectron2 that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        for package in ("msrcnn_d2", "detectron2"):
            if package in path.parts[:-1]:
                last = len(path.parts) - 1 - path.parts[::-1].index(package)
                name = "/".join(path.parts[last:])
                return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def _autocast() -> list[torch.library.Library]:
    """Autocast for simulated tensors: PyTorch's own kernels see "meta" and do nothing."""
    libraries = [torch.library.Library(name, "IMPL") for name in ("aten", "torchvision")]
    lists = (
        (LOW_PRECISION, lambda dtypes: torch.get_autocast_dtype("cuda")),
        (FLOAT32, _float32),
        (WIDEST, lambda dtypes: torch.float32 if torch.float32 in dtypes else None),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these replace kernels, on purpose
        for name, types in [(name, types) for names, types in lists for name in names.split()]:
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(aten, packet), overload or "default")
            _register(libraries[0], operator, types)
        _register(libraries[1], vision.nms.default, _float32)
        _register(libraries[1], vision.roi_align.default, _float32, keeps_type=True)
    return libraries


def _register(library, operator, types, keeps_type=False):
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

    def kernel(*args, **kwargs):
        given, dtype_before = (args, kwargs), args[0].dtype if keeps_type else None
        with torch._C._ExcludeDispatchKeyGuard(key):
            dtype = types([x.dtype for x in tree_leaves(given) if _is_cast(x)])
            args, kwargs = tree_map(lambda x: x.to(dtype or x.dtype) if _is_cast(x) else x, given)
            out = operator(*args, **kwargs)
            return out.to(dtype_before) if keeps_type else out

    library.impl(operator, kernel, "AutocastCUDA", allow_override=True)


def _is_cast(x) -> bool:
    is_simulated = isinstance(x, SimulatedTensor)
    return is_simulated and x.is_floating_point() and x.dtype != torch.float64


def _float32(dtypes):
    return torch.float32
