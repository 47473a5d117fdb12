"""The one exception for what a user can mend."""

from __future__ import annotations


class ConfigError(ValueError):
    """A mistake that the user can mend. Reads "field: problem; fix" on one line."""

    def __init__(self, field: str, problem: str, fix: str):
        super().__init__(f"{field}: {problem}; {fix}")
        self.field, self.problem, self.fix = field, problem, fix
