"""Sharing one evaluation among processes: who attacks which batch, and how all get the result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of an evaluation, all in the same place of it.

    Every batch draws its noise from the seed and its samples, so that it does not matter who
    attacks it.

    Args:
        rank: of this process, from 0.
        count: of all processes.

    Example:
        >>> Processes(rank=1, count=3).share(range(7))
        [1, 4]
        >>> Processes().share(range(3))
        [0, 1, 2]
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of_this_run(cls, distributed: bool) -> "Processes":
        """Return the default group of ``torch.distributed``, or this process alone.

        Raises:
            ValueError: when the group is wanted and there is none.
        """
        if not distributed:
            return cls()
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "distributed=True needs torch.distributed.init_process_group() first, in every "
                "process (start them with torchrun), and there is no group."
            )
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self, numbers: range) -> list[int]:
        """Return this process's numbers, dealt in turns."""
        return list(numbers[self.rank :: self.count])

    def gather(self, own: T) -> list[T]:
        """Return what every process has, in the order of ranks, to every process."""
        if self.count == 1:
            return [own]
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, own)
        return gathered

    def deal(self, count: int, compute: Callable[[int], T]) -> list[T]:
        """Compute ``count`` numbered things, dealt in turns; all processes get all, in order.

        Example:
            >>> Processes().deal(3, lambda number: number * number)
            [0, 1, 4]
        """
        own = {number: compute(number) for number in self.share(range(count))}
        everything: dict[int, T] = {}
        for part in self.gather(own):
            everything |= part
        return [everything[number] for number in range(count)]

    def first(self, compute: Callable[[], T]) -> T:
        """Let the first process compute something, and return it in every process.

        Raises:
            ValueError: in the other processes, when the first one failed; it raises its own error.
        """
        if self.count == 1:
            return compute()
        held: list[Any] = [None, None]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                held[0] = compute()
            except Exception as error:  # told to those who would wait for ever
                failure, held[1] = error, f"{type(error).__name__}: {error}"
        dist.broadcast_object_list(held, src=0)
        if failure is not None:
            raise failure
        if held[1] is not None:
            raise ValueError(f"the first of {self.count} processes failed: {held[1]}")
        return cast(T, held[0])

    def check_same(self, key: Mapping[str, object]) -> None:
        """Refuse processes that evaluate different things.

        Raises:
            ValueError: with the facts that differ.
        """
        keys = self.gather(dict(key))
        differing = sorted(name for name in key if any(other[name] != key[name] for other in keys))
        if differing:
            raise ValueError(
                f"all processes must evaluate the same: {', '.join(differing)} differ between "
                f"the {self.count} processes. Give each the same weights, images and settings."
            )
