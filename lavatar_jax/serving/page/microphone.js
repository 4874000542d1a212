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
  #started = null; // what `start` returns, until `stop`
  #stopped = new AbortController();
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

  // Asks for permission: once, however often it is called until `stop`. Throws an Error whose message is to be shown.
  start() {
    if (!this.#started) {
      const stopped = (this.#stopped = new AbortController()).signal;
      this.#started = this.#open(stopped).catch((problem) => {
        if (stopped.aborted) return; // nobody waits for it any more
        this.stop();
        throw problem;
      });
    }
    return this.#started;
  }

  async #open(stopped) {
    if (!navigator.mediaDevices) throw new Error(INSECURE);
    // The avatar's own voice must not come back through the microphone; loudness is the server's business.
    const wanted = { echoCancellation: true, noiseSuppression: true, autoGainControl: false };
    try {
      const stream = await navigator.mediaDevices.getUserMedia({ audio: wanted });
      const [track] = stream.getAudioTracks();
      if (stopped.aborted) return track.stop();
      this.track = track;
      track.enabled = !this.#muted;
      track.addEventListener("ended", () => {
        this.stop();
        this.onLost();
      });
      await this.#listen(stream);
    } catch (problem) {
      throw new Error(WORDS[problem.name] ?? `The microphone does not work (${problem.name}).`);
    }
    if (!stopped.aborted) this.onOpened();
  }

  async #listen(stream) {
    const context = (this.#context = new AudioContext()); // after `stop`, another one may be in its place
    this.rate = context.sampleRate;
    await context.audioWorklet.addModule("/page/microphone-worklet.js");
    const pieces = new AudioWorkletNode(context, "pieces", { numberOfOutputs: 0 });
    pieces.port.onmessage = ({ data }) => {
      this.onLevel(this.#muted ? -Infinity : data.decibels);
      if (!this.#muted) this.onPiece(data.piece);
    };
    context.createMediaStreamSource(stream).connect(pieces);
    await context.resume();
  }

  stop() {
    this.#stopped.abort(); // what the browser has yet to answer is not wanted any more
    this.#started = null;
    this.track?.stop();
    this.track = null;
    this.#context?.close();
    this.#context = null;
    this.onLevel(-Infinity);
  }
}
