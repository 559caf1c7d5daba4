"""``python -m connectomics.cli``: the program."""

from connectomics.cli.program import run_program

run_program()
