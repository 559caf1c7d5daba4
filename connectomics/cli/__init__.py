"""What was typed, what is printed, exit codes, progress; ``main`` runs a command and returns its exit code."""

from connectomics.cli.program import main, script_main

__all__ = ["main", "script_main"]
