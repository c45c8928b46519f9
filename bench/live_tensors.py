"""The bytes of all live tensors of a process, at most, by phase: for bench/memory.py and the test of the memory law."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RESIZE, FROM_FILE = torch.UntypedStorage.resize_, torch.UntypedStorage.from_file
REGISTER = torch.nn.Module.register_parameter


class LiveTensors(TorchDispatchMode):
    """A dispatch mode that knows the bytes of all live storages; `peaks` by `phase`, which its user sets.

    It sees what goes through torch's dispatcher on this thread, which is everything but buffers inside gloo and DeepSpeed's
    shared memory. Tensors that are mapped from a file count once they are a parameter of a module.
    """

    def __init__(self):
        super().__init__()
        self.phase, self.peaks, self._total = "", {}, 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}  # by address: (itself, bytes that count)
        self._files: list[tuple[StorageWeakRef, int, int]] = []  # mapped: all of a file, its first and last address

    def __enter__(self):
        """FSDP2 frees and allocates by resizing storages; safetensors maps files: neither is dispatched."""
        torch.UntypedStorage.resize_ = lambda storage, size: self._resize(storage, size)
        torch.UntypedStorage.from_file = lambda *args, **kwargs: self._map(*args, **kwargs)
        torch.nn.Module.register_parameter = lambda *args: self._register(*args)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.UntypedStorage.resize_, torch.UntypedStorage.from_file = RESIZE, FROM_FILE
        torch.nn.Module.register_parameter = REGISTER

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # comes again as what DTensor makes of it
        result = function(*args, **(kwargs or {}))
        for found in tree_leaves((args, kwargs, result)):
            self._add_tensor(found)
        self.note()
        return result

    def _resize(self, storage, size):
        found = RESIZE(storage, size)
        self._add(storage)
        self.note()
        return found

    def _map(self, *args, **kwargs):
        storage = FROM_FILE(*args, **kwargs)
        start = storage.data_ptr()
        self._files.append((StorageWeakRef(storage), start, start + storage.nbytes()))
        return storage

    def _register(self, module, name, parameter):
        REGISTER(module, name, parameter)
        self._add_tensor(parameter, always=True)
        self.note()

    def _add_tensor(self, found, always: bool = False) -> None:
        if type(found) in (torch.Tensor, torch.nn.Parameter) and found.layout == torch.strided:
            if found.device.type != "meta":
                self._add(found.untyped_storage(), always)

    def _add(self, storage, always: bool = False) -> None:
        counts = storage.nbytes() if always or not self._is_mapped(storage) else 0
        known, before = self._storages.get(storage._cdata, (None, 0))
        if known is None:
            known = StorageWeakRef(storage)  # as long as it is there, the address is not given to another one
        elif always or before:
            counts = storage.nbytes()
        self._total += counts - before
        self._storages[storage._cdata] = known, counts

    def _is_mapped(self, storage) -> bool:
        address = storage.data_ptr()
        return any(low <= address < high and not file.expired() for file, low, high in self._files)

    def note(self) -> None:
        if self._total > self.peaks.get(self.phase, -1):
            self._forget_freed()
            self.peaks[self.phase] = max(self._total, self.peaks.get(self.phase, 0))

    def _forget_freed(self) -> None:
        for address, (storage, size) in list(self._storages.items()):
            if storage.expired():
                self._total -= size
                del self._storages[address]
