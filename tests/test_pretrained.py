"""A network that starts from a diffusers checkpoint is the checkpoint's, to the last digits, in our terms.

The checkpoints are small ones of the real classes, saved by diffusers itself.
"""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from sharded_tangent import difference, slopes, work
from tiny_pipelines import KINDS, section, write_pipeline, write_shards
from torch import Tensor

from driftmap.models.condition import Condition, Text
from driftmap.models.denoiser import Denoiser
from driftmap.models.path import expand
from driftmap.models.pretrained import Pretrained, read_weights
from driftmap.models.prompt_encoder import prompt_encoder_of
from driftmap.trainer.build import build, load_model
from driftmap.trainer.config import read_config
from driftmap.trainer.recipe import recipe_from
from runs import FORKS, write_config

every_kind = pytest.mark.parametrize("kind", KINDS)
STEPS = torch.tensor([999, 500, 20, 5])
PROMPTS = ["a big red cat", "the green dog", "", "a small dog and a cat"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: write_pipeline(root / kind, kind) for kind in KINDS}


def theirs(pipe: Any, x: Tensor, timesteps: Tensor, prompts: list[str]) -> Tensor:
    """Return what the pipeline's own network says, called as the pipeline calls it."""
    if isinstance(pipe, diffusers.DDPMPipeline):
        return pipe.unet(x, timesteps).sample
    if isinstance(pipe, diffusers.DiTPipeline):
        labels = torch.arange(len(x))
        return pipe.transformer(x, timestep=timesteps, class_labels=labels).sample[:, :4]
    if isinstance(pipe, diffusers.StableDiffusionXLPipeline):
        embeddings, _, pooled, _ = pipe.encode_prompt(
            prompts, device="cpu", do_classifier_free_guidance=False
        )
        added = {
            "text_embeds": pooled,
            "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(len(x), 1),
        }
        return pipe.unet(x, timesteps, embeddings, added_cond_kwargs=added).sample
    embeddings, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
    return pipe.unet(x, timesteps, embeddings).sample


def given(folder: Path, kind: str) -> Condition | None:
    """Return the same conditions as the trainer has them."""
    if kind == "ddpm":
        return None
    if kind == "dit":
        return torch.arange(4)
    encoder = prompt_encoder_of(Pretrained.open(str(folder)))
    assert encoder is not None
    tokens = torch.stack(encoder(PROMPTS))
    return Text(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))


@every_kind
@torch.no_grad()
def test_the_velocity_is_what_the_pipelines_own_prediction_means(folders: dict[str, Path], kind: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(folders[kind])
    model = load_model(folders[kind])
    assert isinstance(model, Denoiser)
    x = torch.randn(4, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    said = theirs(pipe, x, STEPS, PROMPTS)
    t = (STEPS + 1) / 1000
    condition = given(folders[kind], kind)
    torch.testing.assert_close(model.predict(x, t, t, condition)[:, : x.shape[1]], said, rtol=0, atol=1e-5)
    # The velocity alpha' data + sigma' noise, by diffusers' own scheduler, in units of its size.
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(1000)
    data = torch.stack(
        [
            scheduler.step(s, step, one).pred_original_sample
            for s, step, one in zip(said, STEPS, x, strict=True)
        ]  # pyright: ignore
    )
    levels = expand(scheduler.alphas_cumprod[STEPS], x)
    noise = (x - levels.sqrt() * data) / (1 - levels).sqrt()
    expected = model.path.velocity(data, noise, t)
    found = model.velocity(x, t, condition)
    size = expected.flatten(1).norm(dim=1) / x[0].numel() ** 0.5
    assert ((found - expected).flatten(1).abs().amax(1) / size).max() <= 1e-5
    assert (model.velocity(x, t, None) - found).abs().max() > 1e-3 or condition is None


@torch.no_grad()
def test_predictions_of_v_and_a_chain_that_ends_in_noise(tmp_path: Path) -> None:
    folder = write_pipeline(
        tmp_path / "sd", "sd", prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    model: Any = load_model(folder)
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    assert (model.prediction, model.path.zero_terminal_snr) == ("v", True)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = Text(torch.randn(2, 12, 16), torch.ones(2, 12, dtype=torch.bool))
    for step in (999, 400, 30):
        said = pipe.unet(x, step, text.tokens).sample
        pipe.scheduler.set_timesteps(1000)
        expected = pipe.scheduler.step(said, step, x).pred_original_sample
        t = torch.full((2,), (step + 1) / 1000)
        found, _ = model.end_points(x, t, t, text)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_weights_in_shards_and_of_a_variant_are_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(folders["sd"])
    pipe.unet.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    pipe.unet.half().save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="10KB")
    whole = read_weights(folders["sd"] / "unet")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert all(torch.equal(value, whole[name]) for name, value in read_weights(tmp_path / "shards").items())
    half = read_weights(tmp_path / "half", "fp16")
    assert half.keys() == whole.keys()
    assert all(torch.equal(value, whole[name].half().float()) for name, value in half.items())


@torch.no_grad()
def test_what_says_nothing_may_be_a_negative_prompt(folders: dict[str, Path], tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", folders["sd"], n=8)
    encoder: Any = prompt_encoder_of(Pretrained.open(str(folders["sd"])))
    for prompt in ("", "a big dog"):
        model = {"from_pretrained": str(folders["sd"]), "empty_prompt": prompt}
        settings: dict[str, Any] = {"data__label": "text", "data__batch_size": 4, "model": model}
        file = write_config(tmp_path / "c.yaml", tmp_path / "shards", objective={"name": "ddpm"}, **settings)
        made: Any = build(recipe_from(read_config(file)), tmp_path / f"never-{len(prompt)}").model
        assert torch.equal(made.backbone.nothing, encoder([prompt])[0])
        silent = Text(torch.randn(1, 12, 16), torch.zeros(1, 12, dtype=torch.bool))
        told = Text(encoder([prompt])[0][None], torch.ones(1, 12, dtype=torch.bool))
        x, t = torch.randn(1, 4, 8, 8), torch.tensor([0.5])
        assert torch.equal(made.velocity(x, t, silent), made.velocity(x, t, told))


def student(folders: dict[str, Path], kind: str, place: Path) -> Any:
    """Return a two-time network in float64, none of whose weights is at its start."""
    write_shards(place / "shards", folders[kind], n=8)
    settings = {f"data__{name}": value for name, value in section(kind).items()}
    settings |= {"model": {"from_pretrained": str(folders[kind])}, "objective": {"name": "semigroup"}}
    file = write_config(place / "c.yaml", place / "shards", data__batch_size=4, **settings)
    model: Any = build(recipe_from(read_config(file)), place / "never").model
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.backbone.new_layers:
            for parameter in layer.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model.double().requires_grad_(False)


@every_kind
def test_the_derivative_of_a_student_is_the_finite_difference(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    model = student(folders, kind, tmp_path)
    assert difference(model, slopes(model, "difference")) <= 1e-6


@pytest.mark.parametrize("kind", ["sd", "dit"])
def test_so_it_is_where_the_student_is_sharded(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    model = student(folders, kind, tmp_path)
    group = [FORKS.Process(target=work, args=(model, rank, tmp_path)) for rank in range(2)]
    for process in group:
        process.start()
    for process in group:
        process.join(60)
    assert [process.exitcode for process in group] == [0, 0]
    assert max(float((tmp_path / str(rank)).read_text()) for rank in range(2)) <= 1e-6
