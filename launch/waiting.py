"""`python -m driftmap.launch.waiting LOGS ID ...` waits for jobs of this machine, as afterok does on Slurm.

It ends with an error as soon as one of them has not ended well; `--any` waits for their ends only.
"""

import sys
import time
from pathlib import Path

from .job_states import states_of
from .jobs import Job

_POLL_S = 0.5


def wait(logs: Path, ids: list[str], *, ending_well: bool) -> bool:
    """Return whether all jobs ended as they should, or as soon as one did not."""
    jobs = [Job(job_id, "local", (), logs, logs, 1, 1, {}) for job_id in ids]
    while True:
        states = states_of(jobs).values()
        if ending_well and any(state.over and state.word != "COMPLETED" for state in states):
            return False
        if all(state.over for state in states):
            return True
        time.sleep(_POLL_S)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--any"]
    sys.exit(0 if wait(Path(words[0]), words[1:], ending_well="--any" not in sys.argv) else 1)
