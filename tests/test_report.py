"""A report is one page that shows what run folders hold, asks for nothing else and trusts no text in them."""

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from driftmap.trainer.charts import means
from driftmap.trainer.report import grid, read_log, write_report
from run_folders import HOSTILE, log_line, make_evaluation, make_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--enable-logging=stderr --v=0 --headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --virtual-time-budget=4000"
).split() + ["--host-resolver-rules=MAP * ~NOTFOUND"]  # a browser has errands of its own: it reaches nobody


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = [make_run(folder / HOSTILE), make_run(folder / "student-lagrangian")]
    evaluation = make_evaluation(folder / "evaluation.json")
    return write_report(folder / "report.html", runs=runs, evaluation=evaluation)


def rows_of(text: str) -> list[list[str]]:
    """List the cells of the table of numbers, row by row."""
    body = re.search(r"<tbody>(.*?)</tbody>", text, re.DOTALL)
    assert body
    return [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in body[1].split("</tr>") if "<td" in row]


def test_the_table_puts_teacher_and_student_of_one_number_of_evaluations_side_by_side(page: Path):
    text = page.read_text()
    rows = {row[0]: row[1:] for row in rows_of(text)}
    assert list(rows) == ["1", "2", "4", "8", "16", "50"]
    assert rows["4"][:6] == ["7.431", "3.474", "2.310", "1.080", "0.02841", "0.01328"]
    assert rows["4"][-2:] == ["0.7654", "0.7654"]
    assert rows["16"][:4] == ["3.597", "", "1.118", ""]
    assert "Fréchet distance, small classifier" in text
    assert "FID" not in text
    assert "Precision &lt;i&gt;" in text


def test_the_sentence_on_top_names_the_fewest_evaluations_that_are_nearly_the_best(page: Path):
    sentence = "In 4 evaluations the student reaches 1.08 times the teacher&#39;s Fréchet distance in 50"
    assert f"{sentence}; the teacher itself in 4: 2.31." in page.read_text()


def test_a_blind_metric_gets_no_sentence_and_no_ratio(page: Path):
    evaluation = json.loads((page.parent / "evaluation.json").read_text())
    for row in evaluation["rows"]:
        row["ratio"] = None
    (page.parent / "blind.json").write_text(json.dumps(evaluation | {"blind": ["frechet", "kernel"]}))
    runs = [page.parent / "student-lagrangian"]
    text = write_report(
        page.parent / "blind.html", runs=runs, evaluation=page.parent / "blind.json"
    ).read_text()
    assert "<strong>Blind:</strong> Fréchet distance, small classifier, Kernel distance." in text
    assert "Kernel distance (blind)</th>" in text and "Blind" not in page.read_text()
    assert "the student reaches" not in text and "Times the teacher" not in text
    assert rows_of(text)[0][:3] == ["1", "47.35", "4.301"], "the distance itself is shown"


def test_floors_stand_under_the_table(page: Path):
    foot = re.search(r"<tfoot>(.*?)</tfoot>", page.read_text(), re.DOTALL)
    assert foot and re.findall(r"floor: (\w+)</th><td[^>]*>([^<]*)<", foot[1]) == [
        ("reconstruction", "2.050"),
        ("self", "1.100"),
    ]


def test_the_page_refers_to_nothing_outside_itself(page: Path):
    text = page.read_text()
    references = re.findall(
        r"""<[^>]*?\b(?:src|href|srcset|action|data|poster)\s*=\s*["']?([^"'\s>]*)""", text
    )
    assert len(references) > 10
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in references)
    assert not re.search(r"@import|url\((?!['\"]?#)|<script|<link|https?://", text)


def test_text_from_a_run_stays_text(page: Path):
    text = page.read_text()
    assert "<title>run &lt;img src=x onerror=alert(1)&gt;, student-lagrangian</title>" in text
    assert "&#34;&gt;&lt;img src=x onerror=alert(2)&gt;.png</figcaption>" in text
    assert "note: &lt;b&gt;bold&lt;/b&gt;" in text
    assert "loss_&lt;i&gt;$\\frac$" in text
    assert not re.search(r"<img src=x|<b>bold|<i>", text)


def test_the_same_input_gives_the_same_bytes(page: Path):
    folder = page.parent
    runs = [folder / HOSTILE, folder / "student-lagrangian"]
    again = write_report(folder / "again.html", runs=runs, evaluation=folder / "evaluation.json")
    assert again.read_bytes() == page.read_bytes()


def test_a_chart_has_ids_of_its_own(page: Path):
    charts = re.findall(r"<svg.*?</svg>", page.read_text(), re.DOTALL)
    assert len(charts) == 3 + 1 + 2 * 2, "quality, time bins side by side, and each run's own"
    ids = [name for chart in charts[:4] for name in re.findall(r'\bid="([^"]*)"', chart)]
    assert len(ids) == len(set(ids))
    assert ">0.05<" in charts[2], "one exact end point takes the logarithmic axis away"
    for chart in charts:
        assert set(re.findall(r'(?:href="|url\()#([^")]*)', chart)) <= set(
            re.findall(r'\bid="([^"]*)"', chart)
        )
        assert "#fd" not in chart and "#fe" not in chart, "a stand-in colour is left"


