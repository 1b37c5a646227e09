"""Ways to run the jobs of a study. Each starts jobs after those they need, and tells what failed."""
