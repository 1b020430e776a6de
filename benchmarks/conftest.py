"""Makes the helper modules of this folder importable for pytest, as they are for a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
