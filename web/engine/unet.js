/** The U-Net of chapters 02, 05 and 07. */

import { Network, groupsOf } from './layers.js';

const MAX_PERIOD = 10000;

/** A denoiser of images or latents, told the step and, as it was trained, labels or words. */
export class UNet extends Network {
  /**
   * @param {object} tensors as `readSafetensors` gives them.
   * @param {import('./memory.js').Memory} memory
   * @param {{patch_size?: number}} model the settings of the U-Net in the checkpoint's card.
   * @param {{head_dim?: number}} attention the settings of its attention there.
   * @param {string} prefix of its tensors' names.
   */
  constructor(tensors, memory, model, attention = {}, prefix = '') {
    super(tensors, memory, prefix);
    this.patchSize = model.patch_size ?? 1;
    this.headDim = attention.head_dim ?? 32;
  }

  /**
   * The network's raw output.
   * @param {Float32Array[]} images noisy ones, each (C, side, side).
   * @param {number} t the step, of the original schedule, counted from 0.
   * @param {object} cond what it is told.
   * @param {number[][]} [cond.labels] of each image the number of each label; the highest means none.
   * @param {{features, mask}} [cond.text] of each image the tokens, as `TextEncoder.encode` gives them.
   * @param {(weights: Float32Array, side: number, b: number, head: number) => void} [cond.look] is shown
   *     the weights of each layer that looks at words: (places of an image, tokens).
   * @returns {Float32Array[]} like images.
   */
  predict(images, t, cond = {}) {
    return this.memory.release(() => {
      const side = Math.sqrt(images[0].length / this.channels);
      const embedding = this.silu(this.embed(images.length, t, cond.labels));
      const stem = this.conv('stem', this.fromImages(images, side, this.patchSize));
      const maps = this.down(stem, embedding, cond);
      let h = maps[maps.length - 1];
      h = this.stage('middle_out', this.stage('middle_in', h, embedding, cond), embedding, cond);
      h = this.up(h, maps, embedding, cond);
      h = this.conv('head', this.groupNorm('head_norm', h, groupsOf(h.channels)));
      return this.toImages(h, this.patchSize);
    });
  }

  /** Channels of the images. */
  get channels() {
    return this.tensor('stem.weight').shape[1] / this.patchSize ** 2;
  }

  /** What every block is told of step and labels, one column an image. */
  embed(batch, t, labels) {
    const width = this.tensor('time_mlp.0.weight').shape[1];
    const wave = this.map(width, batch, 1, 1);
    for (let k = 0; k < width / 2; k++) {
      // omega_k = P^(-k / (width / 2)), rounded as PyTorch rounds it
      const exponent = Math.fround(Math.fround(-Math.log(MAX_PERIOD) * k) / (width / 2));
      const angle = Math.fround(t * Math.fround(Math.exp(exponent)));
      wave.data.fill(Math.cos(angle), k * wave.columns, (k + 1) * wave.columns);
      const sine = width / 2 + k;
      wave.data.fill(Math.sin(angle), sine * wave.columns, (sine + 1) * wave.columns);
    }
    const embedding = this.linear('time_mlp.2', this.silu(this.linear('time_mlp.0', wave)));
    (labels ?? []).forEach((row, b) =>
      row.forEach((label, number) => {
        const { data: table } = this.tensor(`labels.tables.${number}.weight`);
        for (let e = 0; e < embedding.channels; e++) {
          embedding.data[e * embedding.columns + b] += table[label * embedding.channels + e];
        }
      }),
    );
    return embedding;
  }

  /** All maps on the way down, the first one included. */
  down(stem, embedding, cond) {
    const maps = [stem];
    let h = stem;
    for (let level = 0; this.has(`down.${level}.stages.0.residual.conv_in.weight`); level++) {
      for (const name of this.stages(`down.${level}`)) {
        h = this.stage(name, h, embedding, cond);
        maps.push(h);
      }
      if (this.has(`down.${level}.downsample.weight`)) {
        h = this.conv(`down.${level}.downsample`, h, 2);
        maps.push(h);
      }
    }
    return maps;
  }

  /** The way up, where each stage meets a map of the way down, the last one first. */
  up(h, maps, embedding, cond) {
    for (let level = 0; this.has(`up.${level}.stages.0.residual.conv_in.weight`); level++) {
      for (const name of this.stages(`up.${level}`)) {
        h = this.stage(name, this.concatenate(h, maps.pop()), embedding, cond);
      }
      if (this.has(`up.${level}.upsample.weight`)) h = this.conv(`up.${level}.upsample`, this.double(h));
    }
    return h;
  }

  /** The names of a level's stages. */
  stages(level) {
    const names = [];
    while (this.has(`${level}.stages.${names.length}.residual.conv_in.weight`)) {
      names.push(`${level}.stages.${names.length}`);
    }
    return names;
  }

  /** A residual block, and attention after it where the checkpoint has some. */
  stage(name, x, embedding, cond) {
    const h = this.residual(`${name}.residual`, x, embedding);
    if (this.has(`${name}.attention.qkv.weight`)) return this.selfAttention(`${name}.attention`, h);
    if (this.has(`${name}.attention.where.weight`)) return this.textAttention(`${name}.attention`, h, cond);
    return h;
  }

  residual(name, x, embedding) {
    let h = this.conv(`${name}.conv_in`, this.groupNorm(`${name}.norm_in`, x, groupsOf(x.channels)));
    const modulation = this.linear(`${name}.embedding`, embedding);
    h = this.groupNorm(`${name}.norm_out`, h, groupsOf(h.channels), { modulation });
    h = this.conv(`${name}.conv_out`, h);
    return this.add(this.has(`${name}.skip.weight`) ? this.linear(`${name}.skip`, x) : x, h);
  }

  heads(channels) {
    return channels / Math.min(this.headDim, channels);
  }

  /** Every place looks at every other one. */
  selfAttention(name, x) {
    const normed = this.groupNorm(`${name}.norm`, x, groupsOf(x.channels), { activate: false });
    const [q, k, v] = this.split(this.linear(`${name}.qkv`, normed));
    return this.add(x, this.linear(`${name}.project`, this.attend(q, k, v, this.heads(x.channels))));
  }

  /** Every place looks at all places, where the map is wide enough, then at the words. */
  textAttention(name, x, { text, look }) {
    if (this.has(`${name}.places.qkv.weight`)) x = this.selfAttention(`${name}.places`, x);
    const tokens = this.groupNorm(`${name}.norm`, x, groupsOf(x.channels), { activate: false });
    this.addWhere(tokens, this.tensor(`${name}.where.weight`).data);
    const q = this.linear(`${name}.words.to_q`, tokens);
    const k = this.linear(`${name}.words.to_k`, text.features);
    const v = this.linear(`${name}.words.to_v`, text.features);
    const lookHere = look && ((weights, b, head) => look(weights, x.height, b, head));
    const mixed = this.attend(q, k, v, this.heads(x.channels), text.mask, lookHere);
    return this.add(x, this.linear(`${name}.words.to_out`, mixed));
  }

  /** Tell each place where it is: its row and its column, from -1 to 1, times the two columns of weight. */
  addWhere(x, weight) {
    for (let c = 0; c < x.channels; c++) {
      for (let b = 0, at = c * x.columns; b < x.batch; b++) {
        for (let row = 0; row < x.height; row++) {
          for (let column = 0; column < x.width; column++, at++) {
            const down = (2 * row) / (x.height - 1) - 1;
            const right = (2 * column) / (x.width - 1) - 1;
            x.data[at] += weight[2 * c] * down + weight[2 * c + 1] * right;
          }
        }
      }
    }
  }
}
