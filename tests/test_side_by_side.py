"""Runs stand side by side where features, samples and pictures are the same; else they stand alone."""

import json
import re
from pathlib import Path

import pytest

from driftmap.trainer.report import write_report
from run_folders import checkers, make_evaluation, make_run


def change(folder: Path, *, student: float = 1.0, **settings: object) -> Path:
    """Rewrite a run's evaluation: the student's distances times a factor, and other settings."""
    evaluation = json.loads((folder / "evaluation.json").read_text()) | settings
    for row in evaluation["rows"]:
        row["frechet"] *= student if row["model"] == "student" else 1
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    folders = [make_run(tmp_path / name) for name in ("eulerian", "lagrangian", "semigroup")]
    for folder in folders:
        make_evaluation(folder / "evaluation.json")
    change(folders[1], student=0.5)
    change(folders[2], features="another network")
    return folders


def text_of(runs: list[Path]) -> str:
    page = write_report(runs[0] / "report.html", runs=runs, evaluation=runs[0] / "evaluation.json")
    return page.read_text()


def side_by_side(text: str) -> str:
    """Give the section of the comparison."""
    found = re.search(r"<h2>Side by side</h2>.*?</section>", text, re.DOTALL)
    assert found
    return found[0]


def table_of(section: str) -> dict[str, list[str]]:
    """List the distances of every row of the first table by its name."""
    body = re.search(r"<tbody>(.*?)</tbody>", section, re.DOTALL)
    assert body
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in body[1].split("</tr>") if "<td" in row]
    return {name: values for name, *values in rows}


def test_the_distances_of_comparable_runs_stand_in_one_table_and_their_teacher_once(runs: list[Path]):
    section = side_by_side(text_of(runs[:2]))
    rows = table_of(section)
    assert list(rows) == ["eulerian", "lagrangian", "the teacher"]
    assert rows["eulerian"][:3] == ["4.301", "3.735", "3.474"]
    assert rows["lagrangian"][:3] == ["2.151", "1.867", "1.737"]
    assert rows["the teacher"][-1] == "3.217" and rows["lagrangian"][-1] == ""
    assert section.count("<svg") == 2
    assert "network evaluations per sample" in section and "seconds per sample" in section
    assert all(section.count(f">{name}</text>") == 2 for name in rows), "each is in both legends"


def test_runs_that_learned_no_jumps_stand_under_their_own_names(runs: list[Path]):
    for run in runs[:2]:
        rows = json.loads((run / "evaluation.json").read_text())["rows"]
        change(run, rows=[row for row in rows if row["model"] == "teacher"])
    assert list(table_of(side_by_side(text_of(runs[:2])))) == ["eulerian", "lagrangian"]


def test_what_was_seen_by_other_eyes_stands_alone(runs: list[Path]):
    section = side_by_side(text_of(runs))
    assert "semigroup" not in table_of(section)
    assert "semigroup stands alone: no other run was evaluated by the same features" in section


@pytest.mark.parametrize("settings", [{"num_samples": 50}, {"reference": "other"}, {"features_hash": "1"}])
def test_numbers_of_other_samples_are_not_compared(settings: dict, runs: list[Path]):
    change(runs[1], **settings)
    assert "<table" not in side_by_side(text_of(runs[:2]))


def test_teachers_that_differ_are_named_after_their_students(runs: list[Path]):
    evaluation = json.loads((runs[1] / "evaluation.json").read_text())
    evaluation["rows"][0]["frechet"] += 1
    (runs[1] / "evaluation.json").write_text(json.dumps(evaluation))
    rows = table_of(side_by_side(text_of(runs[:2])))
    assert {"teacher of eulerian", "teacher of lagrangian"} <= rows.keys()


def test_pictures_of_one_seed_stand_together_and_of_two_apart(runs: list[Path]):
    for name in ("student-nfe-01.png", "student-nfe-04.png"):
        (runs[1] / "samples" / name).write_bytes(checkers(5))
    text = text_of(runs[:2])
    together = re.findall(r"<figcaption>([^<]*): [^<]*\.png</figcaption>", side_by_side(text))
    rows = ["eulerian: teacher", "eulerian: student", "lagrangian: student"]
    assert together == [name for name in rows for _ in range(2)], "the teacher of both is seen once"
    assert text.count("student-nfe-04.png") == 2, "each picture is in the page once"
    change(runs[1], seed=4)
    text = text_of(runs[:2])
    assert "<img" not in side_by_side(text) and text.count("student-nfe-04.png") == 2


