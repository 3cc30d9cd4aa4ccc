"""A part of a model as a list of operators that make, keep and free memory, and its fullest moments. No torch; sizes in bytes.

An operator makes a tensor from others, keeps some for its backward and needs some memory for the time that it runs. From the
list follows what autograd does with it, step by step:

    forward    a tensor goes when the last operator has read it, unless a backward keeps it
    backward   in reverse: an operator takes the gradient of what it made and makes those of what it read; then the former goes,
               and what was kept for this operator alone. A second gradient of one tensor is added to the first in new memory.

The fullest moment is found by going through the list. A closed formula would have to know beforehand where it is, and it moves:
with the width of the MLP, with recomputation, with a vocabulary, with each kernel that keeps less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megalm.config.train import SMALLEST_OFFLOADED


class Operator(NamedTuple):
    """Sizes are in bytes."""

    makes: tuple[str, ...]
    reads: tuple[str, ...]  # what gets a gradient
    keeps: tuple[str, ...]  # what its backward needs
    work: float  # for the time of its forward, beside what it reads and makes
    back: float  # for the time of its backward, beside the gradients of what it made and read
    passes: bool  # its backward hands the gradient on as it is, in the same memory
    costly: bool  # selective recomputation keeps the result: products, attention, collectives
    part: str  # of the block, as recompute=modules names it
    holds: tuple[str, ...]  # what a variable holds until then, though nobody reads it any more
    waits: bool  # its weight's gradient may be computed later: it needs what is kept and the gradients of what was made


@dataclass(frozen=True)
class Profile:
    """Of a part of a model, for one microbatch. Its input counts as its own, its output as the next part's."""

    kept: float  # from forward to backward
    small: float  # of it, in tensors too small to be offloaded
    forward: float  # most at once in the forward, its input with it
    backward: float  # most at once in the backward: what was kept and the gradients of output and input with it


