"""A diffusers checkpoint on disk: its network, weights, noise schedule and autoencoder, read and never run.

A place is a pipeline folder (`model_index.json` beside `unet/` or `transformer/`, `scheduler/`, `vae/`, ...),
or the id of one in the local Hugging Face cache. Weights are read from safetensors files alone, whole or in
shards: pickles could run code.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

NETWORKS = {
    "UNet2DModel": "stock_unet",
    "UNet2DConditionModel": "stock_unet",
    "DiTTransformer2DModel": "stock_dit",
}
PREDICTIONS = {"epsilon": "noise", "v_prediction": "v", "sample": "data"}
STEM = "diffusion_pytorch_model"
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint: where it is, and what its network's config and its scheduler's say."""

    place: str
    folder: Path
    network: Path
    config: dict[str, Any]
    scheduler: dict[str, Any]

    @classmethod
    def open(cls, place: str, subfolder: str | None = None) -> "Pretrained":
        """Return the checkpoint at a place; ValueError where it is none that can be trained from."""
        folder = found_folder(place)
        network = folder / (subfolder or _subfolder(place, folder))
        if not (network / "config.json").is_file():
            raise ValueError(
                f"{place} has no {network.name}/config.json; set subfolder to that of its network"
            )
        config = read_json(network / "config.json")
        kind = config.get("_class_name")
        if kind not in NETWORKS:
            raise ValueError(
                f"{network} holds a {kind}; those that can be trained from are {', '.join(NETWORKS)}"
            )
        said = folder / "scheduler" / "scheduler_config.json"
        if not said.is_file():
            raise ValueError(
                f"{place} has no scheduler/scheduler_config.json, which says what its network predicts and "
                "at which noise levels; copy the folder scheduler from where the network comes from"
            )
        return cls(place, folder, network, config, read_json(said))

    @property
    def backbone(self) -> str:
        """The name of the network that takes its weights."""
        return NETWORKS[self.config["_class_name"]]

    @property
    def learned_variance(self) -> bool:
        """Whether the network says a variance, too, in as many channels more."""
        return self.config.get("out_channels") == 2 * self.config["in_channels"]

    @property
    def autoencoder(self) -> dict[str, Any] | None:
        """The config of its autoencoder, None where it works on pixels."""
        file = self.folder / "vae" / "config.json"
        return read_json(file) if file.is_file() else None

    def meaning(self) -> dict[str, Any]:
        """Return prediction and path: what the network says, and of which states; see trainer/meaning.py.

        Raises ValueError where the scheduler has noise levels that no path has.
        """
        said = self.scheduler
        name = said.get("_class_name", "")
        if name.startswith("FlowM"):
            return {"prediction": "mean_velocity", "path": {"name": "linear"}}
        kind = said.get("prediction_type", "epsilon")
        if kind not in PREDICTIONS:
            raise ValueError(
                f"{self.place}: its scheduler says prediction_type {kind!r}; expected one of "
                f"{', '.join(PREDICTIONS)}"
            )
        return {"prediction": PREDICTIONS[kind], "path": self._path(name)}

    @property
    def timesteps(self) -> int:
        """The number of steps of its chain."""
        return self.scheduler.get("num_train_timesteps", 1000)

    @property
    def first_timestep(self) -> int:
        """The timestep of t = 0: step n of a chain is the timestep n - 1; those of a flow begin at 0."""
        return 0 if self.scheduler.get("_class_name", "").startswith("FlowM") else -1

    def _path(self, name: str) -> dict[str, Any]:
        said, num_steps = self.scheduler, self.timesteps
        schedule = said.get("beta_schedule")
        if said.get("trained_betas") is not None or schedule not in _PATHS:
            what = "trained_betas" if said.get("trained_betas") is not None else f"beta_schedule {schedule!r}"
            raise ValueError(
                f"{self.place}: its scheduler, {name}, says {what}; expected a beta_schedule of "
                f"{', '.join(_PATHS)}, or a flow-matching scheduler"
            )
        path: dict[str, Any] = {"name": _PATHS[schedule], "num_steps": num_steps}
        if schedule != "squaredcos_cap_v2":
            path["first"] = said.get("beta_start", 1e-4) * num_steps / 1000
            path["last"] = said.get("beta_end", 0.02) * num_steps / 1000
        return path | {"zero_terminal_snr": bool(said.get("rescale_betas_zero_snr", False))}

    def levels(self) -> Tensor:
        """Return abar_1 .. abar_N (N,) as diffusers' own scheduler has them."""
        kind = getattr(diffusers, self.scheduler["_class_name"])
        return kind.from_config(self.scheduler).alphas_cumprod

    def weights(self, variant: str | None = None) -> dict[str, Tensor]:
        """Return the weights by diffusers' names, float32; ValueError where files are missing or damaged."""
        return read_weights(self.network, variant)


