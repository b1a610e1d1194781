/** <text-playground>: latent diffusion told a sentence (chapter 07): from noise, from a picture, or a part of one. */

import { ACTIONS, Board, RESULTS, sayings } from './board.js';
import { parseCaption } from './caption.js';
import { Mask } from './mask.js';
import { caption, choice, latentColours, paintImage, slider, weightSlider } from './parts.js';
import { splitWords } from '../engine/text.js';
import { WordField } from './word_field.js';

const MAP_SIDE = 8; // of a word's map
const PROMPT = 'a large red star to the left of a small blue ring on a dark background';
const EXAMPLES = {
  'star and ring': PROMPT,
  'heart above cross': 'a small yellow heart above a large green cross on a light background',
  'crescent on stripes': 'a large purple crescent on a striped background',
};
let instances = 0;

class TextPlayground extends Board {
  constructor() {
    super('text');
  }

  connectedCallback() {
    if (this.querySelector('canvas')) return;
    const id = `words-${++instances}`;
    const field = (name, text, value, more = '') => `
      <div class="field"><label class="label" for="${id}-${name}">${text}</label>
        <input type="search" id="${id}-${name}" name="${name}" value="${value}" autocomplete="off" autocapitalize="off" spellcheck="false"
          role="combobox" aria-autocomplete="list" aria-expanded="false" aria-controls="${id}-${name}-list" ${more}>
        <ul role="listbox" id="${id}-${name}-list" aria-label="words that may come next" hidden></ul></div>`;
    this.innerHTML = `
      <div class="sentence stack">
        ${field('prompt', 'What to draw', PROMPT)}
        <div class="row examples"><span class="note">or</span>${Object.keys(EXAMPLES).map((name) => `<button type="button" data-example="${name}">${name}</button>`).join('')}</div>
      </div>
      <div class="columns">
        <div class="stack">
          <div class="pair">
            <figure class="source" hidden><div class="layers"><canvas class="pixels picture" width="64" height="64" role="img" aria-label="The picture to begin from"></canvas>
                <canvas class="pixels mask" tabindex="0" role="application" aria-label="The part to draw anew: paint it, or move the brush with the arrow keys and paint with the space bar"></canvas></div>
              <figcaption></figcaption></figure>
            <figure class="state"><canvas class="pixels noisy" width="16" height="16" role="img" aria-label="The noisy latent"></canvas>
              ${caption('z<sub>t</sub>, the noisy latent: three of its four channels as colours', 'z<sub>T</sub>, the latent noise it began with: three of four channels')}</figure>
            <figure class="guess"><div class="layers"><canvas class="pixels clean" width="64" height="64" role="img" aria-label="The picture that the network predicts"></canvas>
                <canvas class="map" width="${MAP_SIDE}" height="${MAP_SIDE}" aria-hidden="true"></canvas></div>
              ${caption('x̂<sub>0</sub>, decoded from what the network takes it for', 'x<sub>0</sub>, what it has drawn, decoded')}</figure>
          </div>
          <label class="slider">step <input type="range" name="step" class="backwards" min="0" max="25" step="1" value="25" disabled>
            <output name="step">nothing drawn yet</output></label>
          ${ACTIONS}
          <div class="looking" hidden><p class="label">Point at a word: yellow is where the network looks at it most</p><div class="words"></div></div>
          ${sayings('Text encoder, U-Net, decoder and readers (4.3 million weights, 12 MB) are loaded when you first draw.')}
        </div>
        <div class="stack">
          <fieldset><legend>Begin</legend><div class="choices">
            ${choice('mode', 'noise', 'from noise', true)}${choice('mode', 'picture', 'from a picture')}${choice('mode', 'fill', 'fill in a part')}
          </div></fieldset>
          <div class="from stack" hidden>
            <div class="row"><button type="button" data-do="take">Take the drawing</button>
              <label class="file" tabindex="-1">Take a file<input type="file" class="unseen" accept="image/*"></label></div>
            <div class="row fills" hidden><button type="button" data-fill="left">left half</button><button type="button" data-fill="right">right half</button><button type="button" data-fill="nothing">nothing</button>
              <label class="check"><input type="checkbox" name="erase">erase</label></div>
            <div class="strength" data-redraws>${slider('strength', 'strength: share of the steps', { min: 0.1, max: 1, step: 0.05, value: 0.6 })}</div>
          </div>
          <details><summary>What not to draw</summary>${field('negative', 'Negative prompt', '')}</details>
          <div class="stack" data-redraws>
            ${weightSlider(0.5, 2)}
            ${slider('steps', 'steps of DDIM', { min: 5, max: 50, step: 5, value: 25 })}
            ${slider('seed', 'seed: the noise it begins with', { min: 0, max: 99, step: 1, value: 6 })}
          </div>
        </div>
      </div>
      ${RESULTS}`;
    this.listen();
    for (const name of ['prompt', 'negative']) new WordField(this.querySelector(`input[name=${name}]`), () => this.drawOne());
    this.mask = new Mask(this.querySelector('.mask'), () => this.isLoaded && this.drawOne());
    this.listenToModes();
    this.listenToWords();
  }

