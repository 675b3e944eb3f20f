"""Where things that are remembered for this user lie, from run to run."""

import os
import sys
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return the folder of what is remembered for this user, of one kind."""
    known = os.environ.get("XDG_CACHE_HOME")
    home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return (Path(known) if known else home) / "mlx_distill" / name
