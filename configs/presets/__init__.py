"""What a published method is in our choices: settings that lie under a config's own.

    data: {shards: shards/latents, batch_size: 128}
    model: {name: dit, num_classes: 10}
    preset: meanflow                     # or on the command line: driftmap train CONFIG preset=meanflow
    objective: {condition_dropout: 0.1}  # what is said here goes on top
    optimizer: {lr: 1e-3}
    training: {steps: 10000}

    preset                    rule               velocity    what makes it
    meanflow                  eulerian           data        3/4 on the diagonal, adaptive weights
    improved-meanflow         eulerian           data        the derivative along its own velocity
    alpha-flow                discrete_eulerian  data        steps from the whole jump to 1/200 of it
    soflow                    discrete_eulerian  data        steps from 1/10 of a jump to 1/500
    ict                       discrete_eulerian  data        to t = 0 only; steps halved 7 times; pseudo-Huber
    ect                       discrete_eulerian  data        as ict, from half the jump on, of a trained model
    consistency-distillation  discrete_eulerian  teacher     to t = 0 only; Heun's step; a target network
    ctm                       discrete_eulerian  teacher     any jump; Heun's step; a target network
    scm                       eulerian           data        the quarter circle, to t = 0; normalised tangents
    align-your-flow           eulerian           teacher     any jump; normalised tangents
    esd                       eulerian           its own     semigradient; learned weights
    lsd                       lagrangian         its own     residual; learned weights
    tvm                       lagrangian         its own     residual; gaps drawn first; a target network
    freeflow                  lagrangian         teacher     from noise alone: no data are seen
    psd                       semigroup                      any split; learned weights
    shortcut                  semigroup                      split in half; a target network
    diffflow-published        diffflow                       a drift and a score; almost a flow
    diffflow-ddpm-residual    diffflow                       a drift that is 0 at birth beside DDPM's own
    cmt                       trajectory                     stored trajectories, to their ends

Where there is a teacher and the file does not say `velocity`, data becomes the teacher's.
Each file says its source and what it leaves out. `driftmap train CONFIG --check` prints all that comes of it.
"""
