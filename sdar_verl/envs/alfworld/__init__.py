"""ALFWorld: games of rooms and objects, downloaded or generated."""

import os
from pathlib import Path


def spare_the_home() -> None:
    """``import alfworld`` makes ``~/.cache/alfworld``; where that cannot be made, name a folder that exists."""
    folder = Path("~/.cache/alfworld").expanduser()
    if os.environ.get("ALFWORLD_DATA") or folder.is_dir():
        return
    parent = next(path for path in folder.parents if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        os.environ["ALFWORLD_DATA"] = str(Path(__file__).parent)


spare_the_home()
