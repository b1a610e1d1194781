/** The course's models that draw, each put together from its checkpoints. */

import { SCHEDULES, Schedule, cfgCombine, ddimStep, qSample, roundHalfToEven, x0FromV } from './diffusion.js';
import { Memory } from './memory.js';
import { Reader } from './reader.js';
import { readSafetensors } from './safetensors.js';
import { TextEncoder, Tokenizer } from './text.js';
import { UNet } from './unet.js';
import { VAE } from './vae.js';

/**
 * A checkpoint: the settings of its card, and its file.
 * @typedef {{settings: object, buffer: ArrayBuffer}} Checkpoint
 *
 * What one step of drawing gives, each a list with one array an image.
 * @typedef {{step: number, t: number, before: Float32Array[], clean: Float32Array[], after: Float32Array[]}} Step
 */

const MEGABYTES = 160; // that a model may take, weights and all

/**
 * DDIM with classifier-free guidance, one step at a time.
 * @param {Schedule} schedule respaced.
 * @param {Float32Array[]} start noisy images or latents.
 * @param {(x: Float32Array[], t: number) => Float32Array[]} evaluate v of the network: of all images told the
 *     condition, and where one of them is guided, of all of them again, told nothing.
 * @param {number[]} ws the weight w of each image.
 * @param {{first?: number, clip?: boolean, prepare?: Function}} options first: the step that start is noisy up
 *     to, the last one unless given; prepare(x, step): a change before each step.
 * @yields {Step}
 */
function* guidedDdim(schedule, start, evaluate, ws, { first = schedule.numSteps - 1, clip = false, prepare } = {}) {
  let x = start;
  for (let step = first; step >= 0; step--) {
    const before = prepare ? prepare(x, step) : x;
    const t = schedule.steps[step];
    const alphaBar = schedule.alphaBar[step];
    const outputs = evaluate(isGuided(ws) ? [...before, ...before] : before, t);
    const clean = before.map((image, b) => {
      const v = ws[b] === 0 ? outputs[b] : cfgCombine(outputs[b], outputs[before.length + b], ws[b]);
      return x0FromV(image, v, alphaBar, clip);
    });
    x = before.map((image, b) => ddimStep(image, clean[b], alphaBar, schedule.alphaBarPrev(step)));
    yield { step, t, before, clean, after: x };
  }
}

/** Whether any image needs the network's answer without the condition. */
const isGuided = (ws) => ws.some((w) => w !== 0);

function scheduleOf(settings) {
  if (settings.prediction !== 'v') throw new RangeError(`prediction must be "v"; got "${settings.prediction}"`);
  return Schedule.fromBetas(SCHEDULES[settings.schedule](settings.diffusion_steps));
}

/** Draws a shape in a colour (chapter 05), and reads what was drawn. */
export class ClassModel {
  /**
   * @param {{denoiser: Checkpoint, reader: Checkpoint}} checkpoints
   * @param {{simd?: boolean}} options as Memory takes them.
   */
  constructor({ denoiser, reader }, options) {
    this.memory = new Memory(MEGABYTES, options);
    const { settings } = denoiser;
    this.settings = settings;
    this.unet = new UNet(readSafetensors(denoiser.buffer, this.memory), this.memory, settings.model);
    this.schedule = scheduleOf(settings);
    this.reader = new Reader(readSafetensors(reader.buffer, this.memory), this.memory, reader.settings);
    this.numNumbers = settings.channels * settings.image_size ** 2;
  }

  /**
   * Draw images.
   * @param {object} wish
   * @param {number[][]} wish.labels of each image, shape and colour; the number of classes means nothing said.
   * @param {number[]} wish.ws the weight of each image.
   * @param {Float32Array[]} wish.noise what each image starts from.
   * @param {number} wish.steps of DDIM.
   * @returns {Generator<Step>}
   */
  draw({ labels, ws, noise, steps }) {
    const nothing = labels.map(() => this.settings.num_classes);
    const told = { labels: isGuided(ws) ? [...labels, ...nothing] : labels };
    const evaluate = (images, t) => this.unet.predict(images, t, told);
    return guidedDdim(this.schedule.respace(steps), noise, evaluate, ws, { clip: this.settings.clip });
  }
}

