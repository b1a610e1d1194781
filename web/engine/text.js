/** From words to what the U-Net is told (chapters 04 and 07). */

import { FeatureMap, Network } from './layers.js';

const PADDING = 0;
const BEGIN = 1;
const END = 2;
const FIRST_WORD = 3;

/** The words of a text in lower case, as a list; punctuation between words is left out. */
export function splitWords(text) {
  return text.toLowerCase().replace(/[.,;:!?…"“”()]/g, ' ').split(/\s+/).filter(Boolean);
}

/** Texts as numbers, one for each word: begin, the words, end, padding. */
export class Tokenizer {
  /**
   * @param {string[]} words the words there are, numbered from 3 on in their order.
   * @param {number} length of every row; a text has at most two words fewer.
   */
  constructor(words, length) {
    Object.assign(this, { words, length });
    this.numbers = new Map(words.map((word, number) => [word, FIRST_WORD + number]));
  }

  /**
   * @param {string} text
   * @returns {number[]} a row of `length` tokens.
   * @throws {RangeError} if it has a word that is not known, or too many; the message says so to whoever typed it.
   */
  encode(text) {
    const words = splitWords(text);
    const unknown = words.filter((word) => !this.numbers.has(word));
    if (unknown.length) throw new RangeError(`The model does not know ${unknown.map((w) => `“${w}”`).join(', ')}.`);
    const most = this.length - 2;
    if (words.length > most) throw new RangeError(`The model reads at most ${most} words; these are ${words.length}.`);
    const row = [BEGIN, ...words.map((word) => this.numbers.get(word)), END];
    return [...row, ...Array(this.length - row.length).fill(PADDING)];
  }
}

/** A transformer whose tokens all look at each other. */
export class TextEncoder extends Network {
  /**
   * @param {object} tensors as `readSafetensors` gives them.
   * @param {import('./memory.js').Memory} memory
   * @param {{heads?: number}} text the settings of the text encoder in the checkpoint's card.
   */
  constructor(tensors, memory, text) {
    super(tensors, memory, 'text_encoder.transformer.');
    this.heads = text.heads ?? 4;
  }

  /**
   * What the U-Net is told of some texts.
   * @param {number[][]} rows tokens, one row for each text.
   * @returns {{features: FeatureMap, mask: boolean[]}} the features of every token,
   *     and which of them are there.
   */
  encode(rows) {
    const mask = rows.flat().map((token) => token !== PADDING);
    const features = this.memory.release(() => {
      let h = this.embed(rows);
      for (let number = 0; this.has(`blocks.${number}.qkv.weight`); number++) {
        h = this.block(`blocks.${number}`, h, mask);
      }
      const { data, channels, batch, height, width } = this.layerNorm('norm', h);
      return new FeatureMap(data.slice(), channels, batch, height, width); // a copy outside the memory
    });
    return { features, mask };
  }

  /** The vector of each token, and of its place. */
  embed(rows) {
    const { data: table, shape } = this.tensor('tokens.weight');
    const { data: places } = this.tensor('places.weight');
    const [width, length] = [shape[1], rows[0].length];
    const h = this.map(width, rows.length, 1, length);
    h.data.fill(0);
    rows.flat().forEach((token, n) => {
      for (let e = 0; e < width; e++) {
        h.data[e * h.columns + n] = table[token * width + e] + places[(n % length) * width + e];
      }
    });
    return h;
  }

  block(name, x, mask) {
    const [q, k, v] = this.split(this.linear(`${name}.qkv`, this.layerNorm(`${name}.norm_attention`, x)));
    const h = this.add(x, this.linear(`${name}.project`, this.attend(q, k, v, this.heads, mask)));
    const hidden = this.gelu(this.linear(`${name}.mlp.0`, this.layerNorm(`${name}.norm_mlp`, h)));
    return this.add(h, this.linear(`${name}.mlp.2`, hidden));
  }
}
