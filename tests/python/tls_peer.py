"""Either side of mesh TLS, played by Python's ssl (OpenSSL): it shows whatever certificate it is given and verifies
nothing, so that what is refused is refused by the other side. Prints JSON.

  tls_peer.py call ADDRESS SNI [CERT KEY]     one request (with the protocol of $ALPN, http/1.1 when unset); {"status": 200 or null, "error": why there was none}
  tls_peer.py resume ADDRESS SNI CERT KEY     requests on connections that resume one session, until they are refused
                                              for good (in its last second a certificate is taken and dropped);
                                              a line of JSON for each: {"status", "resumed", "error"}
  tls_peer.py serve ADDRESS CERT KEY          prints "ready", then for each connection how many bytes arrived inside TLS:
                                              {"bytes": n, "error": why no handshake}; answers every request with 200"""
import json
import os
import socket
import ssl
import sys
import time

REQUEST = b"GET /tls HTTP/1.1\r\nHost: reviews\r\nX-Forwarded-Client-Cert: forged\r\nConnection: close\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nx-backend: rogue\r\nConnection: close\r\n\r\nrogue"


def address(text):
    ip, port = text.rsplit(":", 1)
    return ip, int(port)


def client(files):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([os.environ.get("ALPN", "http/1.1")])
    if files:
        context.load_cert_chain(*files)
    return context


def request(context, where, sni, session=None):
    """-> (what happened, the session for the next connection)"""
    told = {"status": None, "resumed": False, "error": None}
    try:
        with socket.create_connection(where, 10) as tcp, context.wrap_socket(tcp, server_hostname=sni, session=session) as tls:
            told["resumed"] = tls.session_reused
            tls.sendall(REQUEST)
            answer = b""
            while chunk := tls.recv(65536):
                answer += chunk
            if answer:
                told["status"] = int(answer.split(b" ")[1])
            else:
                told["error"] = "closed"
            return told, tls.session
    except OSError as e:
        told["error"] = str(e)
        return told, None


def call(where, sni, *files):
    print(json.dumps(request(client(files), address(where), sni)[0]))


def resume(where, sni, *files):
    context, session, refused = client(files), None, 0
    for _ in range(300):
        told, newer = request(context, address(where), sni, session)
        session = newer or session
        print(json.dumps(told), flush=True)
        refused = refused + 1 if told["status"] is None else 0
        if refused == 30:
            return
        time.sleep(0.05)


def serve(where, *files):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    # Asks for the client's certificate without verifying it.
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1", "h2"])
    listener = socket.create_server(address(where))
    print("ready", flush=True)
    while True:
        tcp, _ = listener.accept()
        told = {"bytes": 0, "error": None}
        try:
            tcp.settimeout(10)
            with context.wrap_socket(tcp, server_side=True) as tls:
                while chunk := tls.recv(65536):
                    told["bytes"] += len(chunk)
                    if b"\r\n\r\n" in chunk:
                        tls.sendall(ANSWER)
                        break
        except OSError as e:
            told["error"] = str(e)
        print(json.dumps(told), flush=True)


{"call": call, "resume": resume, "serve": serve}[sys.argv[1]](*sys.argv[2:])
