"""Plain data for JSON: methods, for patches, ledgers, preset files and reports, and back again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jaxedit.config import Method
from jaxedit.errors import JaxEditError


def describe(method: Method) -> dict[str, Any]:
    """The method as plain data, for patches and reports."""
    plain = dataclasses.asdict(method)
    plain["targets"] = {"kind": type(method.targets).__name__, **plain["targets"]}
    plain["solver"] = {"kind": type(method.solver).__name__, **plain["solver"]}
    if method.regulariser is not None:
        plain["regulariser"] = {"kind": type(method.regulariser).__name__, **plain["regulariser"]}
    plain["layers"], plain["anchor"]["betas"] = list(method.layers), list(method.anchor.betas)
    return plain


def method_from_plain(plain: Any, where: str = "method") -> Method:
    """The method that `describe` described.

    Only what the fields of `Method` may hold is made. Raises JaxEditError naming, with `where`, a kind, a field or a
    value that is not known.
    """
    if not isinstance(plain, Mapping):
        raise JaxEditError(f"{where}: is {plain!r}, expected names with values")
    return built(Method, plain, where)


def built(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """An instance of a dataclass from plain data that fits its annotations."""
    hints = get_type_hints(kind)
    refuse_unknown(where, values, hints)
    needed = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in needed if name not in values]
    if missing:
        raise JaxEditError(f"{where}: not complete, there is no {' and no '.join(missing)}")
    return kind(**{name: _value(value, hints[name], f"{where}.{name}") for name, value in values.items()})


def _value(value: Any, hint: Any, where: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if isinstance(value, Mapping):
        classes = {x.__name__: x for x in options if isinstance(x, type) and dataclasses.is_dataclass(x)}
        kind = value.get("kind", next(iter(classes), None))
        if kind not in classes:
            raise JaxEditError(f"{where}.kind: {kind!r} is not known here; it must be one of {sorted(classes)}")
        return built(classes[kind], {name: v for name, v in value.items() if name != "kind"}, where)
    tuples = [x for x in options if get_origin(x) is tuple]
    if isinstance(value, list) and tuples:
        return tuple(_value(v, get_args(tuples[0])[0], f"{where}[{i}]") for i, v in enumerate(value))
    if not any(_fits(value, option) for option in options):
        raise JaxEditError(f"{where}: is {value!r}, expected {hint if len(options) > 1 else hint.__name__}")
    return value


def _fits(value: Any, option: Any) -> bool:
    if get_origin(option) is Literal:
        return value in get_args(option)
    return type(value) in ((int, float) if option is float else (option,))


def plain_fields(settings: Any) -> dict[str, Any]:
    """The fields of a flat dataclass, with lists for tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}


def refuse_unknown(where: str, values: Mapping[str, Any], known):
    """Raise JaxEditError naming the fields of `values` that are not among the `known` ones."""
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise JaxEditError(
            f"{where}: unknown fields {unknown}; the known ones are {sorted(known)}. "
            "A newer version of jaxedit may have more"
        )


def finite(value: Any) -> Any:
    """Plain data with None for numbers that JSON does not know."""
    if isinstance(value, Mapping):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
