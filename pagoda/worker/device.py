"""A device that computes in a stream of its own: what the GPU loop asks of one, and the two there are.

    Cuda   a GPU through torch
    Null   the same code on torch tensors in host memory, with Triton's interpreter for kernels: a "graph" is the captured
           function called again, an event is over when it is recorded. It computes what a GPU would, so the whole path is
           tested where there is none. With `computes=False` kernels are not even started: what is left is the host's cost.

torch is imported here and in `kernels/triton`, nowhere else on the way to a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from pagoda.base.errors import ConfigError, OutOfMemory
from pagoda.base.hardware import GpuFacts
from pagoda.kernels import table
from pagoda.kernels.weight import GgmlRows

__all__ = ["Cuda", "Device", "DevicePlace", "Event", "Memory", "Null", "Pinned", "memory_bandwidth", "memory_errors", "open_device", "read_gpu"]

Array = Any
TYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
    "int64": torch.int64,
}
_MIN_CAPABILITY = 80  # bfloat16 and asynchronous copies to shared memory


@dataclass(frozen=True)
class Memory:
    """Bytes. `used` is by this process's tensors; `free` is what the device could still give, to any process."""

    total: int
    free: int
    used: int


class Event(Protocol):
    def record(self) -> None: ...

    def wait(self) -> None:
        """Until everything before `record` is done."""


class Pinned:
    """Host memory that copies to and from the device can use while the host goes on. `host` is its numpy view."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.host: np.ndarray = tensor.numpy()


class Device(Protocol):
    """Everything is asynchronous but `upload`, `download` and `Event.wait`."""

    name: str
    torch_device: Any
    compiles: bool  # a kernel takes its time when it is started for the first time

    def empty(self, shape: Sequence[int] | int, dtype: str) -> Array: ...

    def zeros(self, shape: Sequence[int] | int, dtype: str) -> Array: ...

    def upload(self, array: np.ndarray) -> Array:
        """A copy on the device; waits for it."""

    def download(self, array: Array) -> np.ndarray:
        """A copy on the host; waits for it."""

    def pinned(self, shape: Sequence[int] | int, dtype: str) -> Pinned: ...

    def copy(self, target: Array, source: Array) -> None:
        """Either may be pinned memory."""

    def event(self) -> Event: ...

    def capture(self, function: Callable[[], Array]) -> Callable[[], Array]:
        """Records what `function` starts on the device, to be started again by one call: at the same addresses, with the
        same shapes. The result is where the function left it."""

    def running(self) -> Any:
        """A context: inside it ops on this device's arrays use the kernels of a GPU."""

    def beside(self) -> Any:
        """As `running`, in a second stream: what is started inside runs beside what was started there. Nothing orders the two."""

    def synchronize(self) -> None: ...

    def memory(self) -> Memory: ...

    def charge(self, nbytes: int) -> None:
        """About so much is about to be allocated by others' code: a null device counts it."""

    def peak_of(self, function: Callable[[], None]) -> int:
        """Runs it -> the most bytes it needed beside those in use before. A null device counts none, and does not run it."""


class Cuda:
    """The current GPU of this process."""

    compiles = True

    def __init__(self, index: int = 0) -> None:
        self.name = torch.cuda.get_device_name(index)
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self._stream = torch.cuda.Stream(self.torch_device)
        self._beside = torch.cuda.Stream(self.torch_device, priority=-1)  # a few short kernels that somebody waits for
        self._pool = torch.cuda.graph_pool_handle()

    def empty(self, shape: Sequence[int] | int, dtype: str) -> Array:
        return torch.empty(shape, dtype=TYPES[dtype], device=self.torch_device)

    def zeros(self, shape: Sequence[int] | int, dtype: str) -> Array:
        return torch.zeros(shape, dtype=TYPES[dtype], device=self.torch_device)

    def upload(self, array: np.ndarray) -> Array:
        return _tensor(array).to(self.torch_device)

    def download(self, array: Array) -> np.ndarray:
        return _numpy(array.cpu())

    def pinned(self, shape: Sequence[int] | int, dtype: str) -> Pinned:
        return Pinned(torch.zeros(shape, dtype=TYPES[dtype], pin_memory=True))

    def copy(self, target: Array, source: Array) -> None:
        target.copy_(source, non_blocking=True)

    def event(self) -> Event:
        return _CudaEvent()

    def capture(self, function: Callable[[], Array]) -> Callable[[], Array]:
        function()  # compiles kernels and lets the libraries set themselves up, which cannot be captured
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        # other threads of this process may use the device meanwhile: only this thread's calls must be such that can be captured
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = function()

        def replay() -> Array:
            graph.replay()
            return result

        return replay

    @contextmanager
    def running(self) -> Iterator[None]:
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def beside(self) -> Iterator[None]:
        with torch.inference_mode(), torch.cuda.stream(self._beside):
            yield

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def memory(self) -> Memory:
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return Memory(total, free, torch.cuda.memory_allocated(self.torch_device))

    def charge(self, nbytes: int) -> None:
        """torch counts by itself."""

    def peak_of(self, function: Callable[[], None]) -> int:
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        before = torch.cuda.memory_allocated(self.torch_device)
        function()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated(self.torch_device) - before
        torch.cuda.empty_cache()
        return max(0, peak)


class _CudaEvent:
    def __init__(self) -> None:
        self._event = torch.cuda.Event()

    def record(self) -> None:
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()


