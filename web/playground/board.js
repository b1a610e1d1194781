/** What drawing from a class and from a sentence have in common: steps, strip, judgement and shelf. */

import { describe, isRight } from './caption.js';
import { normalNoise } from '../engine/noise.js';
import { numberText, paintImage } from './parts.js';
import { studioOf } from './studio.js';

const STRIP = [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8]; // w
const JUDGED = 16; // images
const SHELF = 12;

/** The parts below the controls, as HTML. */
export const RESULTS = `
  <section class="results" hidden>
    <h3></h3><div class="tiles"></div><p class="note" aria-live="polite"></p>
  </section>
  <section class="shelf" hidden>
    <h3>Drawn so far</h3><div class="tiles"></div>
    <button type="button" data-do="clear">Clear</button>
  </section>`;

/** What all boards can do. */
export const ACTIONS = `
  <div class="row"><button type="button" class="go" data-do="draw">Draw</button>
    <button type="button" data-do="seed">New seed</button></div>
  <div class="row"><button type="button" data-do="strip">w from −1 to 8</button>
    <button type="button" data-do="judge">Draw ${JUDGED}, and judge them</button></div>`;

/** What all boards say; `text` at first. */
export const sayings = (text) => `
  <progress max="1" value="0" aria-label="progress of the drawing"></progress>
  <p class="said note" aria-live="polite">${text}</p>
  <p class="verdict" aria-live="polite"></p>`;

/** An element that draws; subclasses say what, and how a step looks. */
export class Board extends HTMLElement {
  /** @param {'class' | 'text'} model */
  constructor(model) {
    super();
    this.studio = studioOf(model);
    this.steps = []; // of the drawing that is shown: what the worker has told of each, the first one first
  }

  /** The wish that the controls say, for the seeds and ws that are given; throws an Error with what is wrong. */
  wish() {
    throw new Error('a board says what it draws');
  }

  /** What was asked for in words, and what the reader must see: {text, wanted: null | {label: number}}. */
  asked() {
    throw new Error('a board says what it asks for');
  }

  /** What else makes an image what it is, besides weight, steps and seed: words that go behind these. */
  get circumstances() {
    return '';
  }

  /** Show a step of the single drawing. */
  showStep() {
    throw new Error('a board shows its steps');
  }

  value(name) {
    return Number(this.querySelector(`input[name=${name}]`).value);
  }

  /** Listen to the controls that all boards have. */
  listen() {
    this.addEventListener('input', (event) => {
      const output = this.querySelector(`output[name="${event.target.name}"]`);
      if (output) output.textContent = numberText(event.target.value);
      if (event.target.name === 'seed' && !this.isLoaded) this.showNoise();
      if (event.target.name === 'step') this.scrubTo(Number(event.target.value));
      else if (event.target.closest('[data-redraws]') && this.isLoaded) this.drawOne();
    });
    this.addEventListener('click', (event) => {
      const action = event.target.closest('[data-do]')?.dataset.do;
      if (action === 'draw') this.drawOne();
      if (action === 'seed') this.setSlider('seed', (this.value('seed') + 1) % 100);
      if (action === 'strip') this.drawStrip();
      if (action === 'judge') this.drawJudged();
      if (action === 'clear') this.clearShelf();
    });
    this.showNoise();
  }

  /** What a drawing begins with; nothing has to be loaded for that. */
  showNoise() {
    paintImage(this.querySelector('.noisy'), this.noisePicture((count) => normalNoise(count, this.value('seed'))));
  }

  /** The noise of a seed as a picture; noise(count) gives the first so many of its numbers. */
  noisePicture() {
    throw new Error('a board shows its noise');
  }

  setSlider(name, value) {
    const input = this.querySelector(`input[name=${name}]`);
    input.value = value;
    input.dispatchEvent(new Event('input', { bubbles: true }));
    if (!this.isLoaded) this.drawOne();
  }

  say(text, isError = false) {
    const line = this.querySelector('.said');
    line.textContent = text;
    line.classList.toggle('error', isError);
  }

