"""Templates of one's own for the text of a turn, in Jinja's sandbox; loaded where one is set."""

from __future__ import annotations

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from selfdistill.config import ConfigError


class TextTemplate:
    """A Jinja template that may use some variables and must use one.

    Args:
        source: the template.
        setting: that holds it, for messages.
        needs: the variable that it must write.
        knows: the others that it may use.

    Raises:
        ConfigError: it is no template, asks for other variables, or leaves out the one it needs.
    """

    def __init__(self, source: str, *, setting: str, needs: str, knows: str) -> None:
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
        self._setting = setting
        try:
            used = meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"{setting} is no Jinja template: {error}") from error
        unknown = sorted(used - {needs, knows})
        if unknown:
            raise ConfigError(
                f"{setting} asks for {', '.join(unknown)}, but there are {needs} and {knows} only"
            )
        if needs not in used:
            raise ConfigError(
                f"{setting} does not write the {needs}: put {{{{ {needs} }}}} where it belongs"
            )

    def render(self, **values: str) -> str:
        """Return the text.

        Raises:
            ConfigError: the template fails on these values.
        """
        try:
            return self._template.render(**values)
        except Exception as error:  # a program of somebody else
            raise ConfigError(
                f"{self._setting} fails with {type(error).__name__}: {error}"
            ) from error