/** Draws what a sentence says (chapter 07), and reads what was drawn. */
export class TextModel {
  /**
   * @param {{denoiser: Checkpoint, vae: Checkpoint, shapesReader: Checkpoint, scenesReader: Checkpoint}} checkpoints
   * @param {{simd?: boolean}} options as Memory takes them.
   */
  constructor({ denoiser, vae, shapesReader, scenesReader }, options) {
    this.memory = new Memory(MEGABYTES, options);
    const { settings } = denoiser;
    this.settings = settings;
    const tensors = readSafetensors(denoiser.buffer, this.memory);
    this.unet = new UNet(tensors, this.memory, settings.model, settings.attention, 'unet.');
    this.textEncoder = new TextEncoder(tensors, this.memory, settings.text);
    this.tokenizer = new Tokenizer(settings.words, settings.length);
    this.vae = new VAE(readSafetensors(vae.buffer, this.memory), this.memory, vae.settings.model);
    this.schedule = scheduleOf(settings);
    [this.shapesReader, this.scenesReader] = [shapesReader, scenesReader].map(
      (reader) => new Reader(readSafetensors(reader.buffer, this.memory), this.memory, reader.settings),
    );
    this.latentSide = settings.image_size / this.vae.factor;
    this.numNumbers = this.vae.latentChannels * this.latentSide ** 2; // of a latent
  }

  /** Images (3, side, side) of latents on the scale that the diffusion works on. */
  decode(latents) {
    const scale = this.settings.latent_scale;
    return this.vae.decode(latents.map((latent) => latent.map((value) => value / scale)));
  }

  /** The means of images' latents, on the scale that the diffusion works on. */
  encode(images) {
    const scale = this.settings.latent_scale;
    return this.vae.encode(images).map((latent) => latent.map((value) => value * scale));
  }

  /**
   * Draw latents.
   * @param {object} wish
   * @param {string} wish.prompt
   * @param {string} [wish.negative] what stands against it; the empty caption if nothing is said.
   * @param {number[]} wish.ws the weight of each image.
   * @param {Float32Array[]} wish.noise what each image starts from.
   * @param {number} wish.steps of DDIM.
   * @param {Function} [wish.look] is shown the weights of the words, see UNet.predict; images of the prompt come first.
   * @returns {Generator<Step>} of latents.
   * @throws {RangeError} as Tokenizer.encode does.
   */
  draw(wish) {
    return this.denoise(this.schedule.respace(wish.steps), wish.noise, wish);
  }

  /**
   * Draw a picture anew from a noised version of its latents; no step at all where the strength rounds to none.
   * @param {object} wish as for `draw`, and
   * @param {Float32Array} wish.image (3, side, side).
   * @param {number} wish.strength the share of the steps that are taken, in [0, 1].
   * @returns {Generator<Step>}
   */
  *imageToImage(wish) {
    const schedule = this.schedule.respace(wish.steps);
    const first = roundHalfToEven(wish.strength * wish.steps) - 1;
    if (first < 0) return;
    const [latent] = this.encode([wish.image]);
    const start = wish.noise.map((noise) => qSample(latent, schedule.alphaBar[first], noise));
    yield* this.denoise(schedule, start, wish, { first });
  }

  /**
   * Draw a part of a picture anew. What comes out still has to be put into the picture, see `keepPixels`.
   * @param {object} wish as for `draw`, and
   * @param {Float32Array} wish.image (3, side, side).
   * @param {Uint8Array} wish.unknown (side, side), 1 for the pixels to draw.
   * @returns {Generator<Step>}
   */
  inpaint(wish) {
    const schedule = this.schedule.respace(wish.steps);
    const hidden = wish.image.map((value, i) => (wish.unknown[i % wish.unknown.length] ? 0 : value));
    const [known] = this.encode([hidden]);
    const isKnown = this.knownLatents(wish.unknown);
    const prepare = (z, step) =>
      z.map((latent, b) => {
        const noisy = qSample(known, schedule.alphaBar[step], wish.noise[b]);
        return latent.map((value, i) => (isKnown[i % isKnown.length] ? noisy[i] : value));
      });
    return this.denoise(schedule, wish.noise, wish, { prepare });
  }

  /** A latent is known only if all of its pixels are: (latent side, latent side), 1 where it is. */
  knownLatents(unknown) {
    const side = this.settings.image_size;
    const isKnown = new Uint8Array(this.latentSide ** 2).fill(1);
    unknown.forEach((flag, pixel) => {
      const row = Math.floor(pixel / side / this.vae.factor);
      const column = Math.floor((pixel % side) / this.vae.factor);
      if (flag) isKnown[row * this.latentSide + column] = 0;
    });
    return isKnown;
  }

  denoise(schedule, start, { prompt, negative = '', ws, look }, options) {
    const rowOf = (text) => start.map(() => this.tokenizer.encode(text));
    const rows = isGuided(ws) ? [...rowOf(prompt), ...rowOf(negative)] : rowOf(prompt);
    const told = { text: this.textEncoder.encode(rows), look };
    return guidedDdim(schedule, start, (latents, t) => this.unet.predict(latents, t, told), ws, options);
  }
}

/** An inpainted picture that keeps the pixels of image wherever they are known. */
export function keepPixels(drawn, image, unknown) {
  return drawn.map((value, i) => (unknown[i % unknown.length] ? value : image[i]));
}
