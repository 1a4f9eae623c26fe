"""One file per network; the file's name is its name in a config.

A backbone is an `nn.Module` `(x, s, t, condition) -> tensor like x`; `null_label` says which label means "no class".
The constructor's typed keywords are its settings.
"""
