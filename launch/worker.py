"""What a job does in each of its processes: a `driftmap` command, at the meeting point of its launcher.

The command itself saves and ends with a code that says why (trainer/signals.py); the job's script requeues by
that code (slurm.py), when all processes have ended.
"""

import os
import sys
from dataclasses import dataclass

from submitit.core.utils import DelayedSubmission

from ..trainer.signals import ExitCode, interrupt_at_signals, tell_end


@dataclass(frozen=True)
class Worker:
    """A command, given by its words, to be called by submitit in every process of a job."""

    words: tuple[str, ...]

    def __call__(self) -> None:
        """Run the command; SystemExit with its code where it has not ended well."""
        # In place of submitit's, which requeues at once: the loops end where all processes agree on it.
        interrupt_at_signals()
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":  # of srun, trainer/launcher.py knows
            _meet()
        from .cli import main

        sys.argv = ["driftmap", *self.words]
        try:
            main()
        except SystemExit as ended:
            if ended.code == ExitCode.MISTAKE:
                tell_end(ExitCode.MISTAKE)
            if ended.code not in (None, 0):
                raise
        except Exception:
            tell_end(ExitCode.FAILED)
            raise

    def checkpoint(self) -> DelayedSubmission:
        """Return this command again, for a signal that comes before any work: it goes on by itself."""
        return DelayedSubmission(self)


def _meet() -> None:
    """Set the variables by which the processes of this machine find each other."""
    from submitit.helpers import TorchDistributedEnvironment

    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