  /** Load what is needed, then draw; says what went wrong. listen gets the worker's messages. */
  async start(images, listen) {
    try {
      const wish = { ...this.wish(), ...images };
      this.classList.add('started');
      if (!this.isLoaded) {
        this.say('Loading the networks…');
        this.querySelector('progress').removeAttribute('value');
      }
      const request = (this.request = Symbol('the latest'));
      await this.studio.load();
      this.isLoaded = true;
      if (request !== this.request) return;
      this.begun = performance.now();
      this.studio.draw(wish, (message) => {
        if (message.kind === 'error') this.fail(message.text);
        else listen(message);
      });
    } catch (error) {
      this.fail(error.message);
    }
  }

  fail(text) {
    this.progress(0);
    this.say(text, true);
  }

  progress(share) {
    this.querySelector('progress').value = share;
  }

  // --- One image, step by step ---

  drawOne() {
    const [w, steps, seed] = ['w', 'steps', 'seed'].map((name) => this.value(name));
    const told = { ...this.asked(), settings: `w = ${numberText(w)}, ${steps} steps, seed ${seed}${this.circumstances}` };
    this.isDone = false;
    this.steps = [];
    return this.start({ ws: [w], seeds: [seed] }, (message) => {
      if (message.kind === 'step') this.addStep(message, steps);
      if (message.kind === 'drawn') this.finish(message, told);
    });
  }

  addStep(message, count) {
    this.steps.push(message);
    this.progress(1 - message.step / count);
    const scrubber = this.querySelector('input[name=step]');
    scrubber.disabled = false;
    scrubber.max = count;
    scrubber.value = message.step + 1;
    this.showStep(message);
    this.sayStep(message.step + 1, message.t);
  }

  /** The end of a drawing, of which it was told: {text, wanted, settings}. */
  finish({ images: [image], readings: [reading] }, { text, wanted, settings }) {
    this.result = { image, noise: this.steps[0]?.noisy[0], text };
    this.querySelector('input[name=step]').value = 0;
    this.progress(1);
    this.showResult();
    const seconds = ((performance.now() - this.begun) / 1000).toFixed(1);
    const slow = this.studio.isFast ? '' : ', some 15 times slower than in a browser that has SIMD';
    this.say(`${this.steps.length} steps in ${seconds} s${slow}`);
    this.showVerdict(reading, wanted);
    this.putOnShelf(image, text, settings);
    this.isDone = true;
  }

  showVerdict(reading, wanted) {
    const line = this.querySelector('.verdict');
    const sure = Math.round(100 * Math.min(...Object.keys(wanted ?? reading).map((label) => reading[label].confidence)));
    const mark = wanted ? (isRight(reading, wanted) ? '✓ ' : '✗ ') : '';
    line.textContent = `${mark}The course’s reader sees ${describe(reading)}, ${sure} % sure.`;
    line.dataset.right = wanted ? isRight(reading, wanted) : '';
  }

  /** Show the step whose number, counted from the end, the scrubber has; 0 is the finished image. */
  scrubTo(position) {
    if (position === 0) return this.result && this.showResult();
    const message = this.steps.find(({ step }) => step === position - 1);
    if (!message) return;
    this.showStep(message);
    this.sayStep(position, message.t);
  }

  /** Show the finished image, beside the noise that it began with. */
  showResult() {
    this.sayStep(0);
  }

  sayStep(position, t) {
    this.classList.toggle('done', position === 0);
    const text = position === 0 ? 'the end' : `${position} before the end, code t = ${t}`;
    this.querySelector('output[name=step]').textContent = text;
    this.querySelector('input[name=step]').setAttribute('aria-valuetext', text);
  }

  // --- Several images ---

  /** Lay out tiles for images: a button with a canvas and a line of text each; a strip goes into one row. */
  layTiles(title, count, tileOf, isStrip = false) {
    const section = this.querySelector('.results');
    section.hidden = false;
    section.querySelector('h3').textContent = title;
    section.querySelector('.note').textContent = '';
    const tiles = Array.from({ length: count }, (_, n) => {
      const { text, onClick } = tileOf(n);
      const tile = document.createElement('button');
      tile.type = 'button';
      tile.className = 'tile';
      tile.innerHTML = '<canvas class="pixels" width="32" height="32"></canvas><span></span>';
      tile.querySelector('span').textContent = text;
      tile.addEventListener('click', () => {
        onClick();
        this.querySelector('.pair').scrollIntoView({ block: 'nearest' });
      });
      return tile;
    });
    section.querySelector('.tiles').classList.toggle('strip', isStrip);
    section.querySelector('.tiles').replaceChildren(...tiles);
    section.scrollIntoView({ block: 'nearest' });
    return tiles;
  }

