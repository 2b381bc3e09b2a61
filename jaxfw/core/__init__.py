"""Runtime, configuration, workdir and logging: everything a program needs that is not mathematics."""
