"""A measured stretch of code: from its start to its end, with what the meter says of the time between.

Knows nothing of sensors.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from edge_sdss.errors import InputError, message
from edge_sdss.profiling import schema

if TYPE_CHECKING:
    from edge_sdss.profiling.meter import Meter

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Measurement:
    """One window that has ended. `error` says whether an exception ended it.

    The energy is worked out where it is asked for, so that a window costs its surroundings next to nothing.
    """

    name: str
    start_s: float
    end_s: float
    items: float | None
    error: bool
    _meter: Meter = field(repr=False, compare=False)

    @property
    def seconds(self) -> float:
        """From start to end."""
        return self.end_s - self.start_s

    @property
    def energy(self) -> schema.Energy:
        """The energy of the window, of all that the machine did in it, other threads and processes too."""
        return self._meter.energy([(self.start_s, self.end_s)], self.items)


class Window:
    """A measured stretch of code: a context manager, or a decorator that measures each call.

    `async def` is measured until it has been awaited to its end. A generator, asynchronous or not, from its
    first step to its end, what its consumer does between the steps included; one that is left early ends
    when it is closed. `items` may be set until the window ends.
    """

    def __init__(self, meter: Meter, name: str, items: float | None = None) -> None:
        self.name, self.items = name, items
        self.start_s = self.end_s = float("nan")
        self._meter = meter
        self._result: Measurement | None = None
        self._open = False

    @property
    def result(self) -> Measurement:
        """What was measured. Raises InputError before the window's end."""
        if self._result is None:
            raise InputError(message(f"read window {self.name!r}", "it has not ended", "read it after its `with`"))
        return self._result

    def __enter__(self) -> Window:
        if self._open:
            raise InputError(message(f"enter window {self.name!r}", "it is open", "call `meter.window` for another"))
        self._open, self._result = True, None
        self._meter.sampler.sample_counters()
        self.start_s = self._meter.now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_s = self._meter.now()
        failed = kind is not None and not issubclass(kind, GeneratorExit)
        self._result = Measurement(self.name, self.start_s, self.end_s, self.items, failed, self._meter)
        self._open = False
        self._meter.measurements.append(self._result)
        self._meter.sampler.sample_counters()

    def __call__(self, function: _Function) -> _Function:
        """Returns the function, measured in a window of its own at each call, in any thread or task."""
        measured = _measured(function, lambda: Window(self._meter, self.name, self.items))
        return cast(_Function, functools.wraps(function)(measured))


def _measured(function: Callable[..., Any], window: Callable[[], Window]) -> Callable[..., Any]:
    """Of the same sort as `function`: plain, generator, coroutine function or asynchronous generator."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with window():
            return function(*args, **kwargs)

    def steps(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        with window():
            return (yield from function(*args, **kwargs))

    async def awaited(*args: Any, **kwargs: Any) -> Any:
        with window():
            return await function(*args, **kwargs)

    async def awaited_steps(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        with window():
            async with aclosing(function(*args, **kwargs)) as inner:  # there is no asynchronous `yield from`
                resume = inner.asend(None)
                while True:
                    try:
                        item = await resume
                    except StopAsyncIteration:
                        return
                    try:
                        resume = inner.asend((yield item))
                    except GeneratorExit:
                        raise
                    except BaseException as error:
                        resume = inner.athrow(error)

    if inspect.isasyncgenfunction(function):
        return awaited_steps
    if inspect.iscoroutinefunction(function):
        return awaited
    return steps if inspect.isgeneratorfunction(function) else call
