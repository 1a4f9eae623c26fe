"""Features are those of the network that is named, on pictures as it takes them; what is missing is said."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel, Dinov2Config, Dinov2Model

from clip import write_clip
from driftmap.trainer.config import ConfigError
from driftmap.trainer.features import HALVES, IMAGENET, CaptionJudge, Features, Scale, features_named
from driftmap.trainer.metrics.inception import Inception

CPU = torch.device("cpu")


def pictures(count, channels=3, size=24, seed=0):
    """Return smooth pictures of 8 bits, in [-1, 1]."""
    coarse = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return (smooth * 255).round() / 127.5 - 1


@pytest.mark.parametrize(("filter", "size"), [("bicubic", 16), ("bicubic", 40), ("bilinear", 9)])
def test_pictures_are_resized_as_pillow_does(filter, size):
    """Larger and smaller, grey and coloured; what a filter overshoots is cut off, as in a picture."""
    method = getattr(Image.Resampling, filter.upper())
    for channels in (1, 3):
        scaled = Scale(size, *HALVES, filter=filter)((pictures(2, channels) + 1) / 2)
        for found, picture in zip(scaled, pictures(2, channels), strict=True):
            layers = [Image.fromarray((layer.numpy() + 1) / 2) for layer in picture.expand(3, -1, -1)]
            wanted = np.stack([np.asarray(layer.resize((size, size), method)) for layer in layers])
            assert np.abs((found.numpy() * 0.5 + 0.5) - wanted.clip(0, 1)).max() < 1e-5


def test_channels_get_the_mean_and_the_deviation_of_their_own():
    mean, std = IMAGENET
    grey = Scale(4, mean, std)(torch.full((1, 1, 4, 4), 0.5))
    for channel in range(3):
        assert grey[0, channel].mean().item() == pytest.approx((0.5 - mean[channel]) / std[channel], rel=1e-5)


def test_what_is_finer_than_eight_bits_is_not_seen():
    seen = Features("pixels", 1, torch.nn.Identity(), lambda x: x.flatten(1))
    real = pictures(2)
    assert torch.equal(seen(real + 0.003), seen(real)) and not torch.equal(seen(real + 0.01), seen(real))
    assert seen(real).flatten().tolist() == pytest.approx(real.flatten().tolist(), abs=1e-6)


def test_a_hash_tells_weights_and_scales_apart():
    def hash_of(weight, scale):
        model = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(model.weight, weight)
        torch.nn.init.zeros_(model.bias)
        return Features("linear", 1, model, model, scale).hash

    hashes = [
        hash_of(0, None),
        hash_of(1, None),
        hash_of(0, Scale(4, *HALVES)),
        hash_of(0, Scale(5, *HALVES)),
    ]
    assert len(set(hashes)) == 4 and hash_of(0, Scale(4, *HALVES)) == hashes[2]


def test_the_network_in_the_wheel_sees_how_much_noise_there_is():
    found = features_named("efficientnet-lite0", device=CPU)
    clean = pictures(4, size=48)
    features = found(clean)
    assert features.shape == (4, found.num_features) == (4, 1280)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    moved = [
        (found((clean + level * noise).clamp(-1, 1)) - features).norm().item() for level in (0.05, 0.2, 0.8)
    ]
    assert moved == sorted(moved) and moved[0] > 0
    assert torch.allclose(found(clean[1:2]), features[1:2], atol=1e-4), "no picture depends on its batch"


@pytest.fixture(scope="module")
def inception_weights():
    torch.manual_seed(0)
    return Inception().state_dict()


def test_inception_is_the_network_of_the_fid(inception_weights, tmp_path: Path):
    """21,785,568 parameters without the classes, and the names of the weights that are passed on."""
    parameters = sum(each.numel() for each in Inception().parameters())
    assert parameters == 21_785_568
    names = {
        "Conv2d_1a_3x3.conv.weight",
        "Mixed_5b.branch5x5_2.bn.running_var",
        "Mixed_6a.branch3x3.conv.weight",
    }
    names |= {"Mixed_6e.branch7x7dbl_5.conv.weight", "Mixed_7c.branch3x3dbl_3b.conv.weight"}
    assert names <= inception_weights.keys()
    passed_on = {**inception_weights, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(passed_on, tmp_path / "inception.pth")
    save_file(inception_weights, tmp_path / "inception.safetensors")
    one, two = (
        features_named(f"inception:{tmp_path / name}", device=CPU)
        for name in ("inception.pth", "inception.safetensors")
    )
    assert one.hash == two.hash
    features = one(pictures(1, 1))
    assert features.shape == (1, 2048) and torch.equal(features, two(pictures(1, 1)))


def test_means_of_neighbours_leave_out_the_padding_and_the_last_pool_takes_the_greatest(inception_weights):
    """Of a constant every mean is the constant, also at the border; of a ramp the greatest is no mean."""
    model = Inception().eval()
    pooled = {}
    for name in ("Mixed_5b", "Mixed_6e", "Mixed_7b", "Mixed_7c"):
        block = model.get_submodule(name)
        block.get_submodule("branch_pool").register_forward_pre_hook(
            lambda _, inputs, name=name: pooled.update({name: inputs[0]})
        )
        width = block.get_submodule("branch1x1").conv.in_channels
        block(torch.arange(25.0).reshape(1, 1, 5, 5).expand(1, width, 5, 5))
    for name, corner in (("Mixed_5b", 3.0), ("Mixed_6e", 3.0), ("Mixed_7b", 3.0), ("Mixed_7c", 6.0)):
        assert pooled[name][0, 0, 0, 0].item() == corner, name


def test_other_weights_are_no_inception(inception_weights, tmp_path: Path):
    save_file({**inception_weights, "more": torch.zeros(1)}, tmp_path / "more.safetensors")
    (tmp_path / "text.pth").write_text("no weights")
    for file, message in (
        ("more.safetensors", "1 names or shapes differ, such as more; give those of the FID"),
        ("text.pth", "cannot be read as weights"),
        ("none.pth", "there is no file .*none.pth; give the path"),
    ):
        with pytest.raises(ConfigError, match=message):
            features_named(f"inception:{tmp_path / file}", device=CPU)


def test_dinov2_gives_the_class_token_after_its_norm(tmp_path: Path):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    found = features_named(f"dinov2:{tmp_path}", device=CPU)
    scaled = Scale(224, *IMAGENET)((pictures(2) + 1) / 2)
    with torch.no_grad():
        wanted = model(scaled).last_hidden_state[:, 0]
    assert found.num_features == 24 and torch.allclose(found(pictures(2)), wanted, atol=1e-5)


def test_clip_gives_both_sides_of_its_space(tmp_path: Path):
    model = CLIPModel.from_pretrained(write_clip(tmp_path)).eval()
    judge = CaptionJudge.of(str(tmp_path))
    text = judge.captions(["red", "green dog", "red " * 40])
    assert text.shape == (3, 12) and torch.allclose(text.norm(dim=1), torch.ones(3))
    tokens = judge.tokenizer(["red"], return_tensors="pt")
    with torch.no_grad():
        scores = model(**tokens, pixel_values=judge.features.scale((pictures(2) + 1) / 2)).logits_per_image
    seen = torch.nn.functional.normalize(features_named(f"clip:{tmp_path}", device=CPU)(pictures(2)), dim=1)
    assert torch.allclose(model.logit_scale.exp() * seen @ text[:1].T, scores, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet",
            "resnet is neither a run folder nor a name of features; give the run of a classifier, effic",
        ),
        ("inception", "say where its weights are, inception:PLACE"),
        ("dinov2:no/such", "no/such cannot be loaded .*safetensors"),
        ("clip:nowhere", "nowhere cannot be loaded .*hf download"),
    ],
)
def test_what_is_not_there_is_said(name, message):
    with pytest.raises(ConfigError, match=message):
        features_named(name, device=CPU)
