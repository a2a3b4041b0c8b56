"""Copying files between this machine and a task: two trees, and what makes one like the other."""
