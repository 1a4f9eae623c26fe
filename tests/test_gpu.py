"""What only a GPU can run agrees with what a CPU runs: forms of attention, half precision, NCCL."""

import os
import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as fwad

from driftmap.data.synthetic import write_points
from driftmap.models.layers import attend
from runs import read_losses, write_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
PACKAGES = {"xformers": "xformers", "jvp_flash": "jvp_flash_attention"}


def heads(seed, *, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(2, 4, 256, 64, device="cuda", generator=generator).to(dtype)


@pytest.mark.parametrize("how", ["sdpa", "xformers", "jvp_flash"])
def test_every_form_of_attention_is_the_plain_one(how):
    if how in PACKAGES:
        pytest.importorskip(PACKAGES[how])
    inputs = [heads(seed).requires_grad_() for seed in range(3)]
    values = [attend(*inputs, how=form) for form in (how, "math")]
    gradients = [torch.autograd.grad(value.float().square().sum(), inputs) for value in values]
    torch.testing.assert_close(values[0], values[1], rtol=2e-2, atol=2e-2)
    for one, other in zip(*gradients, strict=True):
        assert (one - other).float().norm() < 0.03 * other.float().norm()


def test_flash_attention_has_the_plain_derivative():
    pytest.importorskip("jvp_flash_attention")
    slopes = []
    with fwad.dual_level():
        inputs = [fwad.make_dual(heads(seed), heads(seed + 3)) for seed in range(3)]
        for how in ("jvp_flash", "math"):
            slopes.append(fwad.unpack_dual(attend(*inputs, how=how)).tangent)
    assert (slopes[0] - slopes[1]).float().norm() < 0.03 * slopes[1].float().norm()


SETTINGS = [
    ["strategy.name=ddp", "training.precision=bf16"],
    ["strategy.name=ddp", "training.precision=fp16"],
    ["strategy.name=ddp", "training.compile=true"],
    ["strategy.name=fsdp", "training.precision=bf16"],
    ["strategy={name: fsdp, offload: true}"],
    ["strategy.name=zero3", "training.precision=bf16"],
]


@pytest.mark.parametrize("overrides", SETTINGS, ids=" ".join)
def test_a_run_on_a_gpu_learns_what_a_cpu_learns(overrides, tmp_path):
    points = write_points(tmp_path / "moons", "moons", n=100, seed=0).folder
    config = write_config(tmp_path / "config.yaml", points, training__steps=20)
    words = [sys.executable, "-m", "driftmap.launch.cli", "train", str(config)]
    for out, more, hidden in (("gpu", overrides, {}), ("cpu", [], {"CUDA_VISIBLE_DEVICES": ""})):
        environment = {**os.environ, **hidden}
        subprocess.run([*words, *more, "--out", str(tmp_path / out)], check=True, env=environment)
    losses = [read_losses(tmp_path / out) for out in ("gpu", "cpu")]
    for step in range(1, 21):
        assert losses[0][step]["loss"] == pytest.approx(losses[1][step]["loss"], rel=3e-2)
