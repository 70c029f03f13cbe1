"""An image that is done is not lost: where it cannot be saved, it is saved in another place."""

from __future__ import annotations

import sys
import tempfile
from functools import wraps
from pathlib import Path
from typing import Any


def save_somewhere(runner_class: Any) -> None:
    """Let xDiT's runner try other folders where saving fails: the current one, and that of temporary files.

    Args:
        runner_class: `xFuserModelRunner`, whose `save` is replaced.
    """
    save = runner_class.save

    @wraps(save)
    def save_here_or_there(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            save(self, *args, **kwargs)
            return
        except OSError as error:
            first = error
        asked = self.config.output_directory
        for folder in (str(Path.cwd()), tempfile.gettempdir()):
            self.config.output_directory = folder
            try:
                save(self, *args, **kwargs)
            except OSError:
                continue
            reason = first.strerror or str(first)
            print(f"xfuser: --output_directory {asked}: {reason}; saved in {folder} instead", file=sys.stderr)
            return
        raise first

    runner_class.save = save_here_or_there
