"""Errors in a command's own words: the library names an argument (run, `score`), the command a flag (RUN, --score)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from typer.core import TyperCommand

from bossnas.errors import ConfigError

MARKED = re.compile(r"`([a-z_]+(?:\.[a-z_]+)*)`")  # the name of a thing, in what an error says to do


class Command(TyperCommand):
    """A command that translates the errors of the library: each name that is one of its parameters' becomes the flag or
    argument that its --help shows. ``others``: further names of parameters, see `knowing`."""

    others: Mapping[str, str] = {}

    @classmethod
    def knowing(cls, others: Mapping[str, str]) -> type[Command]:
        """Such a command whose parameters the library calls by other names too: name in the library -> parameter.

        Where the command reads a config, such a name means the parameter only if that was given: it may be a key of
        the config as well, and the mistake is there then.
        """
        return type(cls.__name__, (cls,), {"others": others})

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            field = " ".join(self._shown(name, ctx.params) for name in error.field.split(" "))
            fix = MARKED.sub(lambda marked: self._typed(marked[1], ctx.params), error.fix)
            raise ConfigError(field, error.problem, fix) from error

    def _typed(self, name: str, given: Mapping[str, Any]) -> str:
        """What to type for a name that a fix marks: its flag; for the run's folder, where it is a key of the config,
        the override."""
        shown = self._shown(name, given)
        takes_overrides = any(parameter.name == "overrides" for parameter in self.params)
        return "--set out=FOLDER" if shown == "out" and takes_overrides else shown

    def _shown(self, name: str, given: Mapping[str, Any]) -> str:
        parameters = {parameter.name: parameter for parameter in self.params}
        own = self.others.get(name, name)
        if own not in parameters or (name in self.others and "config" in parameters and given[own] is None):
            return name
        parameter = parameters[own]
        if parameter.param_type_name == "argument":
            return parameter.metavar or own
        return next(flag for flag in parameter.opts if flag.startswith("--"))
