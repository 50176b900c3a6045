"""What every command does: errors become one sentence and an exit code, libraries keep quiet."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from sstf.errors import SstfError, Stopped


def guarded(
    err: Console, work: Callable[[], int | None], interrupted: str = "interrupted; the same command goes on from here"
) -> int:
    """Run `work` and turn its errors into an exit code and one sentence. `work` may return an exit code of its own."""
    try:
        return work() or 0
    except Stopped as stopped:
        err.print(str(stopped), highlight=False, markup=False, soft_wrap=True)
        return 0
    except SstfError as error:
        complain(err, str(error))
        return error.exit_code
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "the disk is full; free some space and run the command again: what is done is kept"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            what = f"no permission to use {error.filename}; choose another output_dir or change the permission"
        else:
            raise
        complain(err, what)
        return 2
    except KeyboardInterrupt:
        err.print(interrupted, highlight=False, soft_wrap=True)
        return 130


def complain(err: Console, message: str) -> None:
    """One line of error."""
    # As `Text`: rich would take brackets and colons in file names for markup.
    err.print(Text.assemble(("error:", "bold red"), " ", message), soft_wrap=True)


def quiet_libraries() -> None:
    """Bars and advice of the libraries below would drown our own."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
