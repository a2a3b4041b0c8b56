"""The slurm backend: a task is a job of Slurm, run as the user whom the administrator has named for its owner."""
