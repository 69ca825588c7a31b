"""Results that the devices still work on."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

Result = TypeVar("Result")


class Dispatched(NamedTuple, Generic[Result]):
    """What a network was given to do; the host goes on meanwhile.

    Attributes:
        arrays: the results on the devices, a tree of jax arrays; of host arrays if no device works.
        fetch: waits for them and returns them on the host.
    """

    arrays: Any
    fetch: Callable[[], Result]
