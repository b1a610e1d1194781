/** The course's readers: the classifiers that judge what a model draws. */

import { Network } from './layers.js';

const GROUPS = 8;

/** Reads every label of an image. */
export class Reader extends Network {
  /**
   * @param {object} tensors as `readSafetensors` gives them.
   * @param {import('./memory.js').Memory} memory
   * @param {{labels: Object<string, string[]>, image_size: number, model: object}} settings of the card.
   */
  constructor(tensors, memory, settings) {
    super(tensors, memory);
    this.labels = settings.labels;
    this.side = settings.image_size;
    this.patchSize = settings.model.patch_size ?? 1;
    this.numStages = settings.model.widths.length;
  }

  /**
   * The logits of each label.
   * @param {Float32Array[]} images each (C, side, side), in [-1, 1].
   * @returns {Object<string, Float32Array>[]} for each image the logits of each label's classes.
   */
  logits(images) {
    return this.memory.release(() => {
      let h = this.fromImages(images, this.side, this.patchSize);
      for (let layer = 1; layer <= 2 * this.numStages; layer++) {
        h = this.conv(`stages.${layer}.0`, h, layer % 2 ? 2 : 1);
        h = this.groupNorm(`stages.${layer}.1`, h, GROUPS);
      }
      const features = this.silu(this.linear('summary.1', this.flatten(h)));
      const outputs = images.map(() => ({}));
      for (const name of Object.keys(this.labels)) {
        const head = this.linear(`heads.${name}`, features);
        outputs.forEach((output, b) => {
          output[name] = Float32Array.from({ length: head.channels }, (_, c) => head.data[c * head.columns + b]);
        });
      }
      return outputs;
    });
  }

  /**
   * What each image shows.
   * @param {Float32Array[]} images as for `logits`.
   * @returns {Object<string, {number: number, name: string, confidence: number}>[]} for each image and label
   *     the likeliest class, and its probability.
   */
  read(images) {
    return this.logits(images).map((logitsOf) => {
      const reading = {};
      for (const [label, logits] of Object.entries(logitsOf)) {
        const highest = Math.max(...logits);
        const number = logits.indexOf(highest);
        const confidence = 1 / logits.reduce((sum, logit) => sum + Math.exp(logit - highest), 0);
        reading[label] = { number, name: this.labels[label][number], confidence };
      }
      return reading;
    });
  }

  /** Each image's channels and places as one vector. */
  flatten(x) {
    const out = this.map(x.channels * x.places, x.batch, 1, 1);
    out.data.fill(0);
    for (let c = 0; c < x.channels; c++) {
      for (let b = 0; b < x.batch; b++) {
        for (let p = 0; p < x.places; p++) {
          out.data[(c * x.places + p) * out.columns + b] = x.data[c * x.columns + b * x.places + p];
        }
      }
    }
    return out;
  }
}
