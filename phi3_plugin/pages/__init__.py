"""Pages that need no other file and no script: a run, an evaluation, a data set."""
