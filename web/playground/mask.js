/** Painting what of a picture shall be drawn anew. */

const SIDE = 64; // pixels of the picture
const FACTOR = 4; // pixels of a latent: a mask is as coarse as that
const BRUSH = 6; // radius, in pixels

export class Mask {
  /**
   * @param {HTMLCanvasElement} canvas lies over the picture, and takes the focus.
   * @param {() => void} onChange is called when a stroke is done.
   */
  constructor(canvas, onChange) {
    Object.assign(this, { canvas, onChange });
    canvas.width = canvas.height = SIDE;
    this.pixels = new Uint8Array(SIDE ** 2); // 1 where the picture is to be drawn
    this.cursor = [SIDE / 2, SIDE / 2]; // of the keyboard's brush
    this.isErasing = false;
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return [((event.clientX - box.left) / box.width) * SIDE, ((event.clientY - box.top) / box.height) * SIDE];
    };
    canvas.addEventListener('pointerdown', (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.paint(...place(event));
    });
    canvas.addEventListener('pointermove', (event) => {
      if (canvas.hasPointerCapture(event.pointerId)) this.paint(...place(event));
    });
    canvas.addEventListener('pointerup', () => onChange());
    canvas.addEventListener('focus', () => this.show());
    canvas.addEventListener('blur', () => this.show());
    canvas.addEventListener('keydown', (event) => this.onKey(event));
    this.show();
  }

  onKey(event) {
    const steps = { ArrowLeft: [-4, 0], ArrowRight: [4, 0], ArrowUp: [0, -4], ArrowDown: [0, 4] };
    if (event.key in steps) {
      this.cursor = this.cursor.map((value, i) => Math.min(SIDE - 1, Math.max(0, value + steps[event.key][i])));
      this.show();
    } else if (event.key === ' ') {
      this.paint(...this.cursor);
      this.onChange();
    } else return;
    event.preventDefault();
  }

  paint(x, y) {
    for (let row = 0; row < SIDE; row++) {
      for (let column = 0; column < SIDE; column++) {
        if ((column + 0.5 - x) ** 2 + (row + 0.5 - y) ** 2 < BRUSH ** 2) this.pixels[row * SIDE + column] = this.isErasing ? 0 : 1;
      }
    }
    this.show();
  }

  /** Take the right half, the left one, all or nothing. */
  fill(which) {
    const isIn = { left: (x) => x < SIDE / 2, right: (x) => x >= SIDE / 2, all: () => true, nothing: () => false }[which];
    this.pixels.forEach((_, at) => (this.pixels[at] = isIn(at % SIDE) ? 1 : 0));
    this.show();
    this.onChange();
  }

  get isEmpty() {
    return !this.pixels.includes(1);
  }

  /** Stripes over what is marked, and the keyboard's brush while the canvas has the focus. */
  show() {
    const pen = this.canvas.getContext('2d');
    const picture = pen.createImageData(SIDE, SIDE);
    this.pixels.forEach((flag, at) => {
      const stripe = (Math.floor(at / SIDE) + (at % SIDE)) % FACTOR < 2;
      if (flag) picture.data.set(stripe ? [240, 90, 40, 215] : [255, 255, 255, 190], 4 * at);
    });
    pen.putImageData(picture, 0, 0);
    if (!this.canvas.matches(':focus-visible')) return;
    pen.beginPath();
    pen.arc(...this.cursor, BRUSH, 0, 2 * Math.PI);
    pen.strokeStyle = '#000';
    pen.stroke();
    pen.strokeStyle = '#fff';
    pen.setLineDash([2, 2]);
    pen.stroke();
    pen.setLineDash([]);
  }
}
