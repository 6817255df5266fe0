"""Where the repository and its datasets are."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "datasets" / "metaworld_drawer_open"
# Larger recordings of real arms, for the tests that skip where there are none.
REAL = Path(os.environ.get("ARMATURE_REAL_DATA", ROOT.parent / "shared" / "datasets"))
WITHOUT_TORCHCODEC = ROOT / "tests" / "helpers" / "without_torchcodec"  # put on sys.path to hide torchcodec
