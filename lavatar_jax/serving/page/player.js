// Shows what comes over the WebSocket: pictures decoded by WebCodecs, sound by Web Audio, both on one clock.

const STORE = 0.12; // seconds by which everything waits, so that late pieces are still in time
const LONGEST = 0.6; // more is waiting after a pause of the network: catch up
const MOST_FRAMES = 12; // decoded ones that may wait: decoders have no room for many more

export class Player {
  #sound = new AudioContext({ sampleRate: 16000, latencyHint: "interactive" });
  #volume = this.#sound.createGain();
  #offset = null; // from the session's clock to ours, seconds
  #frames = [];
  #arrivals = new Map();
  #decoder = null;
  #next = 0; // number of the next picture
  #needsKeyframe = true;
  #drawing;

  constructor({ canvas, video, view }) {
    this.video = video;
    this.view = view;
    this.canvas = canvas;
    canvas.width = video.width;
    canvas.height = video.height;
    this.#volume.connect(this.#sound.destination);
    this.#sound.onstatechange = () => (this.#offset = null);
    this.#sound.resume();
    this.#drawing = requestAnimationFrame(() => this.#draw());
  }

  get blocked() {
    return this.#sound.state !== "running"; // until somebody touches the page
  }

  resume() {
    this.#sound.resume();
  }

  set silent(silent) {
    this.#volume.gain.value = silent ? 0 : 1;
  }

  #now() {
    return this.blocked ? performance.now() / 1000 : this.#sound.currentTime;
  }

  #due(time) {
    const now = this.#now();
    const due = time + this.#offset;
    if (this.#offset !== null && due > now && due < now + LONGEST) return due;
    this.#offset = now + STORE - time;
    return now + STORE;
  }

  // `samples`: 16-bit, of 16 kHz, to be heard at `time` of the session's clock.
  hear(time, samples) {
    const due = this.#due(time);
    if (this.blocked) return;
    const buffer = this.#sound.createBuffer(1, samples.length, 16000);
    buffer.copyToChannel(Float32Array.from(samples, (sample) => sample / 32768), 0);
    const source = this.#sound.createBufferSource();
    source.buffer = buffer;
    source.connect(this.#volume);
    source.start(due);
  }

  // `data`: one access unit of H.264; a number that is left out was a picture that we missed.
  see(time, data, number, isKeyframe) {
    if (number !== this.#next) this.#needsKeyframe = true;
    this.#next = number + 1;
    if (this.#needsKeyframe && !isKeyframe) return;
    this.#needsKeyframe = false;
    this.#due(time);
    if (this.#decoder?.state !== "configured") this.#decoder = this.#newDecoder();
    const timestamp = Math.round(time * 1e6);
    this.#arrivals.set(timestamp, performance.now());
    this.#decoder.decode(new EncodedVideoChunk({ type: isKeyframe ? "key" : "delta", timestamp, data }));
  }

  #newDecoder() {
    const decoder = new VideoDecoder({
      output: (frame) => {
        this.#frames.push(frame);
        if (this.#frames.length > MOST_FRAMES) this.#frames.shift().close();
      },
      error: () => (this.#needsKeyframe = true),
    });
    decoder.configure({ codec: this.video.codec, optimizeForLatency: true });
    return decoder;
  }

  #draw() {
    this.#drawing = requestAnimationFrame(() => this.#draw());
    const heardNow = this.#now() - (this.blocked ? 0 : this.#sound.outputLatency || 0);
    let frame = null;
    while (this.#frames.length && this.#frames[0].timestamp / 1e6 + this.#offset <= heardNow) {
      frame?.close();
      frame = this.#frames.shift();
    }
    if (!frame) return;
    this.canvas.getContext("2d").drawImage(frame, 0, 0, this.canvas.width, this.canvas.height);
    const arrived = this.#arrivals.get(frame.timestamp);
    this.#arrivals.forEach((_, timestamp) => timestamp <= frame.timestamp && this.#arrivals.delete(timestamp));
    frame.close();
    this.view.shown(performance.now() - arrived);
  }

  close() {
    cancelAnimationFrame(this.#drawing);
    this.#frames.forEach((frame) => frame.close());
    if (this.#decoder?.state === "configured") this.#decoder.close();
    this.#sound.close();
  }
}
