"""One CUDA device through PyCUDA: its context, one stream, memory that only grows, launches.

The context is the device's primary one, which torch uses too, so that torch's memory can be read in place. Knows
nothing of scores.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdss.backends._cuda import images, launches
from edge_sdss.backends._cuda.images import Target
from edge_sdss.errors import BackendUnavailable, BudgetExceeded, message

INTERPRETED = "interpreter"
"""In the name of a device that is none; results over it are stamped."""


def open_gpu(index: int = 0) -> Gpu:
    """Returns the device, always the same object; raises BackendUnavailable without PyCUDA, driver or device."""
    return _opened(index)


@cache
def _opened(index: int) -> Gpu:
    asked = "use backend 'cuda'"
    other = "choose --backend auto, torch or numpy"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyCUDA warns of what it then raises
            import pycuda.driver as driver
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name in ("pycuda", "pytools", "mako"):
            do = f"pip install 'edge_sdss[cuda]' where CUDA is, or {other}"
            raise BackendUnavailable(message(asked, f"{error.name} is not installed", do)) from error
        found = "there is no NVIDIA driver (libcuda) here, or PyCUDA was built for another"
        raise BackendUnavailable(message(asked, found, f"run `nvidia-smi` or rebuild PyCUDA, or {other}")) from error
    try:
        driver.init()
        count = driver.Device.count()
        if index >= count:
            found = f"the driver sees {count} devices, and no number {index}"
            raise BackendUnavailable(message(asked, found, other))
        return Gpu(driver, index)
    except driver.Error as error:
        do = f"check the driver with `nvidia-smi`, or {other}"
        raise BackendUnavailable(message(asked, f"the driver says: {error}", do)) from error


class Gpu:
    """A device with its primary context and one stream. Calls from several threads take turns."""

    def __init__(self, driver: Any, index: int) -> None:
        self._driver = driver
        device = driver.Device(index)
        self.name: str = device.name()
        self.target = Target(device.compute_capability(), driver.get_driver_version())
        self.memory_bytes: int = device.total_memory()
        self.multiprocessors: int = device.get_attribute(driver.device_attribute.MULTIPROCESSOR_COUNT)
        self._context = device.retain_primary_context()
        self._lock = threading.RLock()
        self._functions: dict[str, Any] = {}
        self._modules: dict[str, Any] = {}
        with self.active():
            self.stream = driver.Stream()

    @property
    def interpreted(self) -> bool:
        """Whether this is the tests' interpreter in place of a device."""
        return INTERPRETED in self.name

    @contextmanager
    def active(self) -> Iterator[Gpu]:
        """The context is this thread's current one; a failure for want of memory is a BudgetExceeded."""
        with self._lock:
            self._context.push()
            try:
                yield self
            except self._driver.MemoryError as error:
                do = "close what else uses the GPU, score fewer tokens at a time, or choose --backend numpy"
                raise BudgetExceeded(message("score on the GPU", "its memory is full", do)) from error
            except BaseException:
                with suppress(self._driver.Error):
                    self.wait()  # what is still queued uses memory that the next call fills
                raise
            finally:
                self._context.pop()

    def launch(
        self, entry: str, type_: launches.Type, grid: tuple[int, int], *arguments: Any, block: int = launches.BLOCK
    ) -> None:
        """Queues a kernel on the stream; `arguments` as `launches.ENTRIES` says, addresses as integers."""
        if 0 not in grid:
            self._function(entry, type_).prepared_async_call(grid, (block, 1, 1), self.stream, *arguments)

    def copy(self, to: int, source: int, size_bytes: int) -> None:
        """Queues a copy within the device's memory."""
        self._driver.memcpy_dtod_async(to, source, size_bytes, self.stream)

    @property
    def images(self) -> dict[str, str]:
        """Of each kernel file that was loaded, the image's origin."""
        return {file: images.image(file, self.target).origin for file in sorted(self._modules)}

    def wait(self) -> None:
        """Returns when all that was queued is done."""
        self.stream.synchronize()

    def memory(self) -> Memory:
        """Returns memory on the device, empty yet."""
        return Memory(self, self._driver)

    def event(self) -> Any:
        """Returns an event to be recorded on the stream."""
        return self._driver.Event(self._driver.event_flags.DISABLE_TIMING)

    def after(self, tensor: Any) -> None:
        """Lets the stream wait for what torch has queued for a tensor; the host does not wait."""
        import torch

        ours = torch.cuda.ExternalStream(self.stream.handle, device=tensor.device)
        ours.wait_stream(torch.cuda.current_stream(tensor.device))

    def _function(self, entry: str, type_: str) -> Any:
        name = f"{entry}_{type_}"
        if name not in self._functions:
            known = launches.ENTRIES[entry]
            if known.file not in self._modules:
                image = images.image(known.file, self.target)
                try:
                    self._modules[known.file] = self._driver.module_from_buffer(image.data)
                except self._driver.Error as error:
                    found = f"driver {self.target.driver} refuses {image.origin}: {error}"
                    do = "install nvcc or NVRTC of the driver's CUDA, or choose --backend torch or numpy"
                    raise BackendUnavailable(message(f"load kernels/{known.file}", found, do)) from error
            function = self._modules[known.file].get_function(name)
            self._functions[name] = function.prepare(known.arguments)
        return self._functions[name]


class Memory:
    """Device memory with page-locked host memory of the same size where it is filled from the host. Only grows."""

    def __init__(self, gpu: Gpu, driver: Any) -> None:
        self._gpu, self._driver = gpu, driver
        self._device: Any = None
        self._host: npt.NDArray[np.uint8] | None = None
        self._size = self._host_size = 0

    def reserve(self, size_bytes: int) -> int:
        """Returns the address of at least so many bytes; what they held is lost where they had to grow."""
        if size_bytes > self._size:
            self._gpu.wait()  # what is queued may still use the old memory
            self._device, self._size = None, 0
            self._device, self._size = self._driver.mem_alloc(size_bytes), size_bytes
        return int(self._device) if self._device is not None else 0

    def upload(self, rows: npt.NDArray[Any], dtype: Any) -> int:
        """Queues a copy of an array as C-contiguous `dtype`; returns its address. See `Staging` for its order."""
        size = rows.size * np.dtype(dtype).itemsize
        address = self.reserve(size)
        if size:
            host = self._pinned(size)
            np.copyto(host.view(dtype).reshape(rows.shape), rows, casting="unsafe")
            self._driver.memcpy_htod_async(address, host, self._gpu.stream)
        return address

    def download(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Waits for the stream and returns the first float32 values."""
        size = 4 * int(np.prod(shape))
        if not size:
            return np.zeros(shape, np.float32)
        host = self._pinned(size)
        self._driver.memcpy_dtoh_async(host, self.reserve(size), self._gpu.stream)
        self._gpu.wait()
        return host.view(np.float32).reshape(shape).copy()

    def _pinned(self, size_bytes: int) -> npt.NDArray[np.uint8]:
        if size_bytes > self._host_size:
            self._gpu.wait()
            self._host, self._host_size = None, 0
            self._host, self._host_size = self._driver.pagelocked_empty(size_bytes, np.uint8), size_bytes
        assert self._host is not None
        return self._host[:size_bytes]
