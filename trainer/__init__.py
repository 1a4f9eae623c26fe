"""How weights change: a recipe becomes a run, and a run is a loop over batches with hooks.

A run is a folder. `driftmap train CONFIG` checks the config (config.py, recipe.py), builds everything that
trains (build.py) and enters the loop (loop.py): take a batch, ask the task for its losses, go backward,
step; then the hooks, in order: EMA, log, stop, checkpoint, progress. The same command on the same folder
goes on at the next sample.

    config.py      YAML and key=value overrides -> checked objects; every message names the key
    recipe.py      one frozen class per section; the rules across sections
    build.py       a recipe becomes a run
    loop.py        Task(model, objective) and Run: the training loop
    objective.py   what an objective is; the diagonal rule they share
    objectives/    one file per loss; the file's name is its name in a config
    tangent.py     derivatives along the target time: forward mode or finite difference
    times.py       distributions of t and of pairs (s, t)
    seeds.py       random numbers as a function of (seed, position, purpose)
    latents.py     posterior moments become scaled latents
    optim.py  ema.py  strategy.py  checkpoint.py  hooks.py  log.py
    evaluate.py    quality against number of evaluations
    report.py      a run folder as one HTML page
"""
