"""The specified entry point: python scripts/main.py --config FILE --mode test|infer-volume --checkpoint MODEL."""

from connectomics.cli import script_main
from connectomics.cli.exit import leave

leave(script_main)
