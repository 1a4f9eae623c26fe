"""How weights change: a recipe becomes a run, and a run is a loop over batches with hooks.

A run is a folder. `driftmap train CONFIG` checks the config (config.py, recipe.py), builds everything that
trains (build.py) and enters the loop (loop.py): take a batch, ask the task for its losses, go backward,
step; then the hooks, in order: EMA, guard, validation, stop, log, checkpoint, progress. The same command on
the same folder goes on at the next sample, on any number of processes, under any strategy.

    config.py      YAML and key=value overrides -> checked objects; every message names the key
    recipe.py      one frozen class per section; the rules across sections
    build.py       a recipe becomes a run
    batches.py     the batches that it asks for; faults.py: every process gets its own, or all stop
    loop.py        Task(model, objective) and Run: the training loop
    objective.py   what an objective is; the diagonal rule they share
    objectives/    one file per loss; the file's name is its name in a config
    weighting.py   weights of a denoising loss; coupling.py: which noise belongs to which data
    error_weighting.py  what is minimised of a jump's error
    meaning.py     what a run's network predicts, kept with it; guiding.py: guidance that is asked for
    tangent.py     derivatives along the target time: forward mode or finite difference
    self_test.py   one batch shows that they are right where the run is
    times.py       distributions of t and of pairs (s, t)
    seeds.py       random numbers as a function of (seed, position, purpose)
    trajectories.py  a teacher's solutions as a data set, see objectives/trajectory.py
    encode.py      which autoencoder and text encoder made a data set, and making it
    fit.py         whether samples, classes and captions fit the networks
    latents.py     posterior moments become scaled latents
    optim.py       AdamW and its learning rate
    world.py       the processes and what they tell each other; launcher.py: what started them
    signals.py     what asks them to stop, and how commands end; unfinished.py: what is kept of a measurement
    heartbeat.py   where each of them is, so that one that hangs is named
    strategy.py    ddp, and what a strategy is; fully_sharded.py: fsdp; zero.py: zero1, zero2, zero3
    compatibility.py   what does not go together
    blocks.py      what is done to every repeated block: recomputing, compiling, attention
    fragment.py    what a process holds of the parameters
    ema.py         running means of fragments; posthoc.py: means of any width afterwards
    target.py      a frozen copy of the network that holds one of them
    teacher.py     the velocity of a frozen run, guided; teacher_section.py: what a config says of it
    fake.py        a second network, of a student's own samples; start.py: from a run that has less inputs
    pretrained.py  from a diffusers checkpoint, see pretrained_section.py; tuning.py: which weights train;
                   published.py: a pipeline of ours as a teacher
    pieces.py      fragments as files; checkpoint.py reads and restores them, saver.py writes them
    guard.py       what happens where numbers are no numbers
    hooks.py  log.py  progress.py
    cost.py        bytes and operations of a recipe; outline.py: shapes of its network
    evaluate.py    quality against number of evaluations
    agreement.py   how far jumps agree, and the best grids; inversion.py: data to noise and back
    validation.py  evaluation while a run trains; held_out.py: on what, and compared with what
    features.py    the networks that it sees with; judge.py: what it keeps of what it sees
    references.py  the real pictures, measured once; metrics/: the distances
    likelihood.py  bounds and densities of data; measuring.py: over a whole set; rate_distortion.py
    path_bound.py  of a learned drift, by simulated paths; continuous_bound.py: of a learned process
    report.py      run folders as one HTML page; comparison.py, ..._tables.py: its tables
    study.py       what a study asks for; study_page.py: its page; point_pictures.py: points of the plane
    charts.py      lines as inline SVG; tensor_memory.py: the bytes of a step
"""
