// What shows the avatar: a video for WebRTC, a canvas for the WebSocket, a picture while there is neither.

import { Player } from "./player.js";

const WATCHED = 2000; // milliseconds over which frames are counted

export class Screen {
  #player = null;
  #shown = []; // when frames were
  #silent = false;
  #delay = null;

  onFirstFrame = () => {};
  onBlocked = () => {}; // the browser wants a click before it makes a sound

  constructor({ frame, video, canvas }) {
    this.frame = frame;
    this.video = video;
    this.canvas = canvas;
  }

  // ---- WebRTC

  show(track, stream) {
    if (track.kind !== "video") return;
    this.video.srcObject = stream ?? new MediaStream([track]);
    this.#start();
    this.#watch();
  }

  async #start() {
    try {
      this.video.muted = this.#silent;
      await this.video.play();
    } catch (problem) {
      if (problem.name !== "NotAllowedError") return;
      this.video.muted = true;
      this.onBlocked();
      await this.video.play().catch(() => {});
    }
  }

  #watch() {
    const source = this.video.srcObject;
    if (!this.video.requestVideoFrameCallback) {
      // An older browser shows it as well, but does not count.
      this.video.addEventListener("playing", () => this.shown(null, "video"), { once: true });
      return;
    }
    const next = (now, about) => {
      if (this.video.srcObject !== source) return;
      this.shown(about.receiveTime ? about.expectedDisplayTime - about.receiveTime : null, "video");
      this.video.requestVideoFrameCallback(next);
    };
    this.video.requestVideoFrameCallback(next);
  }

  // ---- WebSocket

  play(video) {
    this.#player = new Player({ canvas: this.canvas, video, view: this });
    this.#player.silent = this.#silent;
    setTimeout(() => this.#player?.blocked && this.onBlocked(), 500);
    return this.#player;
  }

  // ---- both

  // A frame was shown, `delay` milliseconds after it had arrived.
  shown(delay, where = "canvas") {
    const now = performance.now();
    this.#shown = [...this.#shown.filter((time) => time > now - WATCHED), now];
    if (delay !== null) this.#delay = this.#delay === null ? delay : 0.9 * this.#delay + 0.1 * delay;
    if (this.frame.dataset.shows === where && !this.frozen) return;
    this.frame.dataset.shows = where;
    this.frozen = false;
    this.onFirstFrame();
  }

  // The last frame stays, until there are new ones.
  stop() {
    if (this.video.srcObject && this.video.videoWidth) {
      this.canvas.width = this.video.videoWidth;
      this.canvas.height = this.video.videoHeight;
      this.canvas.getContext("2d").drawImage(this.video, 0, 0);
      this.frame.dataset.shows = "canvas";
    }
    this.video.srcObject = null;
    this.#player?.close();
    this.#player = null;
    this.#shown = [];
    this.#delay = null;
    this.frozen = true;
  }

  clear() {
    this.frame.dataset.shows = "still";
  }

  set silent(silent) {
    this.#silent = this.video.muted = silent;
    if (this.#player) this.#player.silent = silent;
    this.#player?.resume();
  }

  get silent() {
    return this.#silent;
  }

  get numbers() {
    const now = performance.now();
    const recent = this.#shown.filter((time) => time > now - WATCHED);
    return { fps: recent.length / (WATCHED / 1000), delay: this.#delay };
  }
}
