"""Run folders as a report reads them: invented logs, evaluations and pictures, with hostile text."""

import json
from pathlib import Path

import torch

from driftmap.trainer.report import grid

HOSTILE = "run <img src=x onerror=alert(1)>"
HOSTILE_CAPTION = '"><img src=x onerror=alert(2)>.png'


def log_line(step: int, *, loss: float) -> str:
    """Give one line of log.jsonl with three time bins."""
    row = {"step": step, "samples": step * 128, "loss": loss, "loss_<i>$\\frac$": loss / 2}
    row |= {"images_per_s": 812.0 + step % 7, "data_wait_percent": 0.4, "time_s": 0.16 * step}
    return json.dumps(row | {f"error_t{place}": loss * 0.5**place for place in range(3)})


def checkers(shade: int) -> bytes:
    """Draw a grid of 8 invented images in 4 columns."""
    images = torch.arange(8 * 3 * 16 * 16).view(8, 3, 16, 16) * shade % 251
    return grid(images.to(torch.uint8), 4)


def make_run(folder: Path) -> Path:
    """Write a run folder with everything in it."""
    samples = folder / "samples"
    samples.mkdir(parents=True)
    for name in ("teacher-nfe-04.png", "teacher-nfe-50.png", "student-nfe-01.png", "student-nfe-04.png"):
        (samples / name).write_bytes(checkers(len(name)))
    for name in ("held-out.png", "reconstructions.png", HOSTILE_CAPTION):
        (samples / name).write_bytes(checkers(3))
    lines = [log_line(step, loss=1.5 / (1 + step / 500) + 0.05 * (step % 3)) for step in range(10, 4010, 10)]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text("seed: 7\nobjective: {name: lagrangian}\nnote: <b>bold</b>\n")
    (folder / "versions.json").write_text(
        json.dumps({"torch": "2.13.0", "git": "0123abc", "machine": "2 cores"})
    )
    return folder


def make_evaluation(path: Path) -> Path:
    """Write an evaluation of a teacher and a student, with a column that the report has not heard of."""
    measured = {
        "teacher": {1: 14.72, 2: 6.113, 4: 2.31, 8: 1.402, 16: 1.118, 50: 1.0},
        "student": {1: 1.337, 2: 1.161, 4: 1.08, 8: 1.071},
    }
    rows = [
        {"model": model, "nfe": nfe, "frechet": 3.217 * ratio, "ratio": ratio, "kernel": 0.0123 * ratio}
        | {
            "endpoint_error": 0.21 * (ratio - 1) / nfe,
            "seconds_per_sample": 0.003 * nfe,
            "precision <i>": 0.7654,
        }
        for model, ratios in measured.items()
        for nfe, ratio in ratios.items()
    ]
    evaluation = {"features": "small classifier", "num_samples": 10000, "many_nfe": 50, "rows": rows}
    evaluation |= {"floor": {"self": {"frechet": 1.1}, "reconstruction": {"frechet": 2.05}}}
    evaluation |= {"blind": [], "guidance": 1.5, "seed": 3}
    evaluation |= {"autoencoder": "our own, 4 channels", "reference": "held-out split"}
    path.write_text(json.dumps(evaluation))
    return path
