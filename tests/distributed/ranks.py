"""Runs a function on several gloo processes, forked from a server that has torch loaded."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT = 120  # seconds
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama",
        "peft",
    ]
)


def run_ranks(world: int, work: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """``work`` on every rank of a gloo group; what each of them returns, in order."""
    port = _free_port()
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(
            target=_child, args=(theirs, rank, world, port, partial(work, *args, **options))
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return [_result(rank, pipe) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _result(rank: int, pipe: Connection) -> Any:
    if not pipe.poll(_TIMEOUT):
        raise TimeoutError(f"rank {rank} has not answered after {_TIMEOUT} s")
    # Tensors travel by value: shared memory would be gone with the process that made it.
    is_error, value = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
    if is_error:
        raise AssertionError(f"rank {rank} failed:\n{value}")
    return value


def _child(pipe: Connection, rank: int, world: int, port: int, work: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    try:
        dist.init_process_group("gloo")
        answer = (False, work())
    except BaseException:
        answer = (True, traceback.format_exc())
    buffer = io.BytesIO()
    torch.save(answer, buffer)
    pipe.send_bytes(buffer.getvalue())
    pipe.close()
    if not answer[0]:
        dist.barrier()
        dist.destroy_process_group()
