"""Rank processes for tests: forked, joined, under a watchdog."""

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from typing import Any, Callable, List

import torch
import torch.distributed as dist

from pipeweaver.torch import DistributedTransport
from pipeweaver.torch.rendezvous import RendezvousTransport, socket_mesh

_fork = multiprocessing.get_context("fork")


def run_ranks(ranks: int, transport: str, body: Callable[..., Any], *args: Any,
              timeout_s: float = 120.0) -> List[Any]:
    """body(rank, transport, *args) in `ranks` processes; what they return.

    transport: "gloo", "nccl", "rendezvous", or "none". Raises RuntimeError when a
    rank fails, or when they do not end in time: a hang fails a test.
    """
    mesh = socket_mesh(ranks) if transport == "rendezvous" else None
    store = tempfile.mktemp(prefix="pipeweaver-store-")
    pipes, processes = [], []
    for rank in range(ranks):
        mine, theirs = _fork.Pipe(duplex=False)
        process = _fork.Process(target=_main, args=(
            rank, ranks, transport, mesh, store, theirs, body, args))
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    if mesh is not None:
        for sockets in mesh:
            for sock in sockets.values():
                sock.close()
    results: List[Any] = [None] * ranks
    error = None
    deadline = time.monotonic() + timeout_s
    waiting = set(range(ranks))
    try:
        while waiting and error is None:
            left = deadline - time.monotonic()
            ready = multiprocessing.connection.wait(
                [pipes[r] for r in waiting], max(0, left))
            if not ready:
                error = f"ranks {sorted(waiting)} hang"
            for r in list(waiting):
                if pipes[r] not in ready:
                    continue
                waiting.discard(r)
                try:
                    ok, value = pipes[r].recv()
                except EOFError:
                    ok, value = False, "ended without an answer"
                if not ok:
                    error = f"rank {r}: {value}"
                results[r] = value
    finally:
        for process in processes:
            if error is not None:
                process.kill()
            process.join()
        if os.path.exists(store):
            os.remove(store)
    if error is not None:
        raise RuntimeError(error)
    return results


def _main(rank, ranks, transport, mesh, store, pipe, body, args) -> None:
    torch.set_num_threads(1)
    code = 1
    try:
        link = None
        if transport == "rendezvous":
            for r, sockets in enumerate(mesh):
                if r != rank:
                    for sock in sockets.values():
                        sock.close()
            link = RendezvousTransport(rank, mesh[rank])
        elif transport in ("gloo", "nccl"):
            if transport == "nccl":
                torch.cuda.set_device(rank % torch.cuda.device_count())
                # NCCL wants a GPU for each process of a host: each has its own.
                os.environ["NCCL_HOSTID"] = f"rank-{rank}"
                os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
            dist.init_process_group(transport, init_method=f"file://{store}",
                                    rank=rank, world_size=ranks)
            link = DistributedTransport()
        result = body(rank, link, *args)
        pipe.send((True, result))
        code = 0
        if transport in ("gloo", "nccl"):
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:  # the parent reports it
        if code:
            pipe.send((False, traceback.format_exc()))
    finally:
        sys.stdout.flush()
        pipe.close()
        os._exit(code)
