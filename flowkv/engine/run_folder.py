"""What the import of torch does to the folder of a launcher that was killed meanwhile."""

import os
import shutil
from pathlib import Path

RUN_FOLDER_VARIABLE = "FLOWKV_RUN_FOLDER"  # set by a launcher for its processes
LAUNCHER = "launcher"  # its socket, in that folder until that is removed


def remove_late_comers() -> None:
    """torch makes a folder for its caches when it is imported, with all above it, even where all that has been removed.
    Nobody else is there then to do so again."""
    folder = os.environ.get(RUN_FOLDER_VARIABLE)
    if folder is not None and not Path(folder, LAUNCHER).exists():
        shutil.rmtree(folder, ignore_errors=True)
