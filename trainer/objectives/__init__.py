"""One file per loss; the file's name is its name in a config. ../objective.py says what an objective is."""
