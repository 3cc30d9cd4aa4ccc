"""Check that imports only go down the floors of the house: `python tools/floors.py [CHECKOUT]`, exit 1 if one does not.

Read from the sources, never by importing them, so that an import inside a function, a relative one, one behind `if`,
and `import_module("a literal")` count like any other. Five rules:

1. floors   a room imports lower floors only, and never a neighbour on its own floor (FLOORS);
2. bans     some pairs are forbidden although the floors would allow them (BANS), DeepSpeed has one owner (OWNERS), and
            the kernels stand on torch and triton alone (STANDS_ON);
3. cycles   no two modules import each other, over however many steps;
4. light    some rooms must not load torch, over however many steps (NO_TORCH, NO_TORCH_AT_START);
5. names    no import by a folder's name that exists in the checkout only (CHECKOUT_ONLY).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Highest floor first. A package stands for all that is in it. `errors` and `log` lie under the rest of F1: every room
# raises the first and speaks through the second.
FLOORS: list[tuple[str, list[str]]] = [
    ("F8", ["megalm.launchers"]),
    ("F7", ["megalm.train"]),
    ("F6", ["megalm.evaluate", "megalm.compress", "megalm.plan", "megalm.serve", "megalm.observe"]),
    ("F5", ["megalm.inference"]),
    ("F4", ["megalm.checkpoint"]),
    ("F3", ["megalm.models", "megalm.objectives", "megalm.optim"]),
    ("F2", ["megalm.data", "megalm.parallel"]),
    ("F1", ["megalm.config", "megalm.testing", "megalm.doctor"]),
    ("F1 (base)", ["megalm.errors", "megalm.log", "megalm.runfolder"]),
    ("F0", ["megalm_kernels"]),
]
ANYONE = "megalm"  # the root package holds the version, and imports nothing of the house
DATA_ONLY = "megalm.conf"  # yaml: Hydra reads it by name, nobody imports it
BANS = {"megalm.models": ["megalm.parallel"], "megalm.config": ["megalm_kernels"]}
OWNERS = {"deepspeed": ["megalm.parallel.zero"]}  # modules whose name starts so may import it
STANDS_ON = {  # the closest room counts; apex is a peer, used where it happens to be installed
    "megalm_kernels": {"torch", "triton", "apex", "amp_C"},  # amp_C is apex's
    "megalm_kernels.benchmarks": {"megalm_kernels", "torch", "matplotlib"},  # other peers by name, where they are installed
}
HEAVY = {"torch", "triton", "deepspeed"}
NO_TORCH = ["megalm.config", "megalm.errors", "megalm.runfolder", "megalm.observe"]  # never, also not inside a function
NO_TORCH_AT_START = ["megalm.launchers", "megalm.doctor"]  # inside a function only: a bad config dies in a second
CHECKOUT_ONLY = {"launchers", "conf", "kernels", "tools", "tests", "slurm", "benchmarks"}
SOURCES = {
    "megalm": "megalm",
    "launchers": "megalm.launchers",
    "conf": DATA_ONLY,
    "kernels/megalm_kernels": "megalm_kernels",
    "kernels/benchmarks": "megalm_kernels.benchmarks",
}


@dataclass(frozen=True)
class Import:
    """One import statement: the module that has it, what it names, and whether it runs when the module is loaded."""

    module: str
    target: str
    place: str  # file:line
    at_start: bool


def find_modules(root: Path) -> dict[str, Path]:
    """Every module of the house: dotted name -> file."""
    modules = {}
    for folder, package in SOURCES.items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = file.relative_to(root / folder).with_suffix("").parts
            modules[".".join([package, *parts]).removesuffix(".__init__")] = file
    return modules


def walk(node: ast.AST, at_start: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes, each with whether it runs when the module is loaded (not in a function, not under TYPE_CHECKING)."""
    yield node, at_start
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for part in node.body:
            yield from walk(part, False)
        for part in node.orelse:
            yield from walk(part, at_start)
        return
    inside = at_start and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from walk(child, inside)


def named_by(node: ast.AST, package: str) -> list[str]:
    """The dotted names a node imports. `from a import b` gives a.b, which may be a module or a name in a."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = absolute("." * node.level + (node.module or ""), package)
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            return [absolute(node.args[0].value, package)]
    return []


def absolute(name: str, package: str) -> str:
    """`..data.indexed` seen from package megalm.train -> megalm.data.indexed; an absolute name as it is."""
    tail = name.lstrip(".")
    level = len(name) - len(tail)
    above = package.split(".")[: package.count(".") + 2 - level] if level else []
    return ".".join([*above, *([tail] if tail else [])])


def find_imports(root: Path, modules: dict[str, Path]) -> list[Import]:
    """Every import in the house, house modules resolved to the module itself and not to a name in it."""
    imports = []
    for module, file in modules.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for node, at_start in walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
            for name in named_by(node, package):
                known = name in modules or name.rpartition(".")[0] not in modules
                target = name if known else name.rpartition(".")[0]
                place = f"{file.relative_to(root)}:{getattr(node, 'lineno', 0)}"
                imports.append(Import(module, target, place, at_start))
    return imports


def is_in(module: str, room: str) -> bool:
    """Whether a module is that room or lies in it."""
    return module == room or module.startswith(room + ".")


def room_of(module: str) -> tuple[int, str] | None:
    """The floor's place in FLOORS and the room that a module belongs to; None outside the house and on no floor."""
    for place, (_, rooms) in enumerate(FLOORS):
        for room in rooms:
            if is_in(module, room):
                return place, room
    return None


