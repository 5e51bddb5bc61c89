"""A configuration as a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from selfdistill.config.run import Config
from selfdistill.config.section import ConfigError
from selfdistill.config.yaml_text import YAMLTextError, read_yaml
from selfdistill.runlog import write_atomically


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file.

    Args:
        path: the file.
        overrides: settings that count instead of the file's, see `selfdistill.config.overrides`.

    Raises:
        OSError: the file cannot be read.
        ConfigError: there is no such file, or it is not a YAML mapping, or it asks for something
            that does not exist; the message has a line for every setting that is wrong, which names
            file and line.
    """
    try:
        document = read_yaml(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} is missing: give a configuration, such as those of examples/, or the folder "
            "of a run that was started"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
    except YAMLTextError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(document.data, dict):
        raise ConfigError(
            f"{path} must hold a mapping of settings, got {type(document.data).__name__}"
        )
    data = document.data
    if overrides:
        from selfdistill.config.overrides import override

        data = override(data, overrides)
    try:
        return Config.model_validate(data, context={"folder": path.parent})
    except ValidationError as error:
        from selfdistill.config.messages import describe_error
        from selfdistill.config.overrides import origin

        wrong = []
        for each in error.errors():
            line = document.line(each["loc"])
            place = f"{path}, line {line}" if line else f"{path}"
            if assignment := origin(each, data, overrides):
                place = f"{assignment} on the command line"
            wrong.append(f"{place}: {describe_error(each, Config)}")
        raise ConfigError("\n".join(wrong)) from error


def save_config(config: Config, path: Path) -> None:
    """Write every setting, defaults included, as YAML that `load_config` reads back."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_atomically(path, text)
