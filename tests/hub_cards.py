"""What a Hub on loopback (hub_server.py) says of the metadata of cards, by the Hub's documentation."""

import re

import yaml

LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "openrail++", "other"}
TASKS = {"text-to-image", "unconditional-image-generation"}


def front_matter(text):
    """Return the metadata of a card."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def problems_of(text, kind):
    """Yield what is wrong with a card's metadata."""
    about = front_matter(text)
    if not isinstance(about, dict):
        yield "metadata is missing or no mapping"
        return
    if kind == "space":
        if about.get("sdk") not in ("gradio", "docker", "static"):
            yield '"sdk" must be one of [gradio, docker, static]'
        return
    if about.get("license", "other") not in LICENCES:
        yield f'"license" must be one of {sorted(LICENCES)}'
    if about.get("pipeline_tag") not in TASKS:
        yield '"pipeline_tag" is no task'
    for name in about.get("base_model", []):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            yield f'"base_model" {name} is no id'
    for model in about.get("model-index", []):
        for result in model["results"]:
            if not {"type", "name"} <= result["dataset"].keys() or "type" not in result["task"]:
                yield '"model-index" results need a task and a dataset'
            if not all(isinstance(metric.get("value"), int | float) for metric in result["metrics"]):
                yield '"model-index" metrics need values'
