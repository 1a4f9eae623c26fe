"""Load from the Hub what test_publish.py publishes, and sample it, in a process without driftmap.

python load_published.py NOISE OUT BASE     safetensors, and the pipeline that adapters are of
"""

import re
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors.torch import load_file, save_file

sys.modules["driftmap"] = None  # an import of driftmap fails from here on
inputs, out = load_file(sys.argv[1]), {}
noise = inputs["noise"]
for name in ("lab/dit", "lab/unet"):
    pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    given = dict(class_labels=[0, "one", 2, 3], latents=noise, num_inference_steps=4)
    out[name] = pipe(**given, output_type="latent").images
    assert pipe(**given).images[0].size == (32, 32)
kind = dict(variant="bf16", dtype=torch.bfloat16)
half = DiffusionPipeline.from_pretrained("lab/dit", trust_remote_code=True, **kind)
given["latents"] = noise
out["half"] = half(**given, output_type="latent").images.float()
given = dict(prompt="a cat", num_inference_steps=2, output_type="pt")
pipe = DiffusionPipeline.from_pretrained("lab/lora")
out["merged"] = pipe(**given, generator=torch.Generator().manual_seed(0)).images
plain = DiffusionPipeline.from_pretrained(sys.argv[3])
out["base"] = plain(**given, generator=torch.Generator().manual_seed(0)).images
plain.load_lora_weights("lab/lora", subfolder="lora", weight_name="pytorch_lora_weights.safetensors")
out["adapters"] = plain(**given, generator=torch.Generator().manual_seed(0)).images
card = Path(hf_hub_download("lab/student", "README.md")).read_text()
names = {}
exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
embeds = dict(prompt_embeds=inputs["embeds"], latents=noise.repeat(1, 2, 1, 1))
out["lab/student"] = names["pipe"](**embeds, output_type="latent").images
snapshot_download("lab/dit")  # as `hf download` does
save_file({name: value.contiguous() for name, value in out.items()}, sys.argv[2])
