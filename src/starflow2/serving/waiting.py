"""Waiting requests: a bounded queue that takes from every owner in turn, whoever asks most."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

__all__ = ["FairQueue"]

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items by owner; `pop` serves the owners in turn, and each owner's items in their order.

    >>> queue = FairQueue[str]()
    >>> for item in ("a1", "a2", "b1"): queue.push(item[0], item)
    >>> [queue.pop() for _ in range(len(queue))]
    ['a1', 'b1', 'a2']
    """

    def __init__(self) -> None:
        self._by_owner: OrderedDict[str, deque[T]] = OrderedDict()  # the owner whose turn is next comes first

    def __len__(self) -> int:
        return sum(map(len, self._by_owner.values()))

    def __iter__(self) -> Iterator[T]:
        return (item for items in list(self._by_owner.values()) for item in list(items))

    def count(self, owner: str) -> int:
        """How many items of an owner wait."""
        return len(self._by_owner.get(owner, ()))

    def push(self, owner: str, item: T) -> None:
        self._by_owner.setdefault(owner, deque()).append(item)

    def peek(self) -> T | None:
        """The item that `pop` takes next."""
        return next((items[0] for items in self._by_owner.values()), None)

    def pop(self) -> T:
        """The next item, after which its owner comes last."""
        owner, items = next(iter(self._by_owner.items()))
        item = items.popleft()
        del self._by_owner[owner]
        if items:
            self._by_owner[owner] = items
        return item

    def remove(self, item: T) -> bool:
        """Take an item out, wherever it stands; False if it does not wait."""
        for owner, items in self._by_owner.items():
            if any(other is item for other in items):
                self._by_owner[owner] = deque(other for other in items if other is not item)
                if not self._by_owner[owner]:
                    del self._by_owner[owner]
                return True
        return False
