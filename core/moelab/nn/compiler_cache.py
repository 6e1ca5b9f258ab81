"""Where torch's compiler keeps its files: its import makes that folder, and optimizers import it that compile nothing.

torch.optim and FakeTensorMode import torch._dynamo, which makes `TORCHINDUCTOR_CACHE_DIR`, or torchinductor_USER in the
folder for temporary files (torch 2.13, torch/_inductor/runtime/cache_dir_utils.py): where it can't, no run could begin.
"""

from __future__ import annotations

import atexit
import getpass
import logging
import os
import re
import shutil
import sys
import tempfile

logger = logging.getLogger("moelab")
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def ensure_compiler_cache() -> None:
    """Before torch._dynamo is imported: where its folder can't be made, another for this process, told in a line."""
    if "torch._dynamo" in sys.modules:
        return
    try:
        folder = os.environ.get(VARIABLE) or os.path.join(tempfile.gettempdir(), f"torchinductor_{_user()}")
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        instead = tempfile.mkdtemp(prefix="moelab_compiler_")
        atexit.register(shutil.rmtree, instead, ignore_errors=True)
        os.environ[VARIABLE] = instead
        logger.warning(
            "the folder where torch's compiler keeps its files can't be made (%s; %s names another): a temporary one "
            "stands in for it",
            error, VARIABLE,
        )  # fmt: skip


def _user() -> str:
    """As torch names the folder."""
    try:
        name = getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):
        name = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
    return re.sub(r'[\\/:*?"<>|]', "_", name)
