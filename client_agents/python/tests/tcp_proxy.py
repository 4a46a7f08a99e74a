"""A TCP proxy whose connections can be cut, silenced and healed.

    python3 tcp_proxy.py PORT TARGET_PORT

Reads one word a line and answers each with `ok`:
reset: ends every connection with RST, and new ones as they come.
blackhole: connections stay open, new ones are taken; nothing passes.
freeze: as blackhole for the connections that are; new ones work.
slow: what comes from now on takes 0.2 s to pass.
heal: all works; what was held up passes on, as when a cable is back.
"""

import asyncio
import socket
import struct
import sys

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s


class Proxy:

    def __init__(self, target_port: int):
        self._target_port = target_port
        self._refuses = False
        self._delay_s = 0.0
        self._flow = asyncio.Event()  # of the connections taken from now on
        self._flow.set()
        self._held = [self._flow]
        self._writers: set = set()

    def command(self, word: str) -> None:
        if word == "reset":
            self._refuses = True
            for writer in list(self._writers):
                _reset(writer)
        elif word == "blackhole":
            self._flow.clear()
        elif word == "freeze":
            self._flow.clear()
            self._flow = asyncio.Event()
            self._flow.set()
            self._held.append(self._flow)
        elif word == "slow":
            self._delay_s = 0.2
        elif word == "heal":
            self._refuses = False
            self._delay_s = 0.0
            for flow in self._held:
                flow.set()
        else:
            raise ValueError(f"command: {word!r}")

    async def serve(self, reader: asyncio.StreamReader,
                    writer: asyncio.StreamWriter) -> None:
        if self._refuses:
            _reset(writer)
            return
        flow = self._flow
        await flow.wait()
        try:
            there = await asyncio.open_connection("127.0.0.1",
                                                  self._target_port)
        except OSError:
            _reset(writer)
            return
        writers = (writer, there[1])
        self._writers.update(writers)
        try:
            await asyncio.gather(self._pump(reader, there[1], flow),
                                 self._pump(there[0], writer, flow))
        except OSError:
            pass
        for w in writers:
            self._writers.discard(w)
            w.close()

    async def _pump(self, reader: asyncio.StreamReader,
                    writer: asyncio.StreamWriter, flow: asyncio.Event) -> None:
        while True:
            data = await reader.read(65536)
            await asyncio.sleep(self._delay_s)
            await flow.wait()
            if not data:
                writer.close()
                return
            writer.write(data)
            await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()


async def main(port: int, target_port: int) -> None:
    proxy = Proxy(target_port)
    await asyncio.start_server(proxy.serve, "127.0.0.1", port)
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    print("ready", flush=True)
    while True:
        line = await commands.readline()
        if not line:
            return
        proxy.command(line.decode().strip())
        print("ok", flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
