"""What a result was measured with."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
from typing import Any

import torch
import transformers

from .. import __version__


def command_line(*words: str) -> str:
    """A command as it was typed, without folders: where files lay says nothing to a reader."""
    return shlex.join(re.sub(r"[^\s=\"',]*/", "", word) for word in words)


def describe(command: str) -> dict[str, Any]:
    """Date, command and versions, to be stored beside a result."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "selfindex": __version__,
    }
