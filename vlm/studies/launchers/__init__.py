"""Ways to run the jobs of a study. Each takes jobs, starts them once those they need are finished, and tells what failed."""
