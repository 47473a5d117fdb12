"""How one rank's program begins and ends. Imports torch only where there is a group of ranks to join: help and
mistakes in a config are then told at once."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from bossnas.distributed.environment import env_int, read_srun
from bossnas.errors import RESUMABLE, USER_ERROR, ConfigError, Stopped

GRACE_SECONDS = 3.0  # the other ranks leave rank 0 this long to report the mistake that all of them see


def run(function: Callable[[], Any], timeout_minutes: float = 30) -> int:
    """Runs one rank's program: `group.init`, ``function()``, `group.shutdown`. Returns or exits with the exit code.

    0: done; 2: a mistake of the user, one line on stderr; 75: asked to stop, saved and able to go on; 130: interrupted;
    1: anything else, with traceback; a SystemExit keeps its code. With one rank the code is returned, with more the
    process ends.
    """
    joined, me = False, 0
    try:
        joined = _join(timeout_minutes)
        me = env_int("RANK", 0) if joined else 0
        function()
        code = 0
    except ConfigError as error:
        code = USER_ERROR
        if me > 0:
            time.sleep(GRACE_SECONDS)
        print(f"error: {error}", file=sys.stderr)
    except Stopped as stop:
        code = RESUMABLE
        if joined:  # this process ends, and a launcher may send a signal once more
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
        if me == 0:
            print(stop, file=sys.stderr)
        _tell_elastic_agent(stop)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else int(request.code is not None)
        if isinstance(request.code, str):
            print(request.code, file=sys.stderr)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            code = _unexpected(joined, me)
        else:
            code = USER_ERROR
            print(
                f"error: out: the disk is full ({error.filename or 'while writing'}); free some space and go on with "
                "--resume auto",
                file=sys.stderr,
            )
    except Exception:
        code = _unexpected(joined, me)
    group = sys.modules.get("bossnas.distributed.group")
    if group is not None:  # else nobody has made a group, and importing it would import torch
        group.shutdown(code)
    return code


def _join(timeout_minutes: float) -> bool:
    """Joins the group of ranks that the environment describes; whether there is one."""
    read_srun()
    if env_int("WORLD_SIZE", 1) == 1:
        return False
    from bossnas.distributed import group

    group.init(timeout_minutes)
    return True


def _tell_elastic_agent(stop: Stopped) -> None:
    """torchrun with restarts takes exit code 75 for a failure and would start the ranks again; its agent stops on
    SIGTERM. Where the agent was asked first, it passed SIGTERM or SIGINT on and need not be told."""
    restarts = env_int("TORCHELASTIC_MAX_RESTARTS", 0)
    if stop.signal == signal.SIGUSR1 and restarts > 0 and env_int("LOCAL_RANK", 0) == 0 and os.getppid() == stop.parent:
        os.kill(stop.parent, signal.SIGTERM)


def _unexpected(joined: bool, me: int) -> int:
    """Reports the exception at hand. With other ranks it waits: often it is their end that caused it, and then the
    launcher acts on their exit code first."""
    text = traceback.format_exc()
    if joined:
        time.sleep(GRACE_SECONDS)
    print(f"rank {me} failed:\n{text}", file=sys.stderr, end="")
    return 1
