/** The worker: it holds the networks and draws, so that the page never waits. See playground/studio.js. */

import { ClassModel, TextModel, keepPixels } from '../engine/models.js';
import { normalNoise } from '../engine/noise.js';
import { decodeBase64 } from '../engine/safetensors.js';

const TOGETHER = 8; // images that are drawn at once, at most; ten for a strip
const DECODE_EVERY = 3; // steps, where several images are drawn; of a single one each is seen
const MAP_SIDE = 8; // of the layers whose word weights are shown, as in chapter 07

const MODELS = { class: ClassModel, text: TextModel };
const models = {};
const current = {}; // the job of each model that counts; older ones stop at their next step

self.onmessage = async ({ data }) => {
  const { job, model, kind } = data;
  const post = (message) => self.postMessage({ job, ...message });
  current[model] = job;
  try {
    await { load, draw }[kind](data, post);
  } catch (error) {
    post({ kind: 'error', text: error.message });
  }
};

/** Take over checkpoints: of each its settings, and its file in base64. */
function load({ model, checkpoints }, post) {
  const decoded = {};
  for (const [part, { settings, base64 }] of Object.entries(checkpoints)) {
    decoded[part] = { settings, buffer: decodeBase64(base64) };
  }
  models[model] = new MODELS[model](decoded);
  post({ kind: 'loaded', isFast: models[model].memory.kernel !== null });
}

/**
 * Draw the images of a wish: for each of its ws and seeds one. After every step a message with what is there of
 * them, then one with the images and what the reader sees in them.
 */
async function draw({ job, model, wish }, post) {
  const isCurrent = () => current[model] === job;
  const network = models[model];
  const together = Math.max(TOGETHER, new Set(wish.ws).size);
  for (let first = 0; first < wish.seeds.length; first += together) {
    const part = {
      ...wish,
      ws: wish.ws.slice(first, first + together),
      noise: wish.seeds.slice(first, first + together).map((seed) => normalNoise(network.numNumbers, seed)),
    };
    const artist = model === 'class' ? new ClassArtist(network, part) : new TextArtist(network, part);
    for (const step of artist.steps()) {
      post({ kind: 'step', first, ...artist.show(step) });
      await nextTask();
      if (!isCurrent()) return;
    }
    const images = artist.images();
    post({ kind: 'drawn', first, images, readings: artist.read(images), isLast: first + together >= wish.seeds.length });
  }
}

class ClassArtist {
  constructor(network, wish) {
    Object.assign(this, { network, wish });
  }

  steps() {
    const labels = this.wish.ws.map(() => this.wish.labels);
    return this.network.draw({ ...this.wish, labels });
  }

  show({ step, t, before, clean, after }) {
    this.last = after;
    return { step, t, noisy: before, images: clean };
  }

  images() {
    return this.last;
  }

  read(images) {
    return this.network.reader.read(images);
  }
}

class TextArtist {
  constructor(network, wish) {
    Object.assign(this, { network, wish });
    this.isSingle = wish.ws.length === 1;
  }

  steps() {
    const { wish } = this;
    const told = { ...wish, look: this.isSingle ? (...weights) => this.collect(...weights) : undefined };
    this.sums = new Float64Array(this.network.settings.length * MAP_SIDE ** 2);
    this.count = 0;
    if (wish.unknown) return this.network.inpaint(told);
    if (wish.image) return this.network.imageToImage(told);
    return this.network.draw(told);
  }

  /** Add the weights of a layer and a head to those of the step; only of the prompt, not of what stands against it. */
  collect(weights, side, b) {
    if (side !== MAP_SIDE || b > 0) return;
    const tokens = this.network.settings.length;
    weights.forEach((weight, i) => (this.sums[(i % tokens) * MAP_SIDE ** 2 + Math.floor(i / tokens)] += weight));
    this.count++;
  }

  show({ step, t, before, clean, after }) {
    this.last = after;
    const maps = this.count ? Float32Array.from(this.sums, (sum) => sum / this.count) : null;
    this.sums.fill(0);
    this.count = 0;
    const isShown = this.isSingle || step % DECODE_EVERY === 0;
    return { step, t, noisy: before, images: isShown ? this.decoded(clean) : null, maps };
  }

  images() {
    const latents = this.last ?? this.network.encode([this.wish.image]); // no step at all: the VAE's own picture
    return this.decoded(latents);
  }

  decoded(latents) {
    const images = this.network.decode(latents);
    const { image, unknown } = this.wish;
    return unknown ? images.map((drawn) => keepPixels(drawn, image, unknown)) : images;
  }

  read(images) {
    const reader = this.wish.reads === 'scenes' ? this.network.scenesReader : this.network.shapesReader;
    return reader.read(images);
  }
}

const channel = new MessageChannel();

/** Let the messages that have come in be read. */
function nextTask() {
  return new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  });
}
