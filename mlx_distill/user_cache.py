"""Where things that are remembered for this user lie, from run to run."""

import errno
import os
import sys
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return the folder of what is remembered for this user, of one kind.

    Raises:
        FileNotFoundError: If the user has no home, as in some containers.
    """
    known = os.environ.get("XDG_CACHE_HOME")
    if known:
        return Path(known) / "mlx_distill" / name
    try:
        home = Path.home()
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, "no home folder is known") from None
    return (
        home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "mlx_distill" / name
    )