def check_floors(modules: dict[str, Path], imports: list[Import]) -> Iterator[str]:
    """Rule 1, and that every module is on a floor."""
    for module, file in modules.items():
        if room_of(module) is None and module != ANYONE and not is_in(module, DATA_ONLY):
            yield f"{file}: {module} is on no floor; give its room a place in tools/floors.py and in the tour"
    for line in imports:
        here, there = room_of(line.module), room_of(line.target)
        if is_in(line.target, DATA_ONLY):
            yield f"{line.place}: {line.module} imports {line.target}, which is data"
        elif line.module == ANYONE and (there or is_in(line.target, ANYONE)):
            yield f"{line.place}: the root package imports {line.target}; it may import nothing of the house"
        elif here and there and here[1] != there[1] and there[0] <= here[0]:
            way = "its neighbour" if here[0] == there[0] else "up to"
            low, high = FLOORS[here[0]][0], FLOORS[there[0]][0]
            yield f"{line.place}: {line.module} ({low}) imports {way} {line.target} ({high})"


def check_bans(imports: list[Import]) -> Iterator[str]:
    """Rules 2 and 5."""
    for line in imports:
        for room, banned in BANS.items():
            for target in banned:
                if is_in(line.module, room) and is_in(line.target, target):
                    yield f"{line.place}: {room} may not import {target}, and imports {line.target}"
        top = line.target.split(".")[0]
        owners = OWNERS.get(top)
        if owners and not line.module.startswith(tuple(owners)):
            yield f"{line.place}: only {', '.join(owners)} may import {top}, and {line.module} does"
        room = max((room for room in STANDS_ON if is_in(line.module, room)), key=len, default="")
        if room and top not in {room, *STANDS_ON[room], *sys.stdlib_module_names}:
            ground = ", ".join(sorted(STANDS_ON[room]))
            yield f"{line.place}: {room} may import {ground} only, and imports {line.target}"
        if top in CHECKOUT_ONLY:
            yield f"{line.place}: {line.module} imports {line.target}, a folder of the checkout that is not installed"


def check_cycles(modules: dict[str, Path], imports: list[Import]) -> Iterator[str]:
    """Rule 3: every group of modules that reach each other, once (Tarjan's strongly connected components)."""
    edges: dict[str, set[str]] = {module: set() for module in modules}
    for line in imports:
        if line.target in modules:
            edges[line.module].add(line.target)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> Iterator[list[str]]:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in sorted(edges[module]):
            if target not in index:
                yield from visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            at = stack.index(module)
            group, stack[at:] = stack[at:], []
            if len(group) > 1 or module in edges[module]:
                yield group

    for module in sorted(modules):
        if module not in index:
            for group in visit(module):
                yield f"import cycle: {' -> '.join([*group, group[0]])}"


def check_light(modules: dict[str, Path], imports: list[Import]) -> Iterator[str]:
    """Rule 4: the first chain of imports from each light module to a heavy one."""
    for rooms, start_only in ((NO_TORCH, False), (NO_TORCH_AT_START, True)):
        # A module loads the packages it lies in first.
        edges = {module: [module.rpartition(".")[0]] for module in modules}
        for line in imports:
            if line.at_start or not start_only:
                edges[line.module].append(line.target)
        for module in (m for m in modules if any(is_in(m, room) for room in rooms)):
            chain = shortest_chain(module, edges)
            if chain:
                when = "when it is loaded" if start_only else "at any time"
                yield f"{modules[module]}: {module} may not load {chain[-1]} {when}: {' -> '.join(chain)}"


def shortest_chain(start: str, edges: dict[str, list[str]]) -> list[str]:
    """Breadth first from `start` to a module of HEAVY; empty if there is none."""
    chains, seen = [[start]], {start}
    for chain in chains:
        for target in edges.get(chain[-1], []):
            if target.split(".")[0] in HEAVY:
                return [*chain, target]
            if target not in seen:
                seen.add(target)
                chains.append([*chain, target])
    return []


def violations(root: Path) -> list[str]:
    """All that is wrong in a checkout."""
    modules = find_modules(root)
    if not modules:
        return [f"{root}: no Python sources in {', '.join(SOURCES)}"]
    imports = find_imports(root, modules)
    return [
        *check_floors(modules, imports),
        *check_bans(imports),
        *check_cycles(modules, imports),
        *check_light(modules, imports),
    ]


def main(arguments: list[str]) -> int:
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent
    found = violations(root)
    print("\n".join([*found, f"floors: {len(found)} violations, {len(find_modules(root))} modules"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
