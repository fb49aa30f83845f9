"""What every command says and how it ends: errors in one sentence, signals in one line."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from emreason.runs.checks import check_arguments, quoted
from emreason.runs.interrupt import stop_on_signals
from emreason.types import UserError, plain

EXPECTED = (UserError, HydraException, OmegaConfBaseException, OSError)
"""Errors that are told in one sentence; anything else is a bug and keeps its traceback."""


def report_errors(task: Callable[[], Any], again: str = "goes on where it stopped") -> None:
    """Run a console script. What the user can mend, and what the system refuses, is one sentence on stderr and exit code 1; a signal ends
    it with one line and exit code 128 + its number. Neither is a traceback.

    Args:
        again: what the same command does after an interruption.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let the error through as it is, without Hydra's own summary
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    find_here()
    with stop_on_signals() as stop:
        try:
            # Hydra's parser wants -m before all overrides, or behind them
            sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in SWEEP)
            sys.argv[1:] = [quoted(argument, sweep=sys.argv[1] in SWEEP) for argument in sys.argv[1:]]
            check_arguments(sys.argv[1:])
            task()
        except EXPECTED as error:
            if stop.signal is None:
                print(f"error: {one_sentence(error)}", file=sys.stderr)
                sys.exit(1)
        except BaseException:
            if stop.signal is None:
                raise
    if stop.signal is not None:
        stop.leave(again)


SWEEP = ("-m", "--multirun")


def find_here() -> None:
    """What a `_target_` names may stand in the working directory; behind all else, which it must not hide."""
    if (here := os.getcwd()) not in sys.path:  # noqa: PTH109  (as typed, like Python's own entry)
        sys.path.append(here)


def one_sentence(error: BaseException) -> str:
    """What the user is told: our own message where there is one below Hydra's wrapping, else Hydra's without its line breaks."""
    cause: BaseException | None = error
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        mend = "make room and give the same command again; nothing is lost" if full else "use a place that can be read and written"
        text = f"{error.filename or 'a file'}: {error.strerror}; {mend}."
    if isinstance(error, OverrideParseException):
        text = f"{error.override} is not a valid override: {text}"
    while cause is not None:
        if isinstance(cause, UserError):
            text = str(cause)
            break
        cause = cause.__cause__
    text = text.partition("Config search path:")[0]  # where Hydra looked is no help
    if plugin := re.search(r"Could not load '(hydra/(?:launcher|sweeper)/(submitit|joblib|ray|optuna))", text):
        text = f"{plugin[1]}: the package that brings it is not installed: pip install 'emreason[{plugin[2]}]'."
    if text.startswith("Could not override"):
        command = "emreason-eval" if "emreason-eval" in sys.argv[0] else "emreason"
        text = f"{text}, or see every key there is: {command} --cfg job"
    return plain(" ".join(text.split()))


def quiet() -> None:
    """Silence what libraries say about themselves; our own lines and errors remain. They are loaded here: loading resets their levels."""
    import lightning  # noqa: F401
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    logging.getLogger("transformers.quantizers.quantizer_gguf").setLevel(logging.ERROR)  # its advice is on a form that is not kept
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    # which rank died, and that the others are ended for it
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    warnings.filterwarnings("ignore", category=FutureWarning)