def test_a_log_of_a_killed_and_resumed_process_is_read(tmp_path: Path):
    whole, killed = log_line(20, loss=0.25), log_line(30, loss=0.5)[:40]
    lines = [
        log_line(10, loss=1.0),
        whole,
        killed + log_line(20, loss=0.125),
        log_line(20, loss=0.75),
        killed,
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    log, unreadable = read_log(tmp_path / "log.jsonl")
    assert [(row["step"], row["loss"]) for row in log] == [(10, 1.0), (20, 0.75)]
    assert unreadable == 2
    text = write_report(tmp_path / "report.html", runs=[tmp_path], evaluation=None).read_text()
    assert "2 unreadable lines" in text
    assert re.search(r"Last loss</dt><dd>0.7500<", text)


def test_a_long_curve_is_drawn_as_means_of_neighbours():
    assert means([3.0, 1.0]) == [3.0, 1.0]
    assert means(range(600)) == [3.0 * place + 1 for place in range(200)]
    assert means(range(201))[-1] == 200


def test_what_is_missing_is_said_with_the_command_that_makes_it(tmp_path: Path):
    (tmp_path / "versions.json").write_text("{}")
    text = write_report(
        tmp_path / "report.html", runs=[tmp_path], evaluation=tmp_path / "no.json"
    ).read_text()
    for command, file in (
        ("driftmap evaluate RUN", "evaluation.json"),
        ("driftmap train CONFIG", "log.jsonl"),
        ("driftmap train CONFIG", "recipe.yaml"),
        ("driftmap train CONFIG", "versions.json"),
    ):
        assert f"<code>{command}</code> writes {file}" in text
    assert "samples/*.png" in text
    assert "<svg" not in text and 'class="lead"' not in text


def test_a_loss_that_is_not_finite_or_not_positive_is_drawn_and_said(tmp_path: Path):
    lines = [
        log_line(step, loss=loss)
        for step, loss in ((1, -2.0), (2, float("nan")), (3, 0.5), (4, float("inf")))
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    text = write_report(tmp_path / "report.html", runs=[tmp_path], evaluation=None).read_text()
    assert "not finite in 2 of 4 logged steps" in text
    assert text.count("<svg") == 2


def test_a_mistake_is_answered_with_the_file_and_what_to_do(tmp_path: Path):
    with pytest.raises(ValueError, match="at least one run"):
        write_report(tmp_path / "report.html", runs=[], evaluation=None)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty is no run.*driftmap train"):
        write_report(tmp_path / "report.html", runs=[empty], evaluation=None)
    (empty / "log.jsonl").write_text("")
    evaluation = tmp_path / "evaluation.json"
    for content, message in (
        ('{"rows": [', "evaluation.json holds no JSON object"),
        ('{"rows": [{"model": "pupil", "nfe": 4}]}', "row 0 is .*pupil.*teacher or student"),
        ('{"rows": [{"model": "student"}]}', "row 0 is .*`nfe`"),
    ):
        evaluation.write_text(content)
        with pytest.raises(ValueError, match=message):
            write_report(tmp_path / "report.html", runs=[empty], evaluation=evaluation)
    assert not (tmp_path / "report.html").exists()


def test_pictures_of_one_model_are_a_row_in_order_of_evaluations(page: Path):
    captions = re.findall(r"<figcaption>([^<]*\.png)</figcaption>", page.read_text())[:7]
    assert captions[:4] == [
        "teacher-nfe-04.png",
        "teacher-nfe-50.png",
        "student-nfe-01.png",
        "student-nfe-04.png",
    ]
    assert captions[5:] == ["held-out.png", "reconstructions.png"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_every_image_in_reading_order(channels: int):
    images = torch.randint(
        0, 256, (5, channels, 6, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    picture = numpy.asarray(Image.open(io.BytesIO(grid(images, 3))))
    assert picture.shape == (6 + 2 + 6, 4 + 2 + 4 + 2 + 4, 4)
    for place, image in enumerate(images):
        top, left = place // 3 * 8, place % 3 * 6
        cell = picture[top : top + 6, left : left + 4]
        assert (cell[..., :3] == image.permute(1, 2, 0).numpy()).all()
        assert (cell[..., 3] == 255).all()
    assert (picture[:, 4:6, 3] == 0).all() and (picture[8:, 12:] == 0).all()


@pytest.mark.parametrize(
    ("images", "columns"),
    [
        (torch.zeros(2, 3, 4, 4), 2),
        (torch.zeros(2, 4, 4, 4, dtype=torch.uint8), 2),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), 2),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), 2),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 0),
    ],
)
def test_a_grid_refuses_what_is_no_picture(images: torch.Tensor, columns: int):
    with pytest.raises(ValueError, match="a grid takes uint8 images"):
        grid(images, columns)


@pytest.mark.skipif(not BROWSER, reason="no chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.parametrize(
    "broken", [False, True], ids=["the page", "a page with faults, to see that they show"]
)
def test_a_browser_opens_the_page_without_an_error_or_a_request(page: Path, tmp_path: Path, broken: bool):
    shown = page
    if broken:
        shown = tmp_path / "broken.html"
        fault = "<script>console.log('seen'); fetch('http://127.0.0.1:9/x')</script>"
        shown.write_text(re.sub(r"<meta http-equiv[^>]*>", "", page.read_text()) + fault)
    log, picture = tmp_path / "network.json", tmp_path / "page.png"
    options = [
        *QUIET,
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--log-net-log={log}",
        f"--screenshot={picture}",
    ]
    done = subprocess.run(
        [str(BROWSER), *options, shown.as_uri()], capture_output=True, text=True, timeout=60
    )
    assert picture.is_file(), done.stderr
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    # An event a line; requests of the browser's own (time, updates) say that no origin began them.
    started = [line for line in log.read_text().splitlines() if '"initiator"' in line]
    requests = [line for line in started if '"initiator":"not an origin"' not in line]
    assert bool(complaints) == broken, done.stderr
    assert bool(requests) == broken, requests
