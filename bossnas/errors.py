"""What a user can mend, how a run ends that was asked to stop, and the exit codes of both."""

from __future__ import annotations

USER_ERROR = 2  # exit code of a mistake that the user can mend
RESUMABLE = 75  # exit code (EX_TEMPFAIL) of a run that was asked to stop and has saved its state


class ConfigError(ValueError):
    """A mistake that the user can mend. Reads "field: problem; fix" on one line.

    ``field`` is an argument of the function, the thing itself or a key of the config, such as train.lr; ``fix`` names
    other arguments as `force`. Neither speaks of options: on the command line `bossnas.cli.flags` puts
    the options in their place.
    """

    def __init__(self, field: str, problem: str, fix: str):
        super().__init__(f"{field}: {problem}; {fix}")
        self.field, self.problem, self.fix = field, problem, fix


class Stopped(Exception):
    """The run was asked to stop by ``signal`` (its number) and its state is saved. ``parent``: the process that had
    started this one."""

    def __init__(self, message: str, signal: int = 0, parent: int = 0):
        super().__init__(message)
        self.signal, self.parent = signal, parent
