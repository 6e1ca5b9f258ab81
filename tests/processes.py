"""Several real processes on gloo, for tests of what they compute together."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on(world: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """`work(*arguments)` on each of `world` processes -> what each returned, as JSON carries it.

    `work` is a function of a module, so that a process that starts anew can import it. The first rank's own error is
    raised here with its traceback.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=_one, args=(rank, world, work, folder, arguments), daemon=True) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    for process in processes:
        if process.is_alive():
            process.kill()
    errors = sorted(folder.glob("error_*.txt"))
    own = [text for path in errors if "Connection" not in (text := path.read_text())]
    if own or errors:
        raise AssertionError((own or [errors[0].read_text()])[0])
    return [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(world)]


def _one(rank: int, world: int, work: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
        result = work(*arguments)
        (folder / f"result_{rank}.json").write_text(json.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error_{rank}.txt").write_text(traceback.format_exc())
        raise