  listenToModes() {
    this.addEventListener('change', ({ target }) => {
      if (target.name === 'mode') this.showMode();
      if (target.type === 'file' && target.files.length) this.takeFile(target.files[0]);
      if (target.name === 'erase') this.mask.isErasing = target.checked;
    });
    this.addEventListener('click', ({ target }) => {
      const button = target.closest('button');
      if (button?.dataset.do === 'take') this.takeDrawing();
      if (button?.dataset.fill) this.mask.fill(button.dataset.fill);
      if (button?.dataset.example) {
        this.querySelector('input[name=prompt]').value = EXAMPLES[button.dataset.example];
        this.drawOne();
      }
    });
  }

  // --- What to begin from ---

  get mode() {
    return this.querySelector('input[name=mode]:checked').value;
  }

  showMode() {
    const { mode } = this;
    this.querySelector('.from').hidden = mode === 'noise';
    this.querySelector('.source').hidden = mode === 'noise';
    this.querySelector('.state').hidden = mode !== 'noise';
    this.querySelector('.mask').hidden = mode !== 'fill';
    this.querySelector('.fills').hidden = mode !== 'fill';
    this.querySelector('.strength').hidden = mode !== 'picture';
    this.querySelector('.source figcaption').textContent =
      mode === 'fill' ? 'paint over what shall be drawn anew' : 'the picture to begin from';
    if (mode !== 'noise' && !this.source && this.result) this.takeDrawing();
  }

  takeDrawing() {
    if (!this.result) return this.say('Nothing is drawn yet: draw from noise first.', true);
    this.setSource(this.result.image);
  }

  setSource(image) {
    this.source = image;
    paintImage(this.querySelector('.picture'), image);
  }