  /** Draw into tiles; `after` is called when all are there, with how many are right. */
  drawTiles(images, tiles, after) {
    const steps = this.value('steps');
    const { wanted } = this.asked();
    let right = 0;
    const paint = (first, list) => list?.forEach((image, n) => paintImage(tiles[first + n].querySelector('canvas'), image));
    return this.start(images, (message) => {
      if (message.kind === 'step') {
        paint(message.first, message.images);
        const share = 1 - message.step / steps;
        this.progress((message.first + share * Math.min(10, tiles.length - message.first)) / tiles.length);
      }
      if (message.kind !== 'drawn') return;
      paint(message.first, message.images);
      message.readings.forEach((reading, n) => {
        const tile = tiles[message.first + n];
        tile.title = `The reader sees ${describe(reading)}.`;
        if (!wanted) return;
        const isGood = isRight(reading, wanted);
        tile.dataset.right = isGood;
        tile.querySelector('span').prepend(isGood ? '✓ ' : '✗ ');
        right += isGood;
      });
      if (!message.isLast) return;
      this.progress(1);
      this.isDone = true;
      after(wanted ? right : null);
    });
  }

  /** One seed at all weights. */
  drawStrip() {
    this.isDone = false;
    const seed = this.value('seed');
    const tileOf = (n) => ({
      text: `w = ${numberText(STRIP[n])}`,
      onClick: () => this.setSlider('w', STRIP[n]),
    });
    const tiles = this.layTiles(`${this.asked().text}, seed ${seed}: w from −1 to 8`, STRIP.length, tileOf, true);
    this.say('Drawing ten images at once…');
    const images = { ws: STRIP, seeds: STRIP.map(() => seed) };
    return this.drawTiles(images, tiles, () => {
      this.say('');
      this.querySelector('.results .note').textContent =
        'All begin with the same noise. −1 is told nothing, 0 is not guided. Choose one to see its steps.';
    });
  }

  /** Many seeds at one weight, and the share that the reader reads right. */
  drawJudged() {
    this.isDone = false;
    const seeds = Array.from({ length: JUDGED }, (_, n) => (this.value('seed') + n) % 100);
    const w = this.value('w');
    const asked = this.asked();
    const tiles = this.layTiles(`${asked.text}, w = ${numberText(w)}: ${JUDGED} seeds`, JUDGED, (n) => ({
      text: `seed ${seeds[n]}`,
      onClick: () => this.setSlider('seed', seeds[n]),
    }));
    this.say(`Drawing ${JUDGED} images…`);
    return this.drawTiles({ ws: seeds.map(() => w), seeds }, tiles, (right) => {
      this.say('');
      this.querySelector('.results .note').textContent =
        right === null
          ? 'The readers judge sentences like those of the course only.'
          : `${right} of ${JUDGED} are read right (${Math.round((100 * right) / JUDGED)} %). The reader must name something whatever it sees.`;
    });
  }

  // --- Shelf ---

  putOnShelf(image, text, settings) {
    const shelf = this.querySelector('.shelf');
    const figure = document.createElement('figure');
    const canvas = document.createElement('canvas');
    canvas.className = 'pixels';
    canvas.setAttribute('role', 'img');
    canvas.setAttribute('aria-label', `${text}; ${settings}`);
    paintImage(canvas, image);
    const caption = document.createElement('figcaption');
    caption.innerHTML = `<b>${settings}</b><span></span>`;
    caption.querySelector('span').textContent = caption.title = text;
    figure.append(canvas, caption);
    const tiles = shelf.querySelector('.tiles');
    tiles.prepend(figure);
    while (tiles.children.length > SHELF) tiles.lastChild.remove();
    shelf.hidden = false;
  }

  clearShelf() {
    this.querySelector('.shelf .tiles').replaceChildren();
    this.querySelector('.shelf').hidden = true;
  }
}
