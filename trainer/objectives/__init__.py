"""One file per loss; the file's name is the objective's name in a config. See ../objective.py for the contract."""
