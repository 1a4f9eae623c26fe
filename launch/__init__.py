"""Where work runs and where the result goes.

    cli.py         the commands; answers --help without importing torch; cli_shards.py: `driftmap shards`
    quickstart.py  the whole line on one machine, from pictures to a few-step pipeline
    evaluation.py  from run folders to a table
    sampling.py    from a run folder to a grid of pictures; inversion.py: from pictures to noise and back
    export.py      a run as a diffusers pipeline folder
    plan.py        what a config will cost, before it runs
    bench.py       what our code costs beside a reference; bench_loader.py, bench_peers.py: loaders of others;
                   bench_tangent.py: derivatives; bench_checkerboard.py: rules of flow maps on points
Nothing is imported here: `driftmap --help` has to answer at once on a login node.
"""
