"""A GPU of fake tensors: code for CUDA runs on a CPU build of torch, with shapes, dtypes and devices and without values.

Import this before torch. It compiles no_device.cpp (four seconds), loads it before torch looks for a device, and lets
`torch.cuda` describe one H200. Inside `fake_gpu()` tensors on "cuda" are torch's FakeTensors: an operation on two devices, or
one that is not defined for its dtypes, raises. What needs a value of a tensor on the GPU, for which a real one would be waited
for, is answered with ones and noted (`Waits`).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
NAME = "NVIDIA H200"


def _load_device() -> None:
    assert "torch" not in sys.modules, "it asks for devices when it is imported"
    home = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/no_device.so"
        subprocess.run(
            ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{home}/include", str(HERE / "no_device.cpp"), f"-L{home}/lib",
             "-lc10", "-ltorch_cpu", "-o", library], check=True,
        )  # fmt: skip
        for name in ("libc10.so", "libtorch_cpu.so"):
            ctypes.CDLL(str(home / "lib" / name), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(library)


_load_device()

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402

with contextlib.suppress(ImportError):  # with a device it would load kernels, which a CPU's build does not have
    import bitsandbytes  # noqa: F401

FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment, method-assign]
MODE = FakeTensorMode(allow_non_fake_inputs=True)
DEVICE = torch.device("cuda", 0)


def _describe_device() -> None:
    found = SimpleNamespace(name=NAME, total_memory=141 << 30, major=9, minor=0, multi_processor_count=132)
    stand_ins = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "set_device": lambda d: None,
        "get_device_capability": lambda d=None: (9, 0), "get_device_name": lambda d=None: NAME,
        "get_device_properties": lambda d=None: found, "is_bf16_supported": lambda including_emulation=True: True, "synchronize": lambda d=None: None,
        "max_memory_allocated": lambda d=None: 0, "memory_allocated": lambda d=None: 0, "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda d=None: None, "mem_get_info": lambda d=None: (141 << 30, 141 << 30),
        "is_initialized": lambda: True, "_lazy_init": lambda: None, "manual_seed_all": lambda s: None,
        "is_current_stream_capturing": lambda: False,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, _noted(name, stand_in))


CALLS: set[tuple[str, str]] = set()  # (function of torch.cuda, file of this project that has called it)


def _noted(name: str, stand_in):
    def noted(*args, **kwargs):
        caller = sys._getframe(1).f_code.co_filename
        if "/rlhf/" in caller:
            CALLS.add((f"torch.cuda.{name}", f"rlhf/{caller.rsplit('/rlhf/', 1)[1]}"))
        return stand_in(*args, **kwargs)

    return noted


_describe_device()


def fake(tensor: torch.Tensor, device=DEVICE) -> torch.Tensor:
    """A fake tensor like a real or fake one, on a device; a parameter stays one, with its attributes."""
    with MODE:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if not isinstance(tensor, torch.nn.Parameter):
        return made
    parameter = torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
    parameter.__dict__.update(vars(tensor))
    return parameter


def move(module: torch.nn.Module, device=DEVICE) -> torch.nn.Module:
    """In place of `Module.to`, which can't replace a real tensor by a fake one; tied parameters stay tied."""
    made: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor.device.type != device.type:
                    store[name] = made.setdefault(id(tensor), fake(tensor, device))
    return module


def _patch_to() -> None:
    original = torch.nn.Module.to

    def to(self, *args, **kwargs):
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cuda":
            move(self)
            return original(self, dtype) if dtype is not None else self
        return original(self, *args, **kwargs)

    torch.nn.Module.to = to  # type: ignore[assignment]
    torch.nn.Module.cuda = lambda self, device=None: move(self)  # type: ignore[assignment]


_patch_to()


def _patch_known() -> None:
    """A fake tensor can't become one of another class; a tensor without data can, and `Known` computes with `plain`."""
    from rlhf.packing.known import Known

    def of(plain, host, packed=None):
        with _disable_current_modes():
            found = torch.empty(plain.shape, dtype=plain.dtype, device="meta").as_subclass(Known)
        return found._keep(plain, host, packed)

    Known.of = staticmethod(of)  # type: ignore[method-assign]


_patch_known()

aten = torch.ops.aten
# What has a size, or a result on the CPU, that only the values tell.
VALUES = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
SIZES = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.repeat_interleave.Tensor}


INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


def _is_mask(index) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


def _as_numbers(index) -> list:
    """The integer indices that a mask stands for, if all of it is set."""
    if not _is_mask(index):
        return [index]
    return [torch.zeros(index.numel(), dtype=torch.int64, device=index.device) for _ in range(index.dim())]


class Waits(TorchDispatchMode):
    """Counts where a CPU would wait for the GPU, by the line of the code that asks.

    Attributes:
        found: "file:line function" -> times.
    """

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        fakes = [x for x in _tensors((args, list(kwargs.values()))) if isinstance(x, FakeTensor)]
        on_gpu = any(x.device.type == "cuda" for x in fakes)
        if func is aten._pin_memory.default:
            return args[0]
        if not fakes and _target(kwargs) != "cuda":  # on the CPU all is real
            with _disable_current_modes():
                return func(*args, **kwargs)
        if fakes and func in VALUES:
            if on_gpu:
                self.note(func)
            if func is aten.equal.default:
                return True
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else 1)
        if on_gpu and func in SIZES:
            self.note(func)
            raise NotImplementedError(f"{func}: its size depends on values; {self.line()}")
        if on_gpu and func is aten._to_copy.default and _target(kwargs) == "cpu":
            self.note(func)
            with _disable_current_modes():
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if on_gpu and func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self.note(func)
            with _disable_current_modes():
                return args[0].fill_(1)
        if on_gpu and func in INDEXED and any(_is_mask(i) for i in args[1]):
            self.note(func)
            args = (args[0], [part for i in args[1] for part in _as_numbers(i)], *args[2:])
        return func(*args, **kwargs)

    def note(self, func) -> None:
        self.found[f"{func.name().removeprefix('aten::')} {self.line()}"] += 1

    @staticmethod
    def line() -> str:
        """The innermost line that is not torch's own, nor of this file."""
        for frame in reversed(traceback.extract_stack()):
            path = frame.filename
            if "/torch/" not in path and Path(path).parent != HERE and "<" not in path:
                return f"{'/'.join(Path(path).parts[-2:])}:{frame.name}"
        return "?"


def _tensors(args):
    for x in args:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _target(kwargs) -> str | None:
    device = kwargs.get("device")
    return None if device is None else torch.device(device).type


@contextlib.contextmanager
def fake_gpu():
    """Inside the block new tensors are fake; yields the `Waits`."""
    waits = Waits()
    with MODE, waits:
        yield waits
