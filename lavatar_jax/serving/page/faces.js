// The picker: bundled faces, and one's own picture.

const OWN = "own";

export class Faces {
  #own = null; // { image, consent_name, url }

  // `crop`: the dialog; `chosen(url, name)`: what the stage shows; `problem`: says what went wrong.
  constructor({ list, input, crop, chosen, problem }) {
    Object.assign(this, { list, input, crop, chosen, problem });
    list.addEventListener("change", () => this.#choose());
    input.onchange = () => {
      const file = input.files[0];
      input.value = ""; // the same file can be chosen again
      if (file) this.#upload(file);
    };
  }

  fill(faces) {
    this.list.replaceChildren(
      ...faces.map((face) => this.#tile(face.id, face.name, face.thumbnail, face.image)),
      this.#button(),
    );
    this.list.querySelector("input").checked = true;
    this.#choose();
  }

  // What the server is to be asked for.
  get wish() {
    const { value } = this.#selected;
    if (value !== OWN) return { face: value };
    const { image, consent_name: name } = this.#own;
    return { image, consent: true, ...(name && { consent_name: name }) };
  }

  // A session that goes on after a reload has this face; null: a picture that only the server knows.
  mark(face) {
    const radio = face && this.list.querySelector(`input[value="${CSS.escape(face)}"]`);
    if (!radio || radio.checked) return;
    radio.checked = true;
    this.#choose();
  }

  get #selected() {
    return this.list.querySelector("input:checked");
  }

  #choose() {
    this.chosen(this.#selected.dataset.image, this.#selected.dataset.name);
  }

  #tile(value, name, thumbnail, image) {
    const tile = document.createElement("label");
    tile.className = "face";
    const radio = Object.assign(document.createElement("input"), { type: "radio", name: "face", value });
    radio.dataset.image = image;
    radio.dataset.name = name;
    const picture = Object.assign(document.createElement("img"), { src: thumbnail, alt: "" });
    const caption = Object.assign(document.createElement("span"), { textContent: name });
    tile.append(radio, picture, caption);
    return tile;
  }

  #button() {
    const button = Object.assign(document.createElement("button"), { type: "button", className: "face add" });
    button.id = "add-picture";
    const plus = Object.assign(document.createElement("b"), { textContent: "+", ariaHidden: "true" });
    button.append(plus, Object.assign(document.createElement("span"), { textContent: "Your picture" }));
    button.onclick = () => this.input.click();
    return button;
  }

  async #upload(file) {
    try {
      const own = await this.crop.ask(file);
      if (own) this.#take(own);
    } catch (problem) {
      this.problem(problem.message);
    }
  }

  #take(own) {
    if (this.#own) URL.revokeObjectURL(this.#own.url);
    this.#own = { ...own, url: URL.createObjectURL(own.image) };
    this.list.querySelector(`input[value=${OWN}]`)?.parentElement.remove();
    const tile = this.#tile(OWN, "You", this.#own.url, this.#own.url);
    this.list.prepend(tile);
    const radio = tile.querySelector("input");
    radio.checked = true;
    radio.focus();
    this.#choose();
  }
}
