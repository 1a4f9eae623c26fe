"""A page to try a few-step model: pictures in 1 to 8 evaluations beside many, the path, inversion.

It needs gradio and diffusers, not driftmap, and is the `app.py` of a Space, too: which models it shows then
stands beside it in `app.json`. It asks the network for nothing but the models, and these it takes from a
folder where one is given. A published model brings code of its own, `pipeline.py`: show only those of people
whom you trust.
"""

import json
import os
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported

import gradio
import numpy
import torch
from diffusers import DiffusionPipeline
from PIL import Image

MANY = 32  # evaluations of the picture beside
START = 0.01  # the first time of an inversion: at 0 a picture has no noise
SHOWN = 256  # pixels of a picture on the page
UPLOAD = "Upload a picture and say above what it shows; it becomes a square of {0} x {0} pixels."


@dataclass(frozen=True)
class Shown:
    """Which models the page shows, and as what: a folder or an id on the Hub, and maybe of a teacher, too.

    `guidance` is that of the teacher, in so many times of the path; without a teacher the model's own
    velocity stands beside its jumps.
    """

    model: str
    name: str
    revision: str | None = None
    teacher: str | None = None
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)


def load(place: str, revision: str | None = None) -> Any:
    """Return the pipeline of a folder or of an id on the Hub."""
    local = Path(place).is_dir()
    pipe = DiffusionPipeline.from_pretrained(
        place, revision=None if local else revision, trust_remote_code=True, local_files_only=local
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


class Models:
    """The models of the page, and what it asks of them."""

    def __init__(self, shown: Shown) -> None:
        self.shown = shown
        self.pipe = load(shown.model, shown.revision)
        if not hasattr(self.pipe, "jump"):
            kind = type(self.pipe).__name__
            raise ValueError(
                f"{shown.model} is a {kind}; the page shows pipelines of `driftmap export` alone"
            )
        self.teacher = load(shown.teacher) if shown.teacher else self.pipe
        self.names = list((self.pipe.config["id2label"] or {}).values())
        self.takes_captions = self.pipe.config["caption_encoder"] is not None
        self.beside = lru_cache(maxsize=64)(self._beside)

    @property
    def num_classes(self) -> int:
        """The number of classes, 0 of a model without."""
        config = self.pipe.network.config
        return config.get("num_classes") or max(0, (config.get("num_class_embeds") or 1) - 1)

    @property
    def side(self) -> int:
        """The side of a picture in pixels."""
        return self.pipe.sample_shape[1] * self.pipe.image_processor.config["vae_scale_factor"]

    def condition(self, asked: str | None, pipe: Any = None) -> Any:
        """Return what a pipeline is conditioned on: a class by its name or number, a caption, or nothing."""
        pipe = pipe or self.pipe
        if self.takes_captions:
            return pipe.condition(None, *self.pipe.embed([asked or ""]))
        if not self.num_classes:
            return None
        return pipe.condition([asked if asked in self.names else int(asked or 0)], None, None)

    def scale(self, pipe: Any, guidance: float | None) -> Any:
        """Return the scale of guidance of one sample, None of a network that takes none."""
        return torch.full((1,), guidance or 1.0, device=pipe.device) if pipe.takes_guidance else None

    def noise(self, seed: int) -> torch.Tensor:
        """Return the noise of a seed, the same as that of a generator with this seed."""
        generator = torch.Generator().manual_seed(int(seed))
        noise = torch.randn((1, *self.pipe.sample_shape), generator=generator, dtype=self.pipe.network.dtype)
        return noise.to(self.pipe.device)

    def times(self, nfe: int, start: float = 1.0) -> torch.Tensor:
        """Return the times of nfe jumps from `start` to 0, along the model's own grid."""
        self.pipe.scheduler.set_timesteps(int(nfe))
        return start * self.pipe.scheduler.sigmas.float().to(self.pipe.device)

    def walk(
        self, x: torch.Tensor, times: torch.Tensor, asked: str | None, guidance: float | None
    ) -> list[torch.Tensor]:
        """Return the states at all times, the first of which is x."""
        states, condition, scale = [x], self.condition(asked), self.scale(self.pipe, guidance)
        for s, t in zip(times[:-1], times[1:], strict=True):
            states.append(self.pipe.jump(states[-1], s, t, condition, scale))
        return states

    def _beside(self, asked: str | None, seed: int, guidance: float | None) -> tuple[Image.Image, str]:
        """Return the end of the teacher's path from the same noise, by MANY Euler steps, and what it took."""
        pipe, shown, x = self.teacher, self.shown, self.noise(seed)
        condition, scale = self.condition(asked, pipe), self.scale(pipe, guidance)
        count, begun = 0, time.perf_counter()
        strength = shown.guidance if self.pipe.takes_guidance <= pipe.takes_guidance else guidance or 1.0
        with torch.no_grad():
            times = torch.linspace(1, 0, MANY + 1, device=x.device)
            for s, t in zip(times[:-1], times[1:], strict=True):
                velocity = pipe.velocity(x, s.expand(1), s.expand(1), condition, scale)
                count += 1
                if strength != 1 and shown.interval[0] <= s <= shown.interval[1]:
                    without = pipe.velocity(x, s.expand(1), s.expand(1), None, scale)
                    velocity = without + strength * (velocity - without)
                    count += 1
                x = x + (t - s) * velocity
            picture = pipe.decode(x)[0]
        whose = "teacher" if shown.teacher else "own velocity"
        return picture, f"{whose}, {count} evaluations, {time.perf_counter() - begun:.2f} s"

    def sample(
        self, asked: str | None, seed: int, nfe: int, guidance: float | None
    ) -> tuple[Any, str, Any, str, Any]:
        """Return the picture in nfe evaluations, the one beside, and the states on the way."""
        begun = time.perf_counter()
        times = self.times(nfe)
        states = self.walk(self.noise(seed), times, asked, guidance)
        picture = self.pipe.decode(states[-1])[0]
        told = f"{nfe} evaluation{'s' * (nfe > 1)}, {time.perf_counter() - begun:.2f} s"
        other, other_told = self.beside(asked, int(seed), guidance)
        path = [(large(self.pipe.decode(x)[0]), f"t = {t:.3g}") for x, t in zip(states, times, strict=True)]
        return large(picture), told, large(other), other_told, path

    def invert(self, given: Any, asked: str | None, nfe: int, guidance: float | None) -> tuple[Any, Any, str]:
        """Return the noise of a picture, what the model makes of this noise, and how near that is."""
        data = self.pipe.encode(prepared(given, self.pipe))
        up = START + (1 - START) * self.times(nfe)
        noise = self.walk(self.state(data, START, 0), up.flip(0), asked, guidance)[-1]
        back = self.walk(noise, torch.cat([up[:-1], up.new_zeros(1)]), asked, guidance)[-1]
        original, found = (self.pipe.decode(x, "np")[0] for x in (data, back))
        psnr = -10 * numpy.log10(max(numpy.square(original - found).mean(), 1e-10))
        told = f"{psnr:.1f} dB; noise: mean {noise.mean():.2f}, spread {noise.std():.2f}"
        return large(self.pipe.decode(noise)[0]), large(self.pipe.decode(back)[0]), told

    def state(self, data: torch.Tensor, t: float, seed: int) -> torch.Tensor:
        """Return the state at time t of data and the noise of a seed."""
        return (1 - t) * data + t * self.noise(seed)

    def renoise(
        self, given: Any, asked: str | None, seed: int, nfe: int, start: float, guidance: float | None
    ) -> tuple[Any, Any]:
        """Return a picture with noise up to the time `start`, and what the model makes of it."""
        x = self.state(self.pipe.encode(prepared(given, self.pipe)), start, seed)
        found = self.walk(x, self.times(nfe, start), asked, guidance)[-1]
        return large(self.pipe.decode(x)[0]), large(self.pipe.decode(found)[0])


def prepared(given: Any, pipe: Any) -> Image.Image:
    """Return an uploaded picture, cut to a square, with the channels that the model takes."""
    if given is None:
        raise gradio.Error("upload a picture first")
    channels = pipe.sample_shape[0] if pipe.vae is None else pipe.vae.config.in_channels
    side = min(given.size)
    left, top = (given.width - side) // 2, (given.height - side) // 2
    return given.crop((left, top, left + side, top + side)).convert("L" if channels == 1 else "RGB")


def large(picture: Image.Image) -> Image.Image:
    """Return a picture as it is shown: small ones in larger squares, not smoothed."""
    factor = max(1, SHOWN // picture.width)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def page(models: Models) -> gradio.Blocks:
    """Return the page."""
    with gradio.Blocks(title="Few-step pictures", analytics_enabled=False) as blocks:
        gradio.Markdown(f"# {models.shown.name}\nOne network, from noise to a picture in a few jumps.")
        with gradio.Row():
            asked = _asked(models)
            seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
            usual = models.pipe.config["num_inference_steps"]
            nfe = gradio.Slider(1, 8, value=min(8, usual), step=1, label="Evaluations")
            scale = models.pipe.config["guidance_scale"]
            guidance = gradio.Slider(1, 8, value=scale, label="Guidance", visible=models.pipe.takes_guidance)
        with gradio.Tab("Sample"):
            button = gradio.Button("Sample", variant="primary")
            with gradio.Row():
                few, many = map(_picture, ("In a few", "In many"))
            with gradio.Row():
                told, other_told = (gradio.Textbox(label=text) for text in ("A few took", "Many took"))
            gradio.Markdown("Where it is before and after each jump, from noise (t = 1) to data (t = 0):")
            path = gradio.Gallery(show_label=False, columns=9, height=240, buttons=["fullscreen"])
        with gradio.Tab("Invert and change"):
            gradio.Markdown(UPLOAD.format(models.side))
            given = gradio.Image(label="Picture", type="pil", height=300, sources=["upload", "clipboard"])
            invert = gradio.Button("To noise and back")
            with gradio.Row():
                noise, back = map(_picture, ("Its noise", "And back"))
            lost = gradio.Textbox(label="How near")
            start = gradio.Slider(0.05, 1, value=0.6, label="Noise up to the time")
            renoise = gradio.Button("Add noise and sample again")
            with gradio.Row():
                noised, new = map(_picture, ("With noise", "Another one"))
        inputs: list[Any] = [asked, seed, nfe, guidance]
        outputs: list[Any] = [few, told, many, other_told, path]
        gradio.on([button.click, seed.change, nfe.release, asked.change], models.sample, inputs, outputs)
        invert.click(models.invert, [given, asked, nfe, guidance], [noise, back, lost])
        renoise.click(models.renoise, [given, asked, seed, nfe, start, guidance], [noised, new])
    return blocks


def _picture(label: str) -> Any:
    return gradio.Image(label=label, height=300, interactive=False, buttons=["fullscreen", "download"])


def _asked(models: Models) -> Any:
    """Return the field of what is asked for."""
    if models.takes_captions:
        return gradio.Textbox("", label="Caption")
    names = models.names or [str(number) for number in range(models.num_classes)]
    return gradio.Dropdown(names or ["–"], value=(names or ["–"])[0], label="Class", visible=bool(names))


def serve(
    shown: Shown, *, host: str = "127.0.0.1", port: int | None = None, block: bool = True
) -> gradio.Blocks:
    """Serve the page, until it is stopped or, where it does not block, until the returned page is closed."""
    blocks = page(Models(shown))
    blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        theme=gradio.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        prevent_thread_lock=not block,
    )
    return blocks


if __name__ == "__main__":
    serve(Shown(**json.loads(Path(__file__).with_name("app.json").read_text())), host="0.0.0.0")
