"""The modules of the fuzzer lie beside it: it is a script, too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
