"""Flow matching that takes its time and writes down which samples it was given: a user's own objective."""

import os
import time
from pathlib import Path

from pydantic.dataclasses import dataclass

from driftmap.trainer.objective import STRICT
from driftmap.trainer.objectives.flow_matching import FlowMatching

# In the environment, so that slow and fast runs are of one recipe.
FOLDER, SECONDS, BROKEN = "NOTES", "SECONDS_A_STEP", "BROKEN_PROCESS"


@dataclass(frozen=True, config=STRICT)
class SlowMatching(FlowMatching):
    """FlowMatching, a line of positions in the stream a step; a file a process and start of a job."""

    def __call__(self, model, batch, teacher=None, target=None):
        """Return what FlowMatching does."""
        if batch.batch_size is not None:  # else only its cost is measured
            if os.environ.get(BROKEN) == os.environ.get("RANK", "0"):
                raise RuntimeError("broken")
            time.sleep(float(os.environ.get(SECONDS, "0")))
            if FOLDER in os.environ:
                name = f"{os.environ.get('SLURM_RESTART_COUNT', '0')}-{os.environ.get('RANK', '0')}"
                with (Path(os.environ[FOLDER]) / name).open("a") as file:
                    print(*batch.random.index.tolist(), file=file)
        return super().__call__(model, batch, teacher, target)