class Null:
    """`total` is how much memory it says it has; what is used is counted where it is allocated."""

    name = "null device"
    torch_device = torch.device("cpu")
    compiles = False

    def __init__(self, *, computes: bool = True, total: int = 8 << 30) -> None:
        if computes:
            _require_interpreter()
        self._computes, self._total = computes, total
        self._used = 0

    def empty(self, shape: Sequence[int] | int, dtype: str) -> Array:
        return self.zeros(shape, dtype)

    def zeros(self, shape: Sequence[int] | int, dtype: str) -> Array:
        return self._count(torch.zeros(shape, dtype=TYPES[dtype]))

    def upload(self, array: np.ndarray) -> Array:
        return self._count(_tensor(array).clone())

    def download(self, array: Array) -> np.ndarray:
        return _numpy(array)

    def pinned(self, shape: Sequence[int] | int, dtype: str) -> Pinned:
        return Pinned(torch.zeros(shape, dtype=TYPES[dtype]))

    def copy(self, target: Array, source: Array) -> None:
        target.copy_(source)

    def event(self) -> Event:
        return _Done()

    def capture(self, function: Callable[[], Array]) -> Callable[[], Array]:
        return function

    @contextmanager
    def running(self) -> Iterator[None]:
        with torch.inference_mode(), table.backend("cuda"):
            yield

    @contextmanager
    def beside(self) -> Iterator[None]:
        with self.running():
            yield

    def synchronize(self) -> None:
        """Everything is done already."""

    def memory(self) -> Memory:
        return Memory(self._total, self._total - self._used, self._used)

    def charge(self, nbytes: int) -> None:
        if self._used + nbytes > self._total:
            raise torch.OutOfMemoryError(f"of {self._total} bytes {self._used} are used, and {nbytes} more are asked for")
        self._used += nbytes

    def peak_of(self, function: Callable[[], None]) -> int:
        return 0

    def _count(self, tensor: Any) -> Any:
        self.charge(int(tensor.nbytes))
        return tensor


class _Done:
    def record(self) -> None:
        """Nothing is under way."""

    def wait(self) -> None:
        """Nothing is under way."""


class DevicePlace:
    """Where a model's weights go: `loader.place.Place` on a device. Activations have the type `dtype`."""

    def __init__(self, device: Device, dtype: str, *, fixed_tiles: bool) -> None:
        self._device, self._dtype, self._fixed_tiles = device, dtype, fixed_tiles

    def weight(self, format: str, parts: Sequence[np.ndarray | GgmlRows]) -> Any:
        from pagoda.kernels.triton.weight import pack_for_device

        found = pack_for_device(format, parts, device=self._device.torch_device, dtype=TYPES[self._dtype], fixed_tiles=self._fixed_tiles)
        self._device.charge(found.nbytes)
        return found

    def vector(self, array: np.ndarray, *, is_addend: bool = False) -> Any:
        found = self._device.upload(np.ascontiguousarray(array))
        return found.to(TYPES[self._dtype]) if is_addend else found


@contextmanager
def memory_errors(what: str, remedy: str) -> Iterator[None]:
    """The device's own error of having no memory left, as ours: how much was missing, and what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"the device has no memory left for {what}: {str(error).splitlines()[0]}; {remedy}") from None


def open_device(kind: str) -> Device:
    """ "cuda" or "null"."""
    return Null() if kind == "null" else Cuda()


def memory_bandwidth(num_bytes: int = 4 << 30) -> float:
    """Bytes a second that the GPU's memory gives: the better of a copy (read and written) and a sum (read)."""
    found = _best_rate(num_bytes)
    torch.cuda.empty_cache()
    return found


def _best_rate(num_bytes: int) -> float:
    x = torch.ones(num_bytes // 4, dtype=torch.int32, device="cuda")
    y = torch.empty_like(x)
    return max(_rate(lambda: y.copy_(x), 2 * x.nbytes), _rate(lambda: x.sum(), x.nbytes))


def _rate(function: Callable[[], Any], num_bytes: int) -> float:
    times = []
    for _ in range(8):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3)
    return num_bytes / min(times[2:])


def read_gpu() -> GpuFacts | str:
    """What the GPU of this process is, or in one line why there is none that can be used."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for CPUs only; install one with CUDA (`pip install torch`)"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"CUDA does not start: {str(error).splitlines()[0]}; update the driver to one for CUDA {torch.version.cuda}, or use `--device cpu`"
    if torch.cuda.device_count() == 0:
        return "no GPU is visible to this process (CUDA_VISIBLE_DEVICES, nvidia-smi)"
    properties = torch.cuda.get_device_properties(0)
    capability = 10 * properties.major + properties.minor
    free, total = torch.cuda.mem_get_info(0)
    if torch.version.hip is None and capability < _MIN_CAPABILITY:
        return f"{properties.name} has compute capability {capability / 10}; kernels need 8.0 (Ampere) at least"
    return GpuFacts(name=properties.name, capability=capability, memory_total=total, memory_free=free)


def _require_interpreter() -> None:
    try:
        import triton
    except ImportError:
        raise ConfigError("`--device null` runs kernels in Triton's interpreter, and triton is not installed") from None
    if not triton.knobs.runtime.interpret:
        raise ConfigError("`--device null` is for tests: set TRITON_INTERPRET=1 before starting")


def _tensor(array: np.ndarray) -> Any:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _numpy(tensor: Any) -> np.ndarray:
    tensor = tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
    return np.array(tensor.numpy())
