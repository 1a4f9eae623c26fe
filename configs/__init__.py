"""One YAML a recipe; presets/: what published methods are, to put under a config."""