class Tape:
    """The operators of a part of a model, in order. Begins with its input, `x`."""

    def __init__(self, size: float):
        self.sizes: dict[str, float] = {"x": size}
        self.gradients: dict[str, float] = {"x": size}
        self.operators: list[Operator] = []
        self.part = ""  # what operators from here on belong to

    def add(
        self,
        makes: str,
        size: float,
        reads: str,
        keeps: str = "",
        work: float = 0.0,
        back: float = 0.0,
        passes: bool = False,
        costly: bool = False,
        waits: bool = False,
        holds: str = "",
        gradient: float | None = None,
    ) -> str:
        """One operator; names are separated by spaces. Returns `makes`.

        Several results have sizes of their own: see `split`. gradient: its size, where it is not that of the result (a view).
        """
        self.sizes[makes], self.gradients[makes] = size, size if gradient is None else gradient
        names = tuple(reads.split()), tuple(keeps.split())
        operator = Operator((makes,), *names, work, back, passes, costly, self.part, tuple(holds.split()), waits)
        self.operators.append(operator)
        return makes

    def split(self, parts: Mapping[str, float], reads: str, keeps: str, back: float) -> None:
        """A product whose result lies in one piece, of which the last part, that stays, holds all: {name: size}."""
        self.gradients |= parts
        self.sizes |= dict.fromkeys(parts, 0.0) | {list(parts)[-1]: sum(parts.values())}
        names = tuple(parts), tuple(reads.split()), tuple(keeps.split())
        self.operators.append(Operator(*names, 0.0, back, passes=False, costly=True, part=self.part, holds=(), waits=True))

    def keep(self, name: str, size: float) -> str:
        """A tensor that an operator makes for its backward alone; name it in `keeps`."""
        self.sizes[name] = size
        return name

    def waiting(self) -> float:
        """Bytes that wait with the weights' gradients (Qi et al. 2023), whatever was recomputed."""
        inputs = {name for operator in self.operators if operator.waits for name in operator.keeps}
        made = [name for operator in self.operators if operator.waits for name in operator.makes]
        return sum(self.sizes[name] for name in inputs) + sum(self.gradients[name] for name in made)

    def profile(self, recompute: str = "none", parts: Collection[str] = ()) -> Profile:
        """full keeps the input alone, selective also what is costly and read again, modules no more of `parts` than they read."""
        again = [recompute in ("full", "selective") or operator.part in parts for operator in self.operators]
        kept = {name for operator, repeated in zip(self.operators, again, strict=True) if not repeated for name in operator.keeps}
        if recompute in ("full", "selective"):
            kept = {"x"} | (self._costly() if recompute == "selective" else set())
        for part in parts:
            inside = [operator for operator in self.operators if operator.part == part]
            made = {name for operator in inside for name in operator.makes}
            kept |= {self._memory(name) for operator in inside for name in operator.reads if name not in made}
        forward = self._forward(kept)
        most = max(self._backward(kept, recompute == "modules"), self._repeated() if recompute in ("full", "selective") else 0.0)
        sizes = [self.sizes[name] for name in kept]
        return Profile(sum(sizes), sum(size for size in sizes if size < SMALLEST_OFFLOADED), forward, most)

    def _repeated(self) -> float:
        """A block's second forward, beside the gradient of its output."""
        return self._forward(self._kept() | {"x"}) + sum(self.gradients[name] for name in self.operators[-1].makes)

    def _memory(self, name: str) -> str:
        """Of a view without memory of its own, what it is a view of."""
        made_by = {made: operator for operator in self.operators for made in operator.makes}
        while name in made_by and not self.sizes[name] and made_by[name].reads:
            name = made_by[name].reads[0]
        return name

    def _kept(self) -> set[str]:
        return {name for operator in self.operators for name in operator.keeps}

    def _costly(self) -> set[str]:
        """Costly results that the second forward reads; it ends before the last operator that keeps anything.

        What a collective alone reads is not kept: its own result is. What an operator makes for its backward is a result too.
        """
        end = max(i for i, operator in enumerate(self.operators) if operator.keeps)
        read = set(self.operators[end].keeps)
        for operator in self.operators[:end]:
            is_collective = operator.costly and not operator.keeps
            read |= set(operator.keeps) | (set() if is_collective else set(operator.reads))
        made = {name for operator in self.operators if operator.costly for name in (*operator.makes, *operator.keeps)}
        plain = {name for operator in self.operators if not operator.costly for name in operator.makes} | {"x"}
        return made & read - plain

    def _forward(self, kept: set[str]) -> float:
        last = {name: i for i, o in enumerate(self.operators) for name in (*o.reads, *o.keeps, *o.holds)}
        level = most = self.sizes["x"]
        made = {"x"}
        for i, operator in enumerate(self.operators):
            new = {*operator.makes, *operator.keeps} - made
            made |= new
            level += sum(self.sizes[name] for name in new)
            most = max(most, level + operator.work)
            level -= sum(self.sizes[name] for name in made if last.get(name) == i and name not in kept)
        return most

    def _backward(self, kept: set[str], by_part: bool) -> float:
        """What was not kept is made again when the backward comes to it: all at once, or of the operator's part of the block."""
        users = Counter(name for operator in self.operators for name in set(operator.keeps))
        here = set(kept)  # what no operator keeps, but recomputation, stays
        gradients = _Gradients(self.gradients)
        for name in self.operators[-1].makes:
            gradients.set(name)
        level = sum(self.sizes[name] for name in here)
        most = level + gradients.total
        for i, operator in reversed(list(enumerate(self.operators))):
            given = [gradients.take(name) for name in operator.makes]
            if not here.issuperset(operator.keeps):
                again = [o for o in self.operators[: i + 1] if not by_part or o.part == operator.part]
                new = {name for o in again for name in o.keeps} - here
                here |= new
                level += sum(self.sizes[name] for name in new)
            made = [(name, given[0] if operator.passes else gradients.make(name)) for name in operator.reads]
            most = max(most, level + gradients.total + operator.back)
            for name in set(operator.keeps):
                users[name] -= 1
                level -= 0 if users[name] else self.sizes[name]
            for name, memory in made:
                most = max(most, level + gradients.total + gradients.add(name, memory, fresh=not operator.passes))
            for memory in given:
                gradients.release(memory)
        return most


class _Gradients:
    """The gradients that are there, several of which may lie in one memory."""

    def __init__(self, sizes: Mapping[str, float]):
        self.sizes, self.of = sizes, dict[str, int]()
        self.memories: dict[int, float] = {}
        self.users = Counter[int]()

    @property
    def total(self) -> float:
        return sum(self.memories.values())

    def make(self, name: str) -> int:
        """New memory for a gradient, held until it is released."""
        memory = len(self.users)
        self.memories[memory] = self.sizes[name]
        self.users[memory] = 1
        return memory

    def set(self, name: str) -> None:
        self.of[name] = self.make(name)

    def take(self, name: str) -> int:
        return self.of.pop(name)

    def add(self, name: str, memory: int, fresh: bool) -> float:
        """Give `name` this gradient, beside what it has. Returns the bytes that adding up needed for a moment."""
        if not fresh:
            self.users[memory] += 1
        if name not in self.of:
            self.of[name] = memory
            return 0.0
        before = self.of[name]
        self.set(name)
        self.release(before)
        self.release(memory)
        return self.sizes[name]

    def release(self, memory: int) -> None:
        self.users[memory] -= 1
        if not self.users[memory]:
            del self.memories[memory]
