// The microphone: a track for WebRTC, pieces of sound for the WebSocket, and a level for the eye.

const WORDS = {
  NotAllowedError:
    "The microphone is blocked. Allow it for this page in the browser's address bar, then switch it on again.",
  NotFoundError: "No microphone was found. Plug one in, then switch it on again.",
  NotReadableError: "Another program keeps the microphone busy. Close it there, then switch it on again.",
};
const INSECURE =
  "Browsers give a microphone only to pages over https or on this very machine. Typing works here all the same.";

export class Microphone {
  #context = null;
  #muted = false;

  track = null;
  rate = 48000;
  onLevel = () => {}; // decibels of full scale, 50 times a second
  onPiece = () => {}; // Int16Array of 20 ms
  onOpened = () => {};
  onLost = () => {};

  get open() {
    return this.track !== null;
  }

  get muted() {
    return this.#muted;
  }

  set muted(muted) {
    this.#muted = muted;
    if (this.track) this.track.enabled = !muted;
  }

  // Asks for permission. Throws an Error whose message is to be shown.
  async start() {
    if (this.open) return;
    if (!navigator.mediaDevices) throw new Error(INSECURE);
    // The avatar's own voice must not come back through the microphone; loudness is the server's business.
    const wanted = { echoCancellation: true, noiseSuppression: true, autoGainControl: false };
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: wanted });
    } catch (problem) {
      throw new Error(WORDS[problem.name] ?? `The microphone does not work (${problem.name}).`);
    }
    this.track = stream.getAudioTracks()[0];
    this.track.enabled = !this.#muted;
    this.track.addEventListener("ended", () => {
      this.stop();
      this.onLost();
    });
    await this.#listen(stream);
    this.onOpened();
  }

  async #listen(stream) {
    this.#context = new AudioContext();
    this.rate = this.#context.sampleRate;
    await this.#context.audioWorklet.addModule("/page/microphone-worklet.js");
    const pieces = new AudioWorkletNode(this.#context, "pieces", { numberOfOutputs: 0 });
    pieces.port.onmessage = ({ data }) => {
      this.onLevel(this.#muted ? -Infinity : data.decibels);
      if (!this.#muted) this.onPiece(data.piece);
    };
    this.#context.createMediaStreamSource(stream).connect(pieces);
    await this.#context.resume();
  }

  stop() {
    this.track?.stop();
    this.track = null;
    this.#context?.close();
    this.#context = null;
    this.onLevel(-Infinity);
  }
}
