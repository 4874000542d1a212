// Runs beside the microphone: every 20 ms its sound as 16-bit samples, and how loud it is.

class Pieces extends AudioWorkletProcessor {
  constructor() {
    super();
    this.piece = new Int16Array(Math.round(sampleRate / 50));
    this.filled = 0;
    this.power = 0;
  }

  process([input]) {
    for (const value of input[0] ?? []) {
      const sample = Math.max(-1, Math.min(1, value));
      this.power += sample * sample;
      this.piece[this.filled++] = sample * 32767;
      if (this.filled === this.piece.length) this.send();
    }
    return true;
  }

  send() {
    const decibels = 10 * Math.log10(this.power / this.piece.length + 1e-10);
    this.port.postMessage({ piece: this.piece, decibels }, [this.piece.buffer]);
    this.piece = new Int16Array(Math.round(sampleRate / 50));
    this.filled = this.power = 0;
  }
}

registerProcessor("pieces", Pieces);
