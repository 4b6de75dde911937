"""The code on the pages is run as users run it: see tests/launch."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))
