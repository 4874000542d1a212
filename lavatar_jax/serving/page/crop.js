// The dialog in which a square is cut out of somebody's own picture, and consent is given.

const DEEPEST = 8; // times that one can zoom in
const SIDE = 1024; // pixels of the result, at most
const STEP = 0.04; // of the view, for an arrow key

const $ = (id) => document.getElementById(id);

export class Crop {
  #image = null;
  #scale = 1; // view pixels for one of the picture
  #x = 0; // what is in the middle of the view
  #y = 0;
  #pointers = new Map();
  #done = () => {};

  constructor(statement) {
    this.dialog = $("crop");
    this.view = $("crop-view");
    this.zoom = $("crop-zoom");
    $("consent-statement").textContent = statement;
    $("crop-cancel").onclick = () => this.dialog.close();
    this.dialog.onclose = () => this.#done(null);
    this.dialog.querySelector("form").onsubmit = (event) => this.#use(event);
    this.zoom.oninput = () => this.#zoomTo(this.#least * DEEPEST ** (this.zoom.value / 100));
    this.view.onkeydown = (event) => this.#key(event);
    this.view.onwheel = (event) => {
      event.preventDefault();
      this.#zoomTo(this.#scale * Math.exp(-event.deltaY / 400), this.#place(event));
    };
    this.view.onpointerdown = (event) => {
      this.view.setPointerCapture(event.pointerId);
      this.#pointers.set(event.pointerId, this.#place(event));
    };
    this.view.onpointermove = (event) => this.#drag(event);
    this.view.onpointerup = this.view.onpointercancel = (event) => this.#pointers.delete(event.pointerId);
  }

  // Resolves to { image, consent_name }, or null. Throws an Error whose message is to be shown.
  async ask(file) {
    try {
      this.#image = await createImageBitmap(file, { imageOrientation: "from-image" });
    } catch {
      throw new Error("This file is not a picture that the browser can read. Choose a PNG, JPEG or WebP.");
    }
    this.#x = this.#image.width / 2;
    this.#y = this.#image.height / 2;
    this.#zoomTo(this.#least);
    $("consent").checked = false;
    $("crop-problem").textContent = "";
    this.dialog.showModal();
    this.view.focus();
    return new Promise((resolve) => (this.#done = resolve));
  }

  get #least() {
    return this.view.width / Math.min(this.#image.width, this.#image.height);
  }

  // `place`: what stays where it is, in view pixels from the middle.
  #zoomTo(scale, { x, y } = { x: 0, y: 0 }) {
    scale = Math.max(this.#least, Math.min(this.#least * DEEPEST, scale));
    this.#x += x / this.#scale - x / scale;
    this.#y += y / this.#scale - y / scale;
    this.#scale = scale;
    this.zoom.value = (100 * Math.log(scale / this.#least)) / Math.log(DEEPEST);
    this.#draw();
  }

  #move(x, y) {
    this.#x -= x / this.#scale;
    this.#y -= y / this.#scale;
    this.#draw();
  }

  #place(event) {
    const box = this.view.getBoundingClientRect();
    const scale = this.view.width / box.width;
    return {
      x: (event.clientX - box.left - box.width / 2) * scale,
      y: (event.clientY - box.top - box.height / 2) * scale,
    };
  }

  #drag(event) {
    const before = this.#pointers.get(event.pointerId);
    if (!before) return;
    const now = this.#place(event);
    this.#pointers.set(event.pointerId, now);
    const other = [...this.#pointers].find(([id]) => id !== event.pointerId)?.[1];
    if (!other) return this.#move(now.x - before.x, now.y - before.y);
    const distance = (place) => Math.hypot(place.x - other.x, place.y - other.y) || 1;
    this.#zoomTo((this.#scale * distance(now)) / distance(before), other);
  }

  #key(event) {
    const step = STEP * this.view.width;
    const keys = {
      ArrowLeft: () => this.#move(-step, 0),
      ArrowRight: () => this.#move(step, 0),
      ArrowUp: () => this.#move(0, -step),
      ArrowDown: () => this.#move(0, step),
      "+": () => this.#zoomTo(this.#scale * 1.1),
      "=": () => this.#zoomTo(this.#scale * 1.1),
      "-": () => this.#zoomTo(this.#scale / 1.1),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  }

  #draw() {
    const half = this.view.width / this.#scale / 2;
    this.#x = Math.max(half, Math.min(this.#image.width - half, this.#x));
    this.#y = Math.max(half, Math.min(this.#image.height - half, this.#y));
    this.#paint(this.view);
    this.#oval();
  }

  #paint(canvas) {
    const side = this.view.width / this.#scale;
    const brush = canvas.getContext("2d");
    brush.fillStyle = "white"; // behind what is transparent
    brush.fillRect(0, 0, canvas.width, canvas.height);
    const [left, top] = [this.#x - side / 2, this.#y - side / 2];
    brush.drawImage(this.#image, left, top, side, side, 0, 0, canvas.width, canvas.height);
  }

  // Where the head of a portrait is.
  #oval() {
    const side = this.view.width;
    const brush = this.view.getContext("2d");
    brush.beginPath();
    brush.rect(0, 0, side, side);
    brush.ellipse(side / 2, 0.46 * side, 0.27 * side, 0.36 * side, 0, 0, 2 * Math.PI);
    brush.fillStyle = "rgb(0 0 0 / 38%)";
    brush.fill("evenodd");
    brush.beginPath();
    brush.ellipse(side / 2, 0.46 * side, 0.27 * side, 0.36 * side, 0, 0, 2 * Math.PI);
    brush.strokeStyle = "rgb(255 255 255 / 85%)";
    brush.lineWidth = 3;
    brush.stroke();
  }

  async #use(event) {
    event.preventDefault();
    if (!$("consent").checked) {
      $("crop-problem").textContent = "Please tick the statement first: a face is only animated with consent.";
      $("consent").focus();
      return;
    }
    const result = document.createElement("canvas");
    const side = Math.round(this.view.width / this.#scale);
    result.width = result.height = Math.max(128, Math.min(SIDE, side));
    this.#paint(result);
    const image = await new Promise((resolve) => result.toBlob(resolve, "image/jpeg", 0.95));
    this.#done({ image, consent_name: $("consent-name").value.trim() });
    this.dialog.close();
  }
}