  /** The middle of a picture file, at 64 pixels. */
  async takeFile(file) {
    const bitmap = await createImageBitmap(file);
    const side = Math.min(bitmap.width, bitmap.height);
    const canvas = Object.assign(document.createElement('canvas'), { width: 64, height: 64 });
    const pen = canvas.getContext('2d');
    pen.imageSmoothingQuality = 'high';
    pen.drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side, 0, 0, 64, 64);
    const { data } = pen.getImageData(0, 0, 64, 64);
    this.setSource(Float32Array.from({ length: 3 * 64 ** 2 }, (_, i) => data[4 * (i % 4096) + Math.floor(i / 4096)] / 127.5 - 1));
  }

  // --- What to draw ---

  words(name = 'prompt') {
    return splitWords(this.querySelector(`input[name=${name}]`).value);
  }

  wish() {
    const words = this.words();
    if (!words.length) throw new Error('Say what to draw; to see what is drawn when nothing is said, set w to −1.');
    const wish = {
      prompt: words.join(' '),
      negative: this.words('negative').join(' '),
      steps: this.value('steps'),
      reads: parseCaption(words)?.reads ?? 'shapes',
    };
    if (this.mode === 'noise') return wish;
    if (!this.source) throw new Error('There is no picture to begin from: take a drawing or a file.');
    if (this.mode === 'picture') return { ...wish, image: this.source, strength: this.value('strength') };
    if (this.mask.isEmpty) throw new Error('Nothing is marked: paint over what shall be drawn anew.');
    return { ...wish, image: this.source, unknown: this.mask.pixels.slice() };
  }

  asked() {
    const words = this.words();
    return { text: words.join(' '), wanted: parseCaption(words)?.wanted ?? null };
  }

  get circumstances() {
    const begun = { noise: '', picture: `, from a picture at strength ${this.value('strength')}`, fill: ', filled in' }[this.mode];
    const negative = this.words('negative').join(' ');
    return negative ? `${begun}, not: ${negative}` : begun;
  }

  // --- What is shown ---

  noisePicture(noise) {
    return latentColours(noise(4 * 16 ** 2));
  }

  showStep({ noisy, images, maps }) {
    paintImage(this.querySelector('.noisy'), latentColours(noisy[0]));
    if (images) paintImage(this.querySelector('.clean'), images[0]);
    this.maps = maps;
    this.showMap();
  }

  showResult() {
    super.showResult();
    paintImage(this.querySelector('.clean'), this.result.image);
    const { noise } = this.result; // none where no step was taken
    if (noise) paintImage(this.querySelector('.noisy'), latentColours(noise));
    this.maps = this.meanMaps();
    this.showWords();
    this.showMap();
  }

  /** The mean of the words' maps over all steps, as in chapter 07. */
  meanMaps() {
    const told = this.steps.filter(({ maps }) => maps);
    if (!told.length) return null;
    const mean = new Float32Array(told[0].maps.length);
    for (const { maps } of told) maps.forEach((value, i) => (mean[i] += value / told.length));
    return mean;
  }

  /** The words of the drawing as buttons. */
  showWords() {
    const words = splitWords(this.result.text);
    this.querySelector('.looking').hidden = !this.maps;
    this.querySelector('.words').replaceChildren(
      ...words.map((word, n) => {
        const button = document.createElement('button');
        button.type = 'button';
        button.textContent = word;
        button.dataset.token = n + 1; // behind the token that begins the sentence
        button.setAttribute('aria-pressed', 'false');
        return button;
      }),
    );
  }

  listenToWords() {
    const words = this.querySelector('.words');
    const look = (event) => {
      this.token = Number(event.target.closest('[data-token]')?.dataset.token) || null;
      this.showMap();
    };
    for (const kind of ['pointerover', 'focusin', 'click']) words.addEventListener(kind, look);
    for (const kind of ['pointerleave', 'focusout']) words.addEventListener(kind, () => ((this.token = null), this.showMap()));
  }

  /** The map of the word that is pointed at, over the picture: yellow where it is looked at most. */
  showMap() {
    const canvas = this.querySelector('.map');
    const isShown = Boolean(this.maps && this.token);
    canvas.classList.toggle('shown', isShown);
    for (const button of this.querySelectorAll('[data-token]')) {
      button.setAttribute('aria-pressed', isShown && Number(button.dataset.token) === this.token);
    }
    if (!isShown) return;
    const places = MAP_SIDE ** 2;
    const map = this.maps.subarray(this.token * places, (this.token + 1) * places);
    const highest = Math.max(...map);
    const pen = canvas.getContext('2d');
    const picture = pen.createImageData(MAP_SIDE, MAP_SIDE);
    map.forEach((value, i) => picture.data.set([...heat(value / highest), 165], 4 * i));
    pen.putImageData(picture, 0, 0);
  }
}

/** Red, green and blue of a number in [0, 1]: from violet by way of green to yellow, as matplotlib's viridis. */
function heat(value) {
  const colours = [
    [68, 1, 84],
    [33, 145, 140],
    [253, 231, 37],
  ];
  const below = value < 0.5 ? 0 : 1;
  const share = 2 * value - below;
  return [0, 1, 2].map((i) => (1 - share) * colours[below][i] + share * colours[below + 1][i]);
}

customElements.define('text-playground', TextPlayground);
