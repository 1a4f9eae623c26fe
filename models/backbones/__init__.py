"""One file per network; the file's name is its name in a config.

A backbone is an `nn.Module` `(x, s, t, condition) -> tensor like x`; `sample_shape` is the shape of one x and
`null_label` says which label means "no class". One that takes captions says so by `text_width` and
`max_tokens`. The constructor's typed keywords are its settings.
"""
