// The same session over one WebSocket, for where WebRTC finds no way.

const CONNECTING = 8000; // milliseconds
const BEHIND = 64000; // bytes of microphone that may wait
const VIDEO = 1;
const KEYFRAME = 1;

export const supported = () => "VideoDecoder" in window;

// Resolves when connected. `view`: what shows it; `told`: events; `lost`: it broke, called once.
export function connect({ kept, microphone, view, told, lost }) {
  const url = new URL(`/v1/sessions/${kept.id}/stream`, window.location.href.replace(/^http/, "ws"));
  const socket = new WebSocket(url, ["lavatar.v1", `token.${kept.token}`]);
  socket.binaryType = "arraybuffer";
  const send = (verb) => socket.readyState === WebSocket.OPEN && socket.send(JSON.stringify(verb));
  let over = false;
  let player = null;

  function listen() {
    send({ type: "microphone", sample_rate: microphone.rate, muted: microphone.muted || !microphone.open });
    microphone.onPiece = (piece) => {
      if (socket.readyState === WebSocket.OPEN && socket.bufferedAmount < BEHIND) socket.send(piece);
    };
  }

  function receive(message) {
    const header = new DataView(message, 0, 16);
    const kind = header.getUint8(0);
    const time = header.getFloat64(8, true) / 1e6;
    if (kind !== VIDEO) return player?.hear(time, new Int16Array(message, 16));
    const isKeyframe = (header.getUint8(1) & KEYFRAME) !== 0;
    player?.see(time, new Uint8Array(message, 16), header.getUint32(4, true), isKeyframe);
  }

  function close() {
    over = true;
    microphone.onPiece = () => {};
    socket.close();
    view.stop();
  }

  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => socket.close(), CONNECTING);
    socket.onmessage = ({ data }) => {
      if (data instanceof ArrayBuffer) return receive(data);
      const event = JSON.parse(data);
      if (event.type !== "stream.config") return told(event);
      clearTimeout(timer);
      player = view.play(event.video);
      listen();
      resolve({ name: "WebSocket", send, microphoneChanged: listen, close });
    };
    socket.onclose = () => {
      clearTimeout(timer);
      if (over) return;
      close();
      if (player) lost();
      else reject(new Error("no connection by WebSocket"));
    };
  });
}
