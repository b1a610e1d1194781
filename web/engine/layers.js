/** The layers of the course's networks (chapters 02, 06 and 07), on feature maps of a whole batch. */

import { PANEL, wholePanels } from './memory.js';

const EPSILON = 1e-5; // as PyTorch's norms have it

/**
 * Feature maps of a batch: channel by channel, and in each the images side by side, row by row.
 *
 * Number (c, b, y, x) stands at c * columns + (b * height + y) * width + x. What is left over to whole panels
 * of columns is zero or meaningless. Tokens are maps of height 1, vectors of height and width 1.
 */
export class FeatureMap {
  constructor(data, channels, batch, height, width) {
    Object.assign(this, { data, channels, batch, height, width });
  }

  /** Places of one image. */
  get places() {
    return this.height * this.width;
  }

  /** Numbers of one channel. */
  get columns() {
    return wholePanels(this.batch * this.places);
  }
}

/** A network's tensors by name, and the layers that they make; each returns a new map. */
export class Network {
  /**
   * @param {Object<string, {data: Float32Array, shape: number[]}>} tensors as `readSafetensors` gives them.
   * @param {import('./memory.js').Memory} memory
   * @param {string} prefix what the names of this network's tensors begin with.
   */
  constructor(tensors, memory, prefix = '') {
    Object.assign(this, { tensors, memory, prefix });
    this.zeros = memory.take(4096).fill(0); // the bias of a layer that has none
  }

  has(name) {
    return this.prefix + name in this.tensors;
  }

  tensor(name) {
    const found = this.tensors[this.prefix + name];
    if (!found) throw new ReferenceError(`the checkpoint has no tensor ${this.prefix + name}`);
    return found;
  }

  /** An empty map. */
  map(channels, batch, height, width) {
    const columns = wholePanels(batch * height * width);
    return new FeatureMap(this.memory.take(channels * columns), channels, batch, height, width);
  }

  /** A map of the same shape, or of as many channels as are given. */
  mapLike(x, channels = x.channels) {
    return this.map(channels, x.batch, x.height, x.width);
  }

  bias(name) {
    return this.has(`${name}.bias`) ? this.tensor(`${name}.bias`).data : this.zeros;
  }

  /** A linear layer of each place, which is a 1 x 1 convolution, too. */
  linear(name, x) {
    const { data: weight, shape } = this.tensor(`${name}.weight`);
    const out = this.mapLike(x, shape[0]);
    this.memory.release(() => {
      const panels = this.memory.take(x.data.length);
      for (let column = 0, to = 0; column < x.columns; column += PANEL) {
        for (let channel = 0; channel < x.channels; channel++) {
          const from = channel * x.columns + column;
          for (let i = 0; i < PANEL; i++) panels[to++] = x.data[from + i];
        }
      }
      this.memory.multiply(weight, panels, out.data, this.bias(name), shape[0], x.channels, x.columns);
    });
    return out;
  }

  /** A 3 x 3 convolution with a border of zeros, at each place or at every second one. */
  conv(name, x, stride = 1) {
    const { data: weight, shape } = this.tensor(`${name}.weight`);
    const out = this.map(shape[0], x.batch, x.height / stride, x.width / stride);
    this.memory.release(() => {
      const windows = this.windows(x, out, stride);
      this.memory.multiply(weight, windows, out.data, this.bias(name), shape[0], 9 * x.channels, out.columns);
    });
    return out;
  }

  /** The 3 x 3 windows of x around each place of out: (9 channels, columns of out), in panels. */
  windows(x, out, stride) {
    const rowLength = x.width + 2;
    const plane = (x.height + 2) * rowLength; // an image with its border
    const padded = this.memory.take(x.channels * x.batch * plane).fill(0);
    for (let channel = 0, to = rowLength + 1; channel < x.channels; channel++) {
      for (let from = channel * x.columns, b = 0; b < x.batch; b++, to += 2 * rowLength) {
        for (let row = 0; row < x.height; row++, from += x.width, to += rowLength) {
          for (let column = 0; column < x.width; column++) padded[to + column] = x.data[from + column];
        }
      }
    }
    const corners = new Int32Array(out.columns); // where the window of each place begins
    for (let b = 0, n = 0; b < x.batch; b++) {
      for (let row = 0; row < out.height; row++) {
        for (let column = 0; column < out.width; column++) {
          corners[n++] = b * plane + row * stride * rowLength + column * stride;
        }
      }
    }
    const windows = this.memory.take(9 * x.channels * out.columns);
    for (let column = 0, to = 0; column < out.columns; column += PANEL) {
      const [c0, c1, c2, c3, c4, c5, c6, c7] = corners.subarray(column, column + PANEL);
      for (let channel = 0; channel < x.channels; channel++) {
        for (let row = 0; row < 3; row++) {
          const first = channel * x.batch * plane + row * rowLength;
          for (let at = first; at < first + 3; at++, to += PANEL) {
            windows[to] = padded[c0 + at];
            windows[to + 1] = padded[c1 + at];
            windows[to + 2] = padded[c2 + at];
            windows[to + 3] = padded[c3 + at];
            windows[to + 4] = padded[c4 + at];
            windows[to + 5] = padded[c5 + at];
            windows[to + 6] = padded[c6 + at];
            windows[to + 7] = padded[c7 + at];
          }
        }
      }
    }
    return windows;
  }

