"""What every section of a configuration is made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
)

from selfdistill.errors import UserError


class ConfigError(UserError):
    """A configuration file that asks for something that does not exist."""


class Section(BaseModel):
    """A frozen group of settings; the string under a field says what the field does."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


def _no_boolean(value: Any) -> Any:
    """Refuse booleans: YAML reads yes, no, on and off as such, and Python counts with them."""
    if isinstance(value, bool):
        raise ValueError("expected a number; yes, no, on and off are true and false")
    return value


# Every number of a configuration is one of these.
Int = Annotated[int, BeforeValidator(_no_boolean)]


Float = Annotated[float, BeforeValidator(_no_boolean)]


PositiveInt = Annotated[Int, Field(gt=0)]


Rate = Annotated[Float, Field(ge=0, le=1)]


def _absolute(path: str, info: ValidationInfo) -> str:
    """Return a path that counts from the YAML file; one of Python counts from where it runs."""
    folder: Path | None = (info.context or {}).get("folder")
    return str(Path(folder or ".", path).resolve())


def _nearby(name: str, info: ValidationInfo) -> str:
    """Return the path of a name that exists beside the YAML file, any other name unchanged."""
    path = _absolute(name, info)
    if Path(path).exists() or name.startswith((".", "/")):
        return path
    if Path(name).exists():
        raise ValueError(
            f"paths count from the YAML file, and there is no {path}, but {Path(name).absolute()} "
            "is there: write the path as it is from the file"
        )
    return name


def _a_path(name: str) -> str:
    if not name.strip() or "\0" in name:
        raise ValueError("expected a name or a path")
    return name


# What may also be a name on the Hub: a path where there is one beside the YAML file.
NearbyName = Annotated[str, AfterValidator(_a_path), AfterValidator(_nearby)]


# A file that is read.
InputFile = Annotated[str, AfterValidator(_a_path), AfterValidator(_absolute)]


OutputPath = Annotated[
    Path,
    BeforeValidator(lambda path: _a_path(path) if isinstance(path, str) else path),
    AfterValidator(lambda path, info: Path(_absolute(str(path), info))),
]


def _with_exponents(value: Any) -> Any:
    """Return plain data with numbers such as 1e-3, which YAML 1.1 reads as texts; a field of a type
    of its own needs no such help."""
    if isinstance(value, dict):
        return {key: _with_exponents(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_exponents(inner) for inner in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


# What a server, a chat template and a schedule can be told; a date, say, would come back as a text.
JsonObject: TypeAlias = Annotated[dict[str, JsonValue], BeforeValidator(_with_exponents)]
