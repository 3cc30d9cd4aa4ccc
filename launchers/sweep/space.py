"""What a search may draw from, in Hydra's words: interval(a, b), tag(log, interval(a, b)), range(a, b, step), choice(a, b)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megalm.config.fields import leaves
from megalm.errors import ConfigError, Problem


@dataclass(frozen=True)
class Dimension:
    """One swept key. `kind`: float, int or choice; ends are included; step 0: any number between."""

    key: str
    kind: str
    low: float = 0
    high: float = 0
    step: float = 0
    log: bool = False
    choices: tuple[str, ...] = ()

    def distribution(self) -> Any:
        """As Optuna knows it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind == "choice":
            return CategoricalDistribution(self.choices)
        if self.kind == "int":
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step) or 1)
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step or None)

    def override(self, value: Any) -> str:
        """`key=value` of a drawn value."""
        return f"{self.key}={value}"


def read_space(arguments: Sequence[str], root: type) -> tuple[list[str], list[Dimension]]:
    """(the overrides that all points share, what is drawn). Raises ConfigError."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    kinds = {key: kind for key, _, kind in leaves(root)}
    fixed: list[str] = []
    space: list[Dimension] = []
    problems: list[Problem] = []
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        if not override.is_sweep_override():
            fixed.append(str(override.input_line))
            continue
        key = override.get_key_element()
        typed = str(override.input_line).partition("=")[2]
        dimension = _dimension(key, kinds.get(key), override)
        rule = _fault(dimension, kinds.get(key))
        if rule:
            problems.append(Problem(key, typed, rule[0], "", rule[1]))
        space.append(dimension)
    if not space:
        problems.append(Problem("--multirun", None, "a search needs a setting to draw", "", "'optim.lr=interval(1e-4,1e-2)'"))
    if problems:
        raise ConfigError(*problems)
    return fixed, space


def _dimension(key: str, kind: Any, override: Any) -> Dimension:
    if override.is_choice_sweep():
        return Dimension(key, "choice", choices=tuple(override.sweep_string_iterator()))
    value = override.value()
    log = "log" in value.tags
    if override.is_interval_sweep():
        whole = kind is int and float(value.start).is_integer() and float(value.end).is_integer()
        return Dimension(key, "int" if whole else "float", float(value.start), float(value.end), log=log)
    values = [float(text) for text in override.sweep_string_iterator()]
    whole = all(item.is_integer() for item in values) and kind is not float
    step = abs(values[1] - values[0]) if len(values) > 1 else 1.0
    if log:
        step = 1.0 if whole else 0.0
    return Dimension(key, "int" if whole else "float", min(values), max(values), step, log)


def _fault(dimension: Dimension, kind: Any) -> tuple[str, str] | None:
    """(the rule it breaks, the fix)."""
    ends = f"{dimension.high:g},{dimension.low:g}"  # turned
    checks: list[tuple[Callable[[], bool], str, str]] = [
        (lambda: dimension.kind != "choice" and kind not in (int, float), "takes no numbers", f"'{dimension.key}=choice(a,b)'"),
        (lambda: dimension.kind == "float" and kind is int, "takes whole numbers", f"'{dimension.key}=interval(1,8)'"),
        (lambda: dimension.low > dimension.high, "the lower end comes first", f"'{dimension.key}=interval({ends})'"),
        (lambda: dimension.log and dimension.low <= 0, "a logarithm needs ends above 0", f"'{dimension.key}=interval(1e-5,1)'"),
    ]
    return next(((rule, fix) for broken, rule, fix in checks if broken()), None)
