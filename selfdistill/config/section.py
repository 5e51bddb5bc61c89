"""What every section of a configuration is made of."""

from __future__ import annotations

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


def _next_to_file(name: str, info: ValidationInfo) -> str:
    """Return the path of a name that exists beside the YAML file, any other name unchanged."""
    folder = (info.context or {}).get("folder")
    if folder is None or not (folder / name).exists():
        return name
    return str((folder / name).resolve())


def _a_path(name: str) -> str:
    if not name.strip() or "\0" in name:
        raise ValueError("expected a name or a path")
    return name


NearbyName = Annotated[str, AfterValidator(_a_path), AfterValidator(_next_to_file)]


OutputPath = Annotated[
    Path, BeforeValidator(lambda path: _a_path(path) if isinstance(path, str) else path)
]


# What a server and a chat template can be told; a date, say, would come back as a text.
JsonObject: TypeAlias = dict[str, JsonValue]
