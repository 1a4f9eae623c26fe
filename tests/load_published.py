"""Load from the Hub what test_publish.py publishes, and sample it, in a process without driftmap.

python load_published.py NOISE OUT BASE FOLDER     safetensors, a pipeline, and one with adapters merged
"""

import sys

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file

sys.modules["driftmap"] = None  # an import of driftmap fails from here on
noise, out = load_file(sys.argv[1])["noise"], {}
for name in ("lab/dit", "lab/unet"):
    pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    given = dict(class_labels=[0, "one", 2, 3], latents=noise, num_inference_steps=4)
    out[name] = pipe(**given, output_type="latent").images
    assert pipe(**given).images[0].size == (32, 32)
kind = dict(variant="bf16", dtype=torch.bfloat16)
half = DiffusionPipeline.from_pretrained("lab/dit", trust_remote_code=True, **kind)
given["latents"] = noise
out["half"] = half(**given, output_type="latent").images.float()
base, here = sys.argv[3:]
for place in ("lab/lora", here):
    pipe = DiffusionPipeline.from_pretrained(place)
    given = dict(prompt="a cat", num_inference_steps=2, output_type="pt")
    out[f"all of {place}"] = pipe(**given, generator=torch.Generator().manual_seed(0)).images
plain = DiffusionPipeline.from_pretrained(base)
out["base"] = plain(**given, generator=torch.Generator().manual_seed(0)).images
plain.load_lora_weights("lab/lora", subfolder="lora", weight_name="pytorch_lora_weights.safetensors")
out["adapters"] = plain(**given, generator=torch.Generator().manual_seed(0)).images
snapshot_download("lab/dit")  # as `hf download` does
save_file({name: value.contiguous() for name, value in out.items()}, sys.argv[2])