_PATHS = {"linear": "linear_betas", "scaled_linear": "scaled_linear_betas", "squaredcos_cap_v2": "cosine"}


def found_folder(place: str) -> Path:
    """Return the folder of a checkpoint, by path or by id; ValueError where there is none."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder
    if place.count("/") == 1 and not place.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(place, local_files_only=True))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{place} is no folder, and not in the local Hugging Face cache; `hf download {place}` "
                "brings it there"
            ) from error
    raise ValueError(f"there is no folder {place}; give a diffusers pipeline folder or the id of one")


def is_pretrained(place: Path | str) -> bool:
    """Return whether a place is a diffusers checkpoint and not a run: a pipeline folder, or an id."""
    folder = Path(place)
    if folder.is_dir():
        return (folder / "model_index.json").is_file()
    try:
        return (found_folder(str(place)) / "model_index.json").is_file()
    except ValueError:
        return False


def _subfolder(place: str, folder: Path) -> str:
    found = [name for name in ("unet", "transformer") if (folder / name).is_dir()]
    if len(found) != 1:
        there = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise ValueError(
            f"{place} has {' and '.join(found) or 'neither unet nor transformer'} (it has "
            f"{', '.join(there) or 'no folders'}); give a pipeline folder, and set subfolder to its network"
        )
    return found[0]


def read_json(file: Path) -> dict[str, Any]:
    """Return the object that a file holds; ValueError where it holds none."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); copy it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds {type(found).__name__}, expected an object; copy it again")
    return found


def read_weights(folder: Path, variant: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a component's safetensors files, float32, by name.

    Raises ValueError where there are none, or some are missing, damaged or not finite.
    """
    middle = "" if variant is None else f".{variant}"
    whole = folder / f"{STEM}{middle}.safetensors"
    index = folder / f"{STEM}.safetensors.index{middle}.json"
    if index.is_file() and not whole.is_file():
        files = sorted(set(read_json(index).get("weight_map", {}).values()))
    elif whole.is_file():
        files = [whole.name]
    else:
        raise ValueError(_nothing_there(folder, whole.name, variant))
    found: dict[str, Tensor] = {}
    for name in files:
        found |= _tensors(folder / name)
    for name, value in found.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{folder}: {name} holds numbers that are not finite; copy the weights again")
    return found


def _tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file} is missing, which the index beside it names; copy it again")
    with file.open("rb") as opened:
        if opened.read(len(_LFS)) == _LFS:
            raise ValueError(f"{file} is a pointer of git-lfs, not the weights; run `git lfs pull` there")
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); copy it again") from error


def _nothing_there(folder: Path, wanted: str, variant: str | None) -> str:
    files = sorted(path.name for path in folder.iterdir())
    others = {name.removesuffix(".safetensors").split(".")[1] for name in files if _is_variant(name)}
    if others:
        return f"{folder} has no {wanted}, but the variants {', '.join(sorted(others))}; set variant to one"
    if pickled := [name for name in files if name.endswith((".bin", ".ckpt", ".pt", ".pth"))]:
        return (
            f"{folder} has weights in {pickled[0]} alone, a pickle, which could run code; it is not opened. "
            f"Get {wanted}, or convert it where you trust it"
        )
    of = "" if variant is None else f" of variant {variant}"
    return f"{folder} has no weights{of}: there is no {wanted}; it holds {', '.join(files) or 'nothing'}"


def _is_variant(name: str) -> bool:
    parts = name.split(".")
    return name.startswith(STEM) and name.endswith(".safetensors") and len(parts) == 3
