"""The page samples, inverts and changes pictures in a browser without complaints, and asks nobody outside."""

import re
import shutil
import socket

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMapEulerDiscreteScheduler
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from driftmap.launch.app import Models, Shown, serve
from driftmap.launch.trying import shown_of
from driftmap.models.backbones.dit import DiT
from driftmap.models.pipeline import FlowMapPipeline
from driftmap.models.samplers import euler, jump, time_grid
from driftmap.models.text_encoder import load_text_encoder
from driftmap.trainer.build import load_flow_map
from driftmap.trainer.config import ConfigError
from driftmap.trainer.guiding import guided
from small_encoder import bert, write_encoder

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def shown(publishable):
    return shown_of(str(publishable / "dit"))


@pytest.fixture
def outside(monkeypatch):
    """Collect the hosts that this process looks for, and lead to none but this machine."""
    asked, look_up = [], socket.getaddrinfo

    def only_here(host, *rest, **more):
        if host not in ("127.0.0.1", "localhost", "::1", None):
            asked.append(host)
            raise OSError(f"no way to {host}")
        return look_up(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", only_here)
    return asked


def test_the_page_shows_what_the_runs_make(publishable, shown):
    """Its picture is the student's in so few jumps, the one beside the guided teacher's in many steps."""
    models = Models(shown)
    noise = torch.randn((1, 2, 8, 8), generator=torch.Generator().manual_seed(5))
    assert torch.equal(models.noise(5), noise)
    three = torch.tensor([3])
    student, teacher = (load_flow_map(publishable / name) for name in ("dit", "teacher"))
    states = models.walk(models.noise(5), models.times(2), "three", None)
    ours = jump(student, noise, grid=time_grid(2), condition=three)
    assert len(states) == 3 and (states[-1] - ours).abs().max() < 1e-5
    picture, told = models.beside("three", 5, None)
    many = euler(guided(teacher, 2.0), noise, grid=time_grid(32), condition=three)
    expected = np.asarray(models.pipe.decode(many)[0]).astype(int)
    assert np.abs(np.asarray(picture).astype(int) - expected).max() <= 1
    assert told.startswith("teacher, 64 evaluations, ")
    alone = Models(Shown(shown.model, "alone"))
    assert alone.beside("three", 5, None)[1].startswith("own velocity, 32 evaluations, ")


def test_a_picture_goes_to_noise_and_back(shown):
    models, given = Models(shown), Image.effect_noise((40, 48), 60)
    noise, back, told = models.invert(given, "one", 8, None)
    assert noise.size == back.size == (256, 256)
    assert float(told.split(" dB")[0]) > 20, "three steps of training barely move a state"
    same = models.renoise(given, "one", 0, 4, 0.05, None)
    other = models.renoise(given, "one", 0, 4, 1.0, None)
    data = np.asarray(
        models.pipe.decode(models.pipe.encode(given.crop((0, 4, 40, 44))))[0].resize((256, 256), 0)
    )
    near, far = (np.abs(np.asarray(found[1]).astype(int) - data).mean() for found in (same, other))
    assert near < far


@pytest.mark.skipif(not BROWSER, reason="no chromium, chromium-browser or google-chrome on PATH")
def test_a_person_samples_uploads_and_inverts_and_nobody_outside_is_asked(shown, outside, tmp_path):
    picture = tmp_path / "picture.png"
    Image.effect_noise((64, 64), 80).save(picture)
    blocks = serve(shown, block=False)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=BROWSER, args=QUIET)
            page = browser.new_page()
            errors, requests = [], []
            page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("request", lambda request: requests.append(request.url))
            page.goto(blocks.local_url)
            few, path = page.get_by_label("A few took"), page.locator(".grid-container img")
            for nfe in (4, 1):
                page.get_by_label("number input for Evaluations").fill(str(nfe))
                page.get_by_role("button", name="Sample").click()
                expect(few).to_have_value(re.compile(rf"^{nfe} evaluations?, \d"))
                expect(path).to_have_count(nfe + 1)
            expect(page.get_by_label("Many took")).to_have_value(re.compile(r"^teacher, 64 evaluations, \d"))
            before = path.last.get_attribute("src")
            page.get_by_label("Seed").fill("7")
            page.get_by_label("Seed").press("Enter")
            expect(path.last).not_to_have_attribute("src", before)
            page.get_by_role("tab", name="Invert and change").click()
            page.locator("input[type=file]").first.set_input_files(picture)
            page.get_by_role("button", name="To noise and back").click()
            expect(page.get_by_label("How near")).to_have_value(re.compile(r"^[\d.]+ dB; noise: mean"))
            page.get_by_role("button", name="Add noise and sample again").click()
            expect(page.get_by_role("tabpanel").locator("img:visible")).to_have_count(5)
            here = (blocks.local_url, "data:", "blob:")
            assert [url for url in requests if not url.startswith(here)] == []
            assert errors == [] and outside == []
            fault = "console.error('seen'); fetch('http://nobody.invalid/').catch(() => 0)"
            page.evaluate(fault)
            assert errors[0] == "seen" and requests[-1] == "http://nobody.invalid/", "faults would show"
            browser.close()
    finally:
        blocks.close()


def test_the_pipeline_reads_captions_as_the_trainer_does(tmp_path):
    place = write_encoder(tmp_path / "encoder", bert())
    told = {"name": place, "max_tokens": 6}
    network = DiT(sample_size=4, in_channels=3, width=8, depth=1, num_heads=2, text_width=16, max_tokens=6)
    pipe = FlowMapPipeline(FlowMapEulerDiscreteScheduler(), transformer=network, caption_encoder=told)
    prompts = ["a big red cat and the small green dog", "cat"]
    embeds, mask = pipe.embed(prompts)
    for found, seen, expected in zip(
        embeds, mask, load_text_encoder(place, max_tokens=6)(prompts), strict=True
    ):
        assert seen.sum() == len(expected)
        torch.testing.assert_close(found[seen], expected.half().float())
    assert isinstance(pipe, DiffusionPipeline) and len(pipe(prompt=prompts, output_type="pt").images) == 2


def test_what_cannot_be_shown_is_refused(publishable, tmp_path):
    with pytest.raises(ConfigError, match="is no run and no pipeline"):
        shown_of(str(tmp_path))
    with pytest.raises(ConfigError, match="no model that diffusers can load"):
        shown_of(str(publishable / "autoencoder"))
    assert shown_of("lab/dit", revision="half") == Shown("lab/dit", "dit", "half")
