"""A transport with the strictest semantics that a trainer's may have.

Rendezvous, with one in-order channel for each pair of ranks that carries both
directions: what NCCL does on one communicator. Gloo forgives what hangs there,
so programs are tested on this one. Over Unix sockets, between processes of one
machine; the same rules as client_agents/standin/rendezvous_transport.h.
"""

import collections
import os
import selectors
import socket
import struct
import threading
import time
from typing import Any, Deque, Dict, List, Optional, Sequence, Tuple

import numpy
import torch
from torch import Tensor

from pipeweaver.torch.transport import Post, Transport

# kind, payload bytes, transfer
_FRAME = struct.Struct("<IIQ")
_POSTED_SEND, _POSTED_RECV, _DATA, _DONE = range(4)


class _Handle:
    __slots__ = ("post", "done", "batch")

    def __init__(self, post: Post):
        self.post = post
        self.done = False
        self.batch = [self]  # those that end together


class _Channel:

    def __init__(self, sock: socket.socket):
        self.socket = sock
        self.posts: Deque[_Handle] = collections.deque()
        self.peer_posts: Deque[Tuple[int, int]] = collections.deque()
        self.data_sent = False
        self.outgoing = bytearray()
        self.incoming = bytearray()
        self.error: Optional[str] = None


def socket_mesh(ranks: int) -> List[Dict[int, socket.socket]]:
    """Connected sockets for ranks that are forked from this process:
    [rank][peer]."""
    mesh: List[Dict[int, socket.socket]] = [{} for _ in range(ranks)]
    for a in range(ranks):
        for b in range(a + 1, ranks):
            mesh[a][b], mesh[b][a] = socket.socketpair()
    return mesh


def _bytes_of(tensor: Tensor) -> numpy.ndarray:
    """Its memory: numpy does not know all of torch's types (bfloat16)."""
    return tensor.detach().view(-1).view(torch.uint8).numpy()


class RendezvousTransport(Transport):
    """One rank's end of the channels, served by a thread until close()."""

    def __init__(self, rank: int, sockets: Dict[int, socket.socket],
                 timeout_s: float = 30.0):
        self._rank = rank
        self._timeout_s = timeout_s
        self._lock = threading.Condition()
        self._channels = {}
        for peer, sock in sockets.items():
            sock.setblocking(False)
            self._channels[peer] = _Channel(sock)
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True,
                                        name="pipeweaver-rendezvous")
        self._thread.start()

    def close(self) -> None:
        with self._lock:
            self._stopping = True
        self._wake()
        self._thread.join()
        for channel in self._channels.values():
            channel.socket.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def post(self, posts: Sequence[Post], batched: bool) -> List[Any]:
        handles = []
        with self._lock:
            for p in posts:
                handle = _Handle(p)
                handles.append(handle)
                channel = self._channels[p.peer]
                channel.posts.append(handle)
                channel.outgoing += _FRAME.pack(
                    _POSTED_SEND if p.send else _POSTED_RECV, 0, p.transfer)
                self._advance(channel)
                self._write(channel)
        if batched:
            for handle in handles:
                handle.batch = handles
        return handles

    def wait(self, handle: _Handle) -> None:
        for one in handle.batch:
            self._wait(one)

    def _wait(self, handle: _Handle) -> None:
        deadline = time.monotonic() + self._timeout_s
        with self._lock:
            while not handle.done:
                channel = self._channels[handle.post.peer]
                if channel.error:
                    raise RuntimeError(channel.error)
                left = deadline - time.monotonic()
                if left <= 0 or not self._lock.wait(left):
                    raise RuntimeError(
                        f"rank {self._rank} waited too long for transfer "
                        f"{handle.post.transfer} with rank {handle.post.peer}")

    def _advance(self, channel: _Channel) -> None:
        """Matches the first posts of both ranks; the sender sends then."""
        if not channel.posts or not channel.peer_posts:
            return
        mine = channel.posts[0].post
        kind, transfer = channel.peer_posts[0]
        if mine.transfer != transfer or mine.send == (kind == _POSTED_SEND):
            self._break(channel, f"rank {self._rank} posted "
                        f"{'a send' if mine.send else 'a receive'} of transfer "
                        f"{mine.transfer} where rank {mine.peer} posted "
                        f"{'a send' if kind == _POSTED_SEND else 'a receive'} "
                        f"of transfer {transfer}")
            return
        if mine.send and not channel.data_sent:
            channel.data_sent = True
            data = _bytes_of(mine.tensor).tobytes()
            channel.outgoing += _FRAME.pack(_DATA, len(data), mine.transfer)
            channel.outgoing += data

    def _finish_first(self, channel: _Channel) -> None:
        channel.posts.popleft().done = True
        channel.peer_posts.popleft()
        channel.data_sent = False
        self._lock.notify_all()
        self._advance(channel)

    def _handle_frame(self, channel: _Channel, kind: int, transfer: int,
                      payload: bytes) -> None:
        if kind in (_POSTED_SEND, _POSTED_RECV):
            channel.peer_posts.append((kind, transfer))
            self._advance(channel)
            return
        mine = channel.posts[0].post if channel.posts else None
        if mine is None or mine.transfer != transfer or (
                mine.send == (kind == _DATA)):
            self._break(channel, f"unexpected frame of transfer {transfer}")
            return
        if kind == _DATA:
            into = _bytes_of(mine.tensor)
            if len(payload) != len(into):
                self._break(channel, f"transfer {transfer} carries "
                            f"{len(payload)} bytes, the receiver expects "
                            f"{len(into)}")
                return
            into[:] = numpy.frombuffer(payload, dtype=numpy.uint8)
            channel.outgoing += _FRAME.pack(_DONE, 0, transfer)
        self._finish_first(channel)

    def _read(self, channel: _Channel) -> None:
        while channel.error is None:
            try:
                data = channel.socket.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._break(channel, "the peer rank is gone")
                return
            channel.incoming += data
            at = 0
            while len(channel.incoming) - at >= _FRAME.size:
                kind, size, transfer = _FRAME.unpack_from(channel.incoming, at)
                begin = at + _FRAME.size
                if len(channel.incoming) - begin < size:
                    break
                payload = bytes(channel.incoming[begin:begin + size])
                self._handle_frame(channel, kind, transfer, payload)
                at = begin + size
            del channel.incoming[:at]

    def _write(self, channel: _Channel) -> None:
        while channel.error is None and channel.outgoing:
            try:
                sent = channel.socket.send(channel.outgoing)
            except BlockingIOError:
                self._wake()
                return
            except OSError:
                self._break(channel, "the peer rank is gone")
                return
            del channel.outgoing[:sent]

    def _break(self, channel: _Channel, error: str) -> None:
        channel.error = channel.error or error
        self._lock.notify_all()

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            pass  # a full pipe wakes the thread just as well

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._wake_read, selectors.EVENT_READ)
        while True:
            with self._lock:
                if self._stopping:
                    break
                for channel in self._channels.values():
                    registered = channel.socket in selector.get_map()
                    if channel.error is not None:
                        if registered:
                            selector.unregister(channel.socket)
                        continue
                    events = selectors.EVENT_READ | (
                        selectors.EVENT_WRITE if channel.outgoing else 0)
                    if registered:
                        selector.modify(channel.socket, events, channel)
                    else:
                        selector.register(channel.socket, events, channel)
            ready = selector.select()
            try:
                while os.read(self._wake_read, 4096):
                    pass
            except BlockingIOError:
                pass
            with self._lock:
                for key, _ in ready:
                    if key.data is not None:
                        self._read(key.data)
                        self._write(key.data)
        selector.close()
