/** The variational autoencoder of chapter 06. */

import { Network, groupsOf } from './layers.js';

/** Images into a smaller space, and back. */
export class VAE extends Network {
  /**
   * @param {object} tensors as `readSafetensors` gives them.
   * @param {import('./memory.js').Memory} memory
   * @param {object} model the settings of the VAE in the checkpoint's card.
   */
  constructor(tensors, memory, model) {
    super(tensors, memory);
    this.levels = (model.channel_multipliers ?? [1, 2]).length;
    this.numBlocks = model.num_blocks ?? 2;
    this.patchSize = model.patch_size ?? 2;
    this.latentChannels = model.latent_channels ?? 4;
    this.factor = this.patchSize * 2 ** (this.levels - 1);
  }

  /**
   * The means of the latents of some images.
   * @param {Float32Array[]} images each (C, side, side), in [-1, 1].
   * @returns {Float32Array[]} each (latent channels, side / factor, side / factor).
   */
  encode(images) {
    return this.memory.release(() => {
      const channels = this.tensor('encoder.0.weight').shape[1] / this.patchSize ** 2;
      const side = Math.sqrt(images[0].length / channels);
      const next = numbered('encoder');
      let h = this.conv(next(), this.fromImages(images, side, this.patchSize));
      for (let level = 0; level < this.levels; level++) {
        if (level > 0) h = this.conv(next(), h, 2);
        for (let n = 0; n < this.numBlocks; n++) h = this.block(next(), h);
      }
      const outputs = this.toImages(this.last(next, h), 1);
      return outputs.map((output) => output.slice(0, output.length / 2)); // behind them, the log-variances
    });
  }

  /**
   * The images of some latents.
   * @param {Float32Array[]} latents each (latent channels, side, side).
   * @returns {Float32Array[]} each (C, factor side, factor side).
   */
  decode(latents) {
    return this.memory.release(() => {
      const side = Math.sqrt(latents[0].length / this.latentChannels);
      const next = numbered('decoder');
      let h = this.conv(next(), this.fromImages(latents, side, 1));
      for (let level = this.levels - 1; level >= 0; level--) {
        for (let n = 0; n < this.numBlocks; n++) h = this.block(next(), h);
        if (level > 0) h = this.conv(`${next()}.conv`, this.double(h));
      }
      return this.toImages(this.last(next, h), this.patchSize);
    });
  }

  /** Normalisation, SiLU, which has a number but no tensors, and a convolution. */
  last(next, h) {
    const normed = this.groupNorm(next(), h, groupsOf(h.channels));
    next();
    return this.conv(next(), normed);
  }

  block(name, x) {
    const groups = groupsOf(x.channels);
    const h = this.conv(`${name}.branch.2`, this.groupNorm(`${name}.branch.0`, x, groups));
    return this.add(x, this.conv(`${name}.branch.5`, this.groupNorm(`${name}.branch.3`, h, groups)));
  }
}

/** The names of layers one after the other: part.0, part.1, ... */
function numbered(part) {
  let number = 0;
  return () => `${part}.${number++}`;
}
