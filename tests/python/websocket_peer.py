"""A WebSocket server and client on PyPI's websockets.

  websocket_peer.py serve PORT           echoes messages; the first message back says the path that was asked for
  websocket_peer.py call URL HOST        connects to URL with Host HOST, sends text, 1 MiB of bytes and a ping; closes
  websocket_peer.py hold URL HOST        connects, prints "open", waits until the other side closes, prints the close code
  websocket_peer.py lines URL HOST       connects, sends each line of stdin and prints the message that comes back"""
import asyncio
import os
import sys

import websockets
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve as listen


async def serve(port):
    async def echo(socket):
        await socket.send(socket.request.path)
        async for message in socket:
            await socket.send(message)
    async with listen(echo, "127.0.0.1", port, max_size=None) as server:
        print("ready", flush=True)
        await server.serve_forever()


def dial(url, host):
    # `host` is what the Host header says; the connection goes to the address in the URL.
    address, _, path = url.removeprefix("ws://").partition("/")
    ip, port = address.rsplit(":", 1)
    return connect("ws://%s/%s" % (host, path), host=ip, port=int(port), max_size=None, proxy=None)


async def call(url, host):
    async with dial(url, host) as socket:
        path = await asyncio.wait_for(socket.recv(), 10)
        assert path == "/chat?room=1", path
        blob = os.urandom(1 << 20)
        for message in ("text", blob):
            await socket.send(message)
            assert await asyncio.wait_for(socket.recv(), 20) == message
        await asyncio.wait_for(await socket.ping(), 10)


async def hold(url, host):
    async with dial(url, host) as socket:
        await socket.recv()
        print("open", flush=True)
        try:
            while True:
                await socket.recv()
        except websockets.ConnectionClosed as e:
            print("closed", e.rcvd.code if e.rcvd else "without a close frame", flush=True)


async def lines(url, host):
    async with dial(url, host) as socket:
        await socket.recv()
        while line := await asyncio.to_thread(sys.stdin.readline):
            await socket.send(line.rstrip("\n"))
            print(await socket.recv(), flush=True)


if sys.argv[1] == "serve":
    asyncio.run(serve(int(sys.argv[2])))
else:
    asyncio.run({"call": call, "hold": hold, "lines": lines}[sys.argv[1]](*sys.argv[2:4]))
