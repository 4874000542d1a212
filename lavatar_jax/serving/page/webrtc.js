// A session over WebRTC: microphone up, picture and sound down, events on a data channel.

import * as api from "./api.js";

const GATHERING = 1000; // milliseconds in which the browser finds its own addresses
const CONNECTING = 5000;

export const supported = () =>
  "RTCPeerConnection" in window &&
  (RTCRtpReceiver.getCapabilities?.("video")?.codecs ?? []).some((codec) => /h264/i.test(codec.mimeType));

// Resolves when connected. `view`: what shows it; `told`: events; `lost`: it broke, called once.
export async function connect({ kept, microphone, view, told, lost }) {
  const peer = new RTCPeerConnection({ iceServers: await api.iceServers(kept) });
  const up = peer.addTransceiver(microphone.track ?? "audio", { direction: "sendrecv" });
  peer.addTransceiver("video", { direction: "recvonly" });
  const channel = peer.createDataChannel("events");
  let over = false;

  function close() {
    over = true;
    peer.close();
    view.stop();
  }

  channel.onmessage = ({ data }) => told(JSON.parse(data));
  peer.ontrack = ({ track, streams }) => view.show(track, streams[0]);
  try {
    await peer.setLocalDescription();
    await until(peer, "icegatheringstatechange", () => peer.iceGatheringState === "complete", GATHERING);
    const answer = await api.call(kept, peer.localDescription.sdp);
    await peer.setRemoteDescription({ type: "answer", sdp: answer });
    if (!(await until(channel, "open", () => channel.readyState === "open", CONNECTING)))
      throw new Error("no connection by WebRTC");
  } catch (problem) {
    close();
    throw problem;
  }

  // What merely falls silent is noticed by who waits for events.
  const broke = () => {
    if (over) return;
    close();
    lost();
  };
  peer.onconnectionstatechange = () => peer.connectionState === "failed" && broke();
  channel.onclose = broke;

  const send = (verb) => channel.readyState === "open" && channel.send(JSON.stringify(verb));
  // The server may remember something else, of this page before it was loaded again.
  const tellMuted = () => send({ type: "microphone", muted: microphone.muted || !microphone.open });
  tellMuted();

  return {
    name: "WebRTC",
    send,
    microphoneChanged() {
      up.sender.replaceTrack(microphone.track);
      tellMuted();
    },
    close,
  };
}

// Whether `done` became true in time, looked at whenever `event` happens.
function until(target, event, done, milliseconds) {
  return new Promise((resolve) => {
    const finish = (result) => {
      clearTimeout(timer);
      target.removeEventListener(event, look);
      resolve(result);
    };
    const look = () => done() && finish(true);
    const timer = setTimeout(finish, milliseconds, false);
    target.addEventListener(event, look);
    look();
  });
}
