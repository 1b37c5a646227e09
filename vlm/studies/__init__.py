"""Studies: grids of runs declared as data, run in dependency order, and drawn as supervision curves.

`plan` turns a study.yaml into jobs, a launcher runs them, `collect` reads their scores and `curves` shows them;
`run` does all of this in order.
"""
