"""A client as a process of its own, which tests kill and stop: `python lone_client.py`.

It reads one line, WAY URL TOKEN, where WAY is `webrtc` or `websocket`. Every 100 ms it prints what it has
received, as a line of JSON: `frames`, `gaps` in their numbers, and `late`, by which the last picture and
sound were behind the clock on which they are sent.
"""

import asyncio
import contextlib
import json
import sys
import time
import urllib.request

import aioice.ice
import websockets
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from lavatar_jax.serving.media_ws import AUDIO, HEADER, VIDEO

frames, gaps = 0, 0
late = {"video": 0.0, "audio": 0.0}


def seen(kind: str, time_: float) -> None:
    global frames
    frames += kind == "video"
    late[kind] = time.monotonic() - time_


async def webrtc(url: str, token: str) -> None:
    aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: ["127.0.0.1"]
    peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))

    async def receive(track) -> None:
        with contextlib.suppress(MediaStreamError):
            while True:
                frame = await track.recv()
                seen(track.kind, float(frame.pts * frame.time_base))

    tasks = []
    peer.on("track", lambda track: tasks.append(asyncio.ensure_future(receive(track))))
    peer.createDataChannel("events")
    for kind in ("audio", "video"):
        peer.addTransceiver(kind, "recvonly")
    await peer.setLocalDescription(await peer.createOffer())
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/sdp"}
    asked = urllib.request.Request(f"{url}/call", peer.localDescription.sdp.encode(), headers)
    answer = await asyncio.to_thread(lambda: urllib.request.urlopen(asked).read().decode())
    await peer.setRemoteDescription(RTCSessionDescription(answer, "answer"))
    await asyncio.Event().wait()


async def websocket(url: str, token: str) -> None:
    global gaps
    where, numbers = url.replace("http", "ws", 1) + "/stream", {}
    async with websockets.connect(where, subprotocols=["lavatar.v1", f"token.{token}"]) as socket:
        async for message in socket:
            if isinstance(message, bytes):
                kind, _, _, number, microseconds = HEADER.unpack(message[:16])
                gaps += number != numbers.get(kind, number - 1) + 1
                numbers[kind] = number
                seen({VIDEO: "video", AUDIO: "audio"}[kind], 1e-6 * microseconds)


async def main(way: str, url: str, token: str) -> None:
    watching = asyncio.ensure_future({"webrtc": webrtc, "websocket": websocket}[way](url, token))
    while not watching.done():
        print(json.dumps({"frames": frames, "gaps": gaps, "late": late}), flush=True)
        await asyncio.sleep(0.1)
    watching.result()


if __name__ == "__main__":
    print(json.dumps({"frames": 0, "gaps": 0, "late": late}), flush=True)  # it can begin
    asyncio.run(main(*sys.stdin.readline().split()))