@pytest.mark.parametrize("by, name", [("t", "time bin (0: data)"), ("gap", "gap bin (0: short jumps)")])
def test_losses_by_bin_of_all_runs_share_a_chart(runs: list[Path], by: str, name: str):
    for run in runs[:2]:
        log = run / "log.jsonl"
        log.write_text(log.read_text().replace("error_t", f"error_{by}"))
    text = text_of(runs[:2])
    chart = re.search(r"<h2>Losses by time and gap</h2>.*?</section>", text, re.DOTALL)
    assert chart and f"error by {name} at the end" in chart[0]
    assert all(f">{run.name}</text>" in chart[0] for run in runs[:2])
    assert text.count(f"<figcaption>error by {name}</figcaption>") == 2, "each run's own"
    assert "Losses by time and gap" not in text_of(runs[:1])


def test_runs_of_one_name_are_told_apart_by_the_folders_above(tmp_path: Path):
    runs = [make_run(tmp_path / place / "flow-map") for place in ("a", "b")]
    text = text_of(runs)
    assert "<h1>a/flow-map, b/flow-map</h1>" in text


def test_a_blind_comparison_says_in_which_runs(runs: list[Path]):
    change(runs[1], blind=["frechet"])
    assert "<strong>This metric is blind</strong> in lagrangian" in side_by_side(text_of(runs[:2]))


def write_likelihood(run: Path, *, shift: float = 0.0, **settings: object) -> None:
    """Write a likelihood as `driftmap likelihood` does: a bound term by term, and a density."""
    about = {"data": "0123", "space": "pixels"} | settings
    bound = {"value": 3.75 + shift, "standard_error": 0.03125, "decoder": "discretised"} | about
    bound |= {"terms": {"L_N": 0.25, "L_between": 1.5, "L_0": 2.0}}
    bound["by_step"] = {"bits_per_dim": [2.0, 1.0, 0.5], "square_error": [0.01, 0.04, 0.16]}
    density = {"value": 3.125, "standard_error": 0.0625} | about
    found = {"run": run.name, "bound_bits_per_dim": bound, "ode_bits_per_dim": density}
    (run / "likelihood.json").write_text(json.dumps(found))


def likelihood_section(text: str) -> str:
    found = re.search(r"<h2>Likelihood</h2>.*?</section>", text, re.DOTALL)
    return found[0] if found else ""


def test_bounds_and_densities_have_columns_of_their_own_and_curves_share_a_chart(runs: list[Path]):
    for run, shift in zip(runs[:2], (0, 0.25), strict=True):
        write_likelihood(run, shift=shift)
    section = likelihood_section(text_of(runs))
    heads = re.findall(r"<th>([^<]*)</th>", section)
    assert heads == ["Variational bound", "Density of the flow"], "none for what nobody has"
    assert table_of(section) == {
        "eulerian": ["3.750 ± 0.03125", "3.125 ± 0.06250"],
        "lagrangian": ["4.000 ± 0.03125", "3.125 ± 0.06250"],
    }
    assert section.count("<svg") == 1 and "RMSE on the scale 0..255" in section
    assert all(f">{run.name}</text>" in section for run in runs[:2])
    assert likelihood_section(text_of(runs[2:])) == ""


def test_likelihoods_of_other_data_or_spaces_stand_in_other_tables(runs: list[Path]):
    write_likelihood(runs[0])
    write_likelihood(runs[1], space="latents of the autoencoder 0a1b")
    section = likelihood_section(text_of(runs[:2]))
    assert section.count("<table") == section.count("<svg") == 2


def test_a_likelihood_that_is_not_whole_is_refused(runs: list[Path]):
    (runs[0] / "likelihood.json").write_text('{"ode_bits_per_dim": {"value": 3}}')
    with pytest.raises(
        ValueError, match="likelihood.json of eulerian is not whole: run `driftmap likelihood`"
    ):
        text_of(runs)
