"""Where work runs and where the result goes.

    cli.py         the commands; answers --help without importing torch; cli_shards.py: `driftmap shards`
    quickstart.py  the whole line on one machine, from pictures to a few-step pipeline
    evaluation.py  from run folders to a table
    likelihood.py  from a run folder to likelihood.json; likelihood_request.py: what is asked of a model
    sampling.py    from a run folder to a grid of pictures; inversion.py: from pictures to noise and back
    export.py      a run as a diffusers pipeline folder; export_pretrained.py: as that it started from;
                   pipeline_folder.py: what both do with it
    publish.py     that folder with its card on the Hub: card.py, card_data.py; hub.py: one commit or none
    app.py         the page to try a published model, which needs no driftmap; trying.py: the page of a run
    submission.py  from a config to jobs, sweep.py: to many; slurm.py: through submitit; resources.py: what
                   they ask for; worker.py: what runs in them; snapshot.py: on which code and config
    workflow.py    stages that wait for each other, stage.py: what each makes; workflow_jobs.py queues them
    status.py      how runs and their jobs are doing: jobs.py, job_states.py, run_progress.py, job_logs.py;
                   control.py: stop and resume
    compare.py     a study: methods on sets; compare_data.py: of what, compare_measure.py: what is
                   measured, compare_points.py: where points go
    plan.py        what a config will cost, before it runs
    bench.py       what our code costs beside a reference; bench_loader.py, bench_peers.py: loaders of others;
                   bench_tangent.py: derivatives; bench_checkerboard.py: rules of flow maps on points
Nothing is imported here: `driftmap --help` has to answer at once on a login node.
"""
