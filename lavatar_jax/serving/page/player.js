// Shows what comes over the WebSocket: pictures decoded by WebCodecs, sound by Web Audio, both on one clock.

const STORE = 0.12; // seconds by which everything waits, so that late pieces are still in time
const LONGEST = 0.4; // more is waiting after a pause of the network: catch up; so much has room in MOST_FRAMES
const WATCHED = 250; // pieces of sound and picture, 5 s: delay that none of them needed is given up
const LOUD = 1e-4; // power: -40 dB, as for the server; of what is softer nobody misses 40 ms
const MOST_FRAMES = 12; // decoded ones that may wait: decoders have no room for many more

export class Player {
  #sound = new AudioContext({ sampleRate: 16000, latencyHint: "interactive" });
  #volume = this.#sound.createGain();
  #offset = null; // from the session's clock to ours, seconds
  #lags = []; // by which the last pieces came later than their time, on our clock
  #sources = new Map(); // of sound that may still be heard, and when each ends
  #frames = [];
  #pictures = new Map(); // when each arrived and is due, by timestamp
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
    this.#sound.onstatechange = () => this.#begin(); // the clock is another one
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

  #begin() {
    this.#offset = null;
    this.#lags = [];
    this.#leaveOut(0);
  }

  // When to hear or show what belongs to `time`. What was to come after it gives way, or both would be heard at once.
  #due(time) {
    const now = this.#now();
    const due = time + this.#offset;
    this.#lags.push(now - time);
    if (this.#lags.length > WATCHED) this.#lags.shift();
    if (this.#offset !== null && due > now && due < now + LONGEST) return due;
    this.#offset = now + STORE - time;
    this.#leaveOut(now + STORE);
    return now + STORE;
  }

  #leaveOut(after) {
    for (const [source, end] of this.#sources) {
      if (end <= after) continue;
      source.stop(after);
      this.#sources.delete(source);
    }
    for (const picture of this.#pictures.values()) picture.due = Math.min(picture.due, after);
  }

  // Seconds by which a pause of the network made everything later, and which have not been needed since.
  #spare() {
    return this.#lags.length < WATCHED ? 0 : this.#offset - STORE - Math.max(...this.#lags);
  }

  // `samples`: 16-bit, of 16 kHz, to be heard at `time` of the session's clock.
  hear(time, samples) {
    const due = this.#due(time);
    const sound = Float32Array.from(samples, (sample) => sample / 32768);
    const seconds = sound.length / 16000;
    const isLoud = sound.reduce((sum, value) => sum + value * value, 0) > LOUD * sound.length;
    if (!isLoud && this.#spare() >= seconds) {
      this.#offset -= seconds; // what comes next takes its place
      return;
    }
    if (this.blocked) return;
    const buffer = this.#sound.createBuffer(1, sound.length, 16000);
    buffer.copyToChannel(sound, 0);
    const source = this.#sound.createBufferSource();
    source.buffer = buffer;
    source.connect(this.#volume);
    source.onended = () => this.#sources.delete(source);
    source.start(due);
    this.#sources.set(source, due + seconds);
  }

  // `data`: one access unit of H.264; a number that is left out was a picture that we missed.
  see(time, data, number, isKeyframe) {
    if (number !== this.#next) this.#needsKeyframe = true;
    this.#next = number + 1;
    if (this.#needsKeyframe && !isKeyframe) return;
    this.#needsKeyframe = false;
    const due = this.#due(time);
    if (this.#decoder?.state !== "configured") this.#decoder = this.#newDecoder();
    const timestamp = Math.round(time * 1e6);
    this.#pictures.set(timestamp, { arrived: performance.now(), due });
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
    const due = (frame) => this.#pictures.get(frame.timestamp)?.due ?? 0;
    while (this.#frames.length && due(this.#frames[0]) <= heardNow) {
      frame?.close();
      frame = this.#frames.shift();
    }
    if (!frame) return;
    this.canvas.getContext("2d").drawImage(frame, 0, 0, this.canvas.width, this.canvas.height);
    const arrived = this.#pictures.get(frame.timestamp)?.arrived;
    this.#pictures.forEach((_, timestamp) => timestamp <= frame.timestamp && this.#pictures.delete(timestamp));
    frame.close();
    this.view.shown(arrived === undefined ? null : performance.now() - arrived);
  }

  close() {
    cancelAnimationFrame(this.#drawing);
    this.#frames.forEach((frame) => frame.close());
    if (this.#decoder?.state === "configured") this.#decoder.close();
    this.#sound.close();
  }
}
