"""The specified entry point: python scripts/main.py --config FILE --mode test|infer-volume --checkpoint MODEL."""

import sys

from connectomics.cli import script_main

sys.exit(script_main())
