"""Looking into a running group: what a worker tells observers (`serving`), and how commands ask (`observer`)."""
