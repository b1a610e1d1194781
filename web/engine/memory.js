/** Numbers in one WebAssembly memory, and the multiplication of matrices in it. */

import { KERNEL } from './kernel.js';

const PAGES_PER_MEGABYTE = 16;
export const PANEL = 8; // columns that the kernel takes at once

/** The next multiple of PANEL. */
export const wholePanels = (count) => Math.ceil(count / PANEL) * PANEL;

/** A memory that is handed out from its beginning, and taken back from its end. */
export class Memory {
  /**
   * @param {number} megabytes how large it is; none of it is really taken before it is written to.
   * @param {{simd?: boolean}} options without SIMD, matrices are multiplied in JavaScript, some 15 times slower.
   */
  constructor(megabytes, { simd = true } = {}) {
    const memory = simd && globalThis.WebAssembly ? new WebAssembly.Memory({ initial: megabytes * PAGES_PER_MEGABYTE }) : null;
    this.numbers = new Float32Array(memory ? memory.buffer : new ArrayBuffer(megabytes * 2 ** 20));
    this.used = 0;
    this.kernel = memory && instantiateKernel(memory);
  }

  /**
   * Numbers of any value, until what surrounds the call is released.
   * @param {number} count
   * @returns {Float32Array} a view of the memory.
   * @throws {RangeError} if so much is not left.
   */
  take(count) {
    const start = this.used;
    this.used += wholePanels(count); // every array begins at a multiple of 32 bytes
    if (this.used > this.numbers.length) {
      throw new RangeError(`the networks' memory of ${this.numbers.length} numbers is full`);
    }
    return this.numbers.subarray(start, start + count);
  }

  /** What `work` returns; the numbers that it has taken are free again. */
  release(work) {
    const mark = this.used;
    try {
      return work();
    } finally {
      this.used = mark;
    }
  }

  /**
   * out = bias + weight B.
   * @param {Float32Array} weight (rows, inner), row by row.
   * @param {Float32Array} panels B, (inner, columns), in panels: (columns / 8, inner, 8).
   * @param {Float32Array} out (rows, columns), row by row.
   * @param {Float32Array} bias (rows).
   */
  multiply(weight, panels, out, bias, rows, inner, columns) {
    if (this.kernel && rows % 4 === 0) {
      const [w, b, o, c] = [weight, panels, out, bias].map((array) => array.byteOffset);
      this.kernel(w, b, o, c, rows, inner, columns);
    } else {
      multiplyPlainly(weight, panels, out, bias, rows, inner, columns);
    }
  }
}

/** The kernel's function for a memory, or null where there is no SIMD. */
function instantiateKernel(memory) {
  const bytes = Uint8Array.from(atob(KERNEL), (character) => character.charCodeAt(0));
  if (!WebAssembly.validate(bytes)) return null;
  return new WebAssembly.Instance(new WebAssembly.Module(bytes), { env: { memory } }).exports.multiply;
}

function multiplyPlainly(weight, panels, out, bias, rows, inner, columns) {
  const sums = new Float64Array(PANEL);
  for (let column = 0; column < columns; column += PANEL) {
    for (let row = 0; row < rows; row++) {
      sums.fill(bias[row]);
      for (let k = 0, at = column * inner; k < inner; k++) {
        const w = weight[row * inner + k];
        for (let i = 0; i < PANEL; i++) sums[i] += w * panels[at++];
      }
      for (let i = 0; i < PANEL; i++) out[row * columns + column + i] = sums[i];
    }
  }
}
