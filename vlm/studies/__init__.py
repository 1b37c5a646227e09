"""Studies: grids of runs declared as data, run in dependency order, and drawn as supervision curves.

`plan` turns a study.yaml into jobs, `driver` hands them to a launcher, `work` is what a job does, `board` shows them
run and `outlook` what is left. `conclude` is the end: `collect` reads the scores of finished runs and `questions` those
of each question, `compare` sets the points against each other with `statistics` and `exchange`, and `curves`, `report`
and `tensorboard` tell of it. `run` does all of this in order.
"""