  /**
   * Each image normalised by itself, in groups of channels; SiLU behind it unless told otherwise.
   * @param {FeatureMap|null} modulation of each image: for each channel a scale, then for each a shift;
   *     h (1 + scale) + shift comes before the SiLU.
   */
  groupNorm(name, x, groups, { modulation = null, activate = true } = {}) {
    const { data: weight } = this.tensor(`${name}.weight`);
    const { data: bias } = this.tensor(`${name}.bias`);
    const out = this.mapLike(x);
    const size = x.channels / groups;
    for (let b = 0; b < x.batch; b++) {
      for (let group = 0; group < groups; group++) {
        const { mean, deviation } = moments(x, b, group * size, size);
        for (let c = group * size; c < (group + 1) * size; c++) {
          let factor = weight[c] / deviation;
          let offset = bias[c] - mean * factor;
          if (modulation) {
            const scale = 1 + modulation.data[c * modulation.columns + b];
            factor *= scale;
            offset = offset * scale + modulation.data[(x.channels + c) * modulation.columns + b];
          }
          const start = c * x.columns + b * x.places;
          for (let at = start; at < start + x.places; at++) {
            const y = factor * x.data[at] + offset;
            out.data[at] = activate ? y / (1 + Math.exp(-y)) : y;
          }
        }
      }
    }
    return out;
  }

  /** Each token normalised over its channels. */
  layerNorm(name, x) {
    const { data: weight } = this.tensor(`${name}.weight`);
    const { data: bias } = this.tensor(`${name}.bias`);
    const out = this.mapLike(x);
    for (let n = 0; n < x.columns; n++) {
      let sum = 0;
      for (let at = n; at < x.data.length; at += x.columns) sum += x.data[at];
      const mean = sum / x.channels;
      let squares = 0;
      for (let at = n; at < x.data.length; at += x.columns) squares += (x.data[at] - mean) ** 2;
      const deviation = Math.sqrt(squares / x.channels + EPSILON);
      for (let c = 0, at = n; c < x.channels; c++, at += x.columns) {
        out.data[at] = ((x.data[at] - mean) / deviation) * weight[c] + bias[c];
      }
    }
    return out;
  }

  /**
   * Mixtures of values, in heads of channels side by side: softmax(q k / sqrt(d)) v.
   * @param {boolean[]|null} mask which tokens may be looked at, text by text; null means all.
   * @param {((weights: Float32Array, b: number, head: number) => void)|null} look is shown the weights
   *     (places of q, places of k) of each image and head.
   */
  attend(q, k, v, heads, mask = null, look = null) {
    const out = this.mapLike(q);
    const size = q.channels / heads;
    const weights = new Float32Array(q.places * k.places);
    for (let b = 0; b < q.batch; b++) {
      for (let head = 0; head < heads; head++) {
        const channels = { first: head * size, end: (head + 1) * size };
        productOfQueriesAndKeys(weights, q, k, b, channels, 1 / Math.sqrt(size));
        softmaxOfRows(weights, k.places, mask && mask.slice(b * k.places, (b + 1) * k.places));
        if (look) look(weights, b, head);
        mixtureOfValues(out, weights, v, b, channels);
      }
    }
    return out;
  }

  /** Queries, keys and values that one layer has made, one after the other. */
  split(qkv) {
    const channels = qkv.channels / 3;
    return [0, 1, 2].map((part) => {
      const data = qkv.data.subarray(part * channels * qkv.columns, (part + 1) * channels * qkv.columns);
      return new FeatureMap(data, channels, qkv.batch, qkv.height, qkv.width);
    });
  }

  silu(x) {
    const out = this.mapLike(x);
    for (let i = 0; i < out.data.length; i++) out.data[i] = x.data[i] / (1 + Math.exp(-x.data[i]));
    return out;
  }

  gelu(x) {
    const out = this.mapLike(x);
    for (let i = 0; i < out.data.length; i++) {
      out.data[i] = 0.5 * x.data[i] * (1 + errorFunction(x.data[i] / Math.SQRT2));
    }
    return out;
  }

  add(x, y) {
    const out = this.mapLike(x);
    for (let i = 0; i < out.data.length; i++) out.data[i] = x.data[i] + y.data[i];
    return out;
  }

