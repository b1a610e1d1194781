/** What is drawn into the squares of the laboratory. */

const SHADE_SIZE = 64; // pixels across of the picture of a density

/** A square of the plane on a canvas, from -reach to reach, y upwards. Its pen draws in units of the plane. */
export class Plane {
  constructor(canvas, reach) {
    Object.assign(this, { canvas, reach, pen: canvas.getContext('2d') });
  }

  /** Give the canvas as many pixels as the screen has for it; whatever was drawn is gone. */
  fit() {
    const sharpness = Math.min(devicePixelRatio, 2);
    const pixels = Math.max(1, Math.round(this.canvas.clientWidth * sharpness));
    const unit = pixels / (2 * this.reach);
    this.canvas.width = this.canvas.height = pixels;
    this.pen.setTransform(unit, 0, 0, -unit, pixels / 2, pixels / 2);
    this.pen.lineCap = 'round';
    this.thin = sharpness / unit; // the width of a thin line
  }

  clear() {
    this.pen.clearRect(-this.reach, -this.reach, 2 * this.reach, 2 * this.reach);
  }

  /** A picture that fills the square, its rows from the bottom up. */
  picture(picture) {
    this.pen.drawImage(picture, -this.reach, -this.reach, 2 * this.reach, 2 * this.reach);
  }

  /** Dots (count, 2). */
  dots(points, colour, size, alpha) {
    const side = size * this.thin;
    this.pen.fillStyle = colour;
    this.pen.globalAlpha = alpha;
    for (let at = 0; at < points.length; at += 2) this.pen.fillRect(points[at] - side / 2, points[at + 1] - side / 2, side, side);
    this.pen.globalAlpha = 1;
  }

  stroke(path, colour, width, alpha = 1) {
    this.pen.strokeStyle = colour;
    this.pen.lineWidth = width * this.thin;
    this.pen.globalAlpha = alpha;
    this.pen.stroke(path);
    this.pen.globalAlpha = 1;
  }

  /** Arrows [x, y, dx, dy] as a path; those of no length are left out. */
  arrows(arrows) {
    const head = 4.5 * this.thin;
    const path = new Path2D();
    for (const [x, y, dx, dy] of arrows) {
      if (dx === 0 && dy === 0) continue;
      const angle = Math.atan2(dy, dx);
      path.moveTo(x, y);
      path.lineTo(x + dx, y + dy);
      for (const turn of [2.6, -2.6]) {
        path.moveTo(x + dx, y + dy);
        path.lineTo(x + dx + head * Math.cos(angle + turn), y + dy + head * Math.sin(angle + turn));
      }
    }
    return path;
  }
}

/** Segments [x1, y1, x2, y2] as a path. */
export function pathOf(segments) {
  const path = new Path2D();
  for (const [x1, y1, x2, y2] of segments) {
    path.moveTo(x1, y1);
    path.lineTo(x2, y2);
  }
  return path;
}

/** The noisy density of all data as a small picture, rows from the bottom up, in which each class has its colour. */
export class Shade {
  constructor(reach) {
    this.reach = reach;
    this.canvas = Object.assign(document.createElement('canvas'), { width: SHADE_SIZE, height: SHADE_SIZE });
    this.pen = this.canvas.getContext('2d');
    this.image = this.pen.createImageData(SHADE_SIZE, SHADE_SIZE);
  }

  /**
   * @param {import('./mixture.js').Component[]} components
   * @param {number} alphaBar
   * @param {number[][]} colours red, green and blue of each label, from 0 to 255.
   * @param {number} strength the opacity where the density is highest.
   */
  draw(components, alphaBar, colours, strength) {
    const centres = Float64Array.from({ length: SHADE_SIZE }, (_, i) => (2 * (i + 0.5) * this.reach) / SHADE_SIZE - this.reach);
    const densities = colours.map(() => new Float64Array(SHADE_SIZE ** 2));
    for (const { weight, x, y, std, label } of components) {
      // a round normal is a product of two in one direction each
      const variance = alphaBar * std ** 2 + 1 - alphaBar;
      const along = (mean) => centres.map((c) => Math.exp(-((c - Math.sqrt(alphaBar) * mean) ** 2) / (2 * variance)));
      const [right, up] = [along(x), along(y)];
      for (let row = 0, at = 0; row < SHADE_SIZE; row++) {
        const factor = (weight / variance) * up[row];
        for (let column = 0; column < SHADE_SIZE; column++) densities[label][at++] += factor * right[column];
      }
    }
    const highest = Math.max(...densities.map((values) => values.reduce((a, b) => Math.max(a, b), 0)));
    for (let at = 0; at < SHADE_SIZE ** 2; at++) {
      const total = densities.reduce((sum, values) => sum + values[at], 0);
      for (let i = 0; i < 3; i++) {
        const mixed = colours.reduce((sum, colour, label) => sum + colour[i] * densities[label][at], 0);
        this.image.data[4 * at + i] = total > 0 ? mixed / total : 0;
      }
      this.image.data[4 * at + 3] = 255 * strength * Math.sqrt(total / highest);
    }
    this.pen.putImageData(this.image, 0, 0);
    return this.canvas;
  }
}

/**
 * Three distributions of the first coordinate: where points end as bars, the tilted density and the class as lines.
 * @param {HTMLCanvasElement} canvas
 * @param {{counts: Float64Array, lines: {values: Float64Array, colour: string, dashes: number[]}[], colour: string}} what
 */
export function drawMarginal(canvas, { counts, lines, colour }) {
  const thin = Math.min(devicePixelRatio, 2);
  const [width, height] = [Math.max(1, Math.round(canvas.clientWidth * thin)), Math.round((canvas.clientWidth * thin) / 5)];
  Object.assign(canvas, { width, height });
  const pen = canvas.getContext('2d');
  const total = counts.reduce((a, b) => a + b, 0);
  const bars = counts.map((count) => (count / Math.max(total, 1)) * counts.length);
  const scaled = lines.map(({ values }) => values.map((value) => value * values.length));
  const highest = Math.max(...bars, ...scaled.flatMap((values) => [...values]));
  const down = (value) => height - (0.95 * height * value) / highest;
  pen.fillStyle = colour;
  pen.globalAlpha = 0.4;
  bars.forEach((bar, i) => pen.fillRect((i * width) / bars.length, down(bar), width / bars.length - 1, height - down(bar)));
  pen.globalAlpha = 1;
  lines.forEach(({ colour: ink, dashes }, number) => {
    pen.beginPath();
    scaled[number].forEach((value, i) => pen.lineTo(((i + 0.5) * width) / scaled[number].length, down(value)));
    pen.strokeStyle = ink;
    pen.lineWidth = 1.6 * thin;
    pen.setLineDash(dashes.map((dash) => dash * thin));
    pen.stroke();
  });
}
