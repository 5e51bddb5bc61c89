"""Which methods an analysis compares, and what it calls them."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import TypeAdapter, ValidationError

from selfdistill.analysis.comparison import flatten
from selfdistill.config import Config, ConfigError, Distillation, MethodConfig
from selfdistill.config.yaml_text import YAMLTextError, read_yaml


def parse_methods(text: str | None, config: Config) -> list[Distillation]:
    """Return the method sections that a text names, the run's teacher and loss in each.

    Args:
        text: names or YAML mappings with commas between them, such as
            "stepalign, {name: refsol}"; what a mapping leaves out is the default. None: the run's
            own method.
        config: of the run; a name that is its own method's means exactly that.

    Raises:
        ConfigError: not YAML, not a method, or one that follows no teacher's distribution.
    """
    own = config.method.model_dump(mode="json")
    shared = {}
    if isinstance(config.method, Distillation):
        shared = {"teacher": own["teacher"], "loss": own["loss"]}
    try:
        asked = [own] if text is None else read_yaml(f"[{text}]").data
    except YAMLTextError as error:
        raise ConfigError(f"methods: {text!r} is not a list of names or YAML: {error}") from error
    if not asked:
        raise ConfigError("methods: got none, expected names or mappings with commas between them")
    methods = TypeAdapter(MethodConfig)
    sections: list[Distillation] = []
    for entry in asked:
        section = {"name": entry} if isinstance(entry, str) else entry
        if section == {"name": own["name"]}:
            section = own
        try:
            found = methods.validate_python(section)
            if isinstance(found, Distillation):
                found = methods.validate_python({**shared, **section})
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'name'}: {e['msg']}" for e in error.errors()
            )
            raise ConfigError(
                f"methods: {entry!r} is not a method: {wrong}. Give names or mappings as under "
                "`method:` in a configuration, with commas between them"
            ) from error
        if not isinstance(found, Distillation):
            raise ConfigError(
                f"methods: {found.name} does not follow a teacher's distribution, whose advantage "
                "could be located token by token. Name a method that does, "
                "such as --methods stepalign,refsol: it is scored on this run's attempts"
            )
        sections.append(found)
    return sections


def method_labels(sections: Sequence[Distillation]) -> list[str]:
    """Return a short unique name for each section: the method's, and what it changes."""
    names = []
    for section in sections:
        found = flatten(section.model_dump(mode="json"))
        usual = flatten(type(section)().model_dump(mode="json"))
        changed = [
            f"{key.rsplit('.', 1)[-1]}={value}"
            for key, value in found.items()
            if value != usual.get(key) and key.split(".")[0] not in Distillation.model_fields
        ]
        name = found["name"]
        names.append(f"{name} ({', '.join(changed)})" if changed else name)
    return [
        name if names.count(name) == 1 else f"{name} #{names[: i + 1].count(name)}"
        for i, name in enumerate(names)
    ]
