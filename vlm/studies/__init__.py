"""Studies: grids of runs declared as data, run in dependency order, and drawn as supervision curves.

`plan` turns a study.yaml into jobs, a launcher runs them, `collect` reads their scores and `curves` shows them;
`run` does all of this in order, and `conclude` its end: `questions` reads the score of each question, `compare` sets the
points against each other with `statistics` and `exchange`, and `report` and `board` (TensorBoard) tell of it.
"""
