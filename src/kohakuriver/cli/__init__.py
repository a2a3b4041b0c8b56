"""The `kohakuriver` command: argument parsing, output, and the wiring of the rest of the package."""
