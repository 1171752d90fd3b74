"""Configs: YAML in, dotted overrides, and objects built from their own constructor's parameters.

There is no second list of settings: what a method, benchmark, explainer or model takes under its name in a
config is what its constructor takes by keyword, with the same defaults, checked by the same annotations.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import ErrorDetails

from hansfree.errors import UserError, nearest, unknown

T = TypeVar("T")
Section = dict[str, Any]


class Schema(BaseModel):
    """Base of every config section: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def apply_overrides(config: Section, overrides: Sequence[str]) -> Section:
    """``config`` with dotted settings such as ``training.lr=0.1`` put in; values are read as YAML."""
    result = copy.deepcopy(config)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise UserError(f"The setting {override!r} is not of the form key=value, such as training.lr=0.1.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"The value in {override!r} is not valid YAML; put it in quotes.") from error
        put(result, path, value)
    return result


def put(config: Section, path: str, value: Any) -> None:
    """Set the dotted ``path`` in place, making sections on the way."""
    section, last = _place(config, path)
    section[last] = value


def _place(config: Section, path: str) -> tuple[Section, str]:
    """The section that holds the dotted ``path``, made where it is missing, and the key there."""
    *parents, last = path.split(".")
    for name in parents:
        config = config.setdefault(name, {})
        if not isinstance(config, dict):
            raise UserError(f"The setting {path} goes through {name!r}, which is a value and not a section.")
    return config, last


def merge(base: Section, changes: Mapping[str, Any]) -> Section:
    """``base`` with ``changes`` laid over it, section by section.

    Keys of ``changes`` may be dotted. A named section (one with ``name``) that changes its name is replaced
    whole, because the settings of one thing mean nothing to another.
    """
    result = copy.deepcopy(base)
    for path, value in changes.items():
        section, last = _place(result, path)
        old = section.get(last)
        if (
            isinstance(value, Mapping)
            and isinstance(old, dict)
            and value.get("name", old.get("name")) == old.get("name")
        ):
            section[last] = merge(old, value)
        else:
            section[last] = copy.deepcopy(value)
    return result


def parse(schema: type[T], config: Mapping[str, Any], source: str = "the config") -> T:
    """``config`` as a ``schema`` (a pydantic model). Raises ``UserError`` for the first thing that is wrong."""
    assert issubclass(schema, BaseModel)
    try:
        return schema.model_validate(config)
    except ValidationError as error:
        raise _sentence(error.errors()[0], schema, source) from error


def construct(
    registry: Mapping[str, Callable[..., T]], section: Mapping[str, Any], kind: str, *, given: Mapping[str, Any] = {}
) -> T:
    """Build what ``section['name']`` names in ``registry`` from the other keys of the section.

    ``given`` are arguments that come from the program and not from the config. A section inside, under the word
    ``kind``, is built first, from the same registry: ``{name: smoothgrad, explainer: {name: lrp}}``, or for short
    ``explainer: lrp``. Raises ``UserError`` for an unknown name, an unknown key (with the nearest known one), or a
    value of the wrong kind.
    """
    options = {key: value for key, value in section.items() if key != "name"}
    inside = inner_section(section, kind)
    if inside is not None:
        options[kind] = construct(registry, inside, kind)
    name = section.get("name")
    if not isinstance(name, str):
        raise UserError(f"The {kind} section needs a name; known: {', '.join(sorted(registry))}.")
    if name not in registry:
        raise unknown(kind, name, registry)
    factory = registry[name]
    schema = settings_schema(factory, name, frozenset(given))
    try:
        checked = schema.model_validate(options)
    except ValidationError as error:
        raise _sentence(error.errors()[0], schema, f"the {kind} {name!r}") from error
    values = {field: getattr(checked, field) for field in type(checked).model_fields if field in options}
    return factory(**{key: value for key, value in given.items() if key in _parameters(factory)}, **values)


def inner_section(section: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """The section of the same kind inside a section; a name alone stands for a section with nothing else."""
    inside = section.get(kind)
    return {"name": inside} if isinstance(inside, str) else inside if isinstance(inside, Mapping) else None


def settings_schema(factory: Callable[..., Any], name: str, given: frozenset[str] = frozenset()) -> type[BaseModel]:
    """The constructor's keyword parameters, the ``given`` ones left out, as a pydantic model."""
    fields: dict[str, Any] = {
        key: (parameter.annotation, ... if parameter.default is inspect.Parameter.empty else parameter.default)
        for key, parameter in _parameters(factory).items()
        if key not in given
    }
    return create_model(name, __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)


def _parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {
        key: parameter
        for key, parameter in inspect.signature(factory).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _sentence(problem: ErrorDetails, schema: type[BaseModel], source: str) -> UserError:
    where = [str(part) for part in problem["loc"]]
    if len(where) > 1 and where[-1] in _KINDS:  # pydantic names the branch of a union that it tried last
        where.pop()
    path = ".".join(where)
    if problem["type"] == "extra_forbidden":
        section: Any = schema
        for part in problem["loc"][:-1]:
            section = _inner(section, str(part))
        known = section.model_fields if section else schema.model_fields
        return UserError(f"{_capital(source)} has no setting {path!r}; {nearest(str(problem['loc'][-1]), known)}")
    if problem["type"] == "missing":
        return UserError(f"{_capital(source)} lacks the setting {path!r}; add it.")
    reason = _small(problem["msg"].removeprefix("Value error, "))
    if isinstance(problem["input"], dict):
        return UserError(f"{_capital(source)}: {path or 'the whole'}: {reason}.")
    return UserError(f"{_capital(source)}: {path or 'a value'} cannot be {problem['input']!r} ({reason}).")


_KINDS = ("int", "constrained-int", "float", "str", "bool")


def _inner(section: Any, name: str) -> Any:
    field = section.model_fields.get(name) if section else None
    candidates = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((c for c in candidates if inspect.isclass(c) and issubclass(c, BaseModel)), None)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _small(text: str) -> str:
    return text[:1].lower() + text[1:]