  /** The channels of x, then those of y. */
  concatenate(x, y) {
    const out = this.mapLike(x, x.channels + y.channels);
    out.data.set(x.data);
    out.data.set(y.data, x.data.length);
    return out;
  }

  /** Each place becomes four. */
  double(x) {
    const out = this.map(x.channels, x.batch, 2 * x.height, 2 * x.width);
    for (let channel = 0; channel < x.channels; channel++) {
      let to = channel * out.columns;
      for (let row = 0; row < x.batch * x.height; row++) {
        const from = channel * x.columns + row * x.width;
        for (let twice = 0; twice < 2; twice++) {
          for (let column = 0; column < x.width; column++) {
            out.data[to++] = x.data[from + column];
            out.data[to++] = x.data[from + column];
          }
        }
      }
    }
    return out;
  }

  /** Images, each (C, side, side), as a map in which patches of pixels are folded into the channels. */
  fromImages(images, side, patchSize) {
    const size = side / patchSize;
    const colours = images[0].length / side ** 2;
    const out = this.map(colours * patchSize ** 2, images.length, size, size);
    images.forEach((image, b) => {
      eachPixel(colours, side, patchSize, (pixel, channel, place) => {
        out.data[channel * out.columns + b * out.places + place] = image[pixel];
      });
    });
    return out;
  }

  /** The images that a map of folded patches stands for, as arrays of their own. */
  toImages(x, patchSize) {
    const side = x.height * patchSize;
    const colours = x.channels / patchSize ** 2;
    return Array.from({ length: x.batch }, (_, b) => {
      const image = new Float32Array(colours * side ** 2);
      eachPixel(colours, side, patchSize, (pixel, channel, place) => {
        image[pixel] = x.data[channel * x.columns + b * x.places + place];
      });
      return image;
    });
  }
}

/** Groups of at least 8 channels, at most 32 of them (chapter 02, `group_norm`). */
export function groupsOf(channels) {
  return greatestCommonDivisor(greatestCommonDivisor(32, Math.max(channels >> 3, 1)), channels);
}

function greatestCommonDivisor(a, b) {
  while (b) [a, b] = [b, a % b];
  return a;
}

function moments(x, b, firstChannel, channels) {
  const count = channels * x.places;
  let sum = 0;
  let squares = 0;
  for (let c = firstChannel; c < firstChannel + channels; c++) {
    const start = c * x.columns + b * x.places;
    for (let at = start; at < start + x.places; at++) {
      sum += x.data[at];
      squares += x.data[at] * x.data[at];
    }
  }
  const mean = sum / count;
  return { mean, deviation: Math.sqrt(squares / count - mean * mean + EPSILON) };
}

function productOfQueriesAndKeys(weights, q, k, b, channels, factor) {
  weights.fill(0);
  for (let c = channels.first; c < channels.end; c++) {
    const queries = c * q.columns + b * q.places;
    const keys = c * k.columns + b * k.places;
    for (let i = 0, to = 0; i < q.places; i++) {
      const query = q.data[queries + i] * factor;
      for (let j = 0; j < k.places; j++) weights[to++] += query * k.data[keys + j];
    }
  }
}

function softmaxOfRows(weights, length, mask) {
  for (let row = 0; row < weights.length; row += length) {
    let highest = -Infinity;
    for (let j = 0; j < length; j++) {
      if (mask && !mask[j]) weights[row + j] = -Infinity;
      highest = Math.max(highest, weights[row + j]);
    }
    let total = 0;
    for (let j = 0; j < length; j++) total += weights[row + j] = Math.exp(weights[row + j] - highest);
    for (let j = 0; j < length; j++) weights[row + j] /= total;
  }
}

function mixtureOfValues(out, weights, v, b, channels) {
  for (let c = channels.first; c < channels.end; c++) {
    const values = c * v.columns + b * v.places;
    const to = c * out.columns + b * out.places;
    for (let i = 0, at = 0; i < out.places; i++) {
      let sum = 0;
      for (let j = 0; j < v.places; j++) sum += weights[at++] * v.data[values + j];
      out.data[to + i] = sum;
    }
  }
}

/** Calls visit(pixel, channel, place) for each number of an image and where folding puts it. */
function eachPixel(colours, side, patchSize, visit) {
  const size = side / patchSize;
  for (let colour = 0, pixel = 0; colour < colours; colour++) {
    for (let y = 0; y < side; y++) {
      for (let x = 0; x < side; x++, pixel++) {
        const channel = (colour * patchSize + (y % patchSize)) * patchSize + (x % patchSize);
        visit(pixel, channel, Math.floor(y / patchSize) * size + Math.floor(x / patchSize));
      }
    }
  }
}

/** Abramowitz and Stegun, 7.1.26: off by at most 1.5e-7. */
function errorFunction(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
  return Math.sign(x) * (1 - series * Math.exp(-x * x));
}
