/** <class-playground>: the class-conditional model of chapter 05, guided by itself. */

import { ACTIONS, Board, RESULTS, sayings } from './board.js';
import { caption, choice, paintImage, slider, weightSlider } from './parts.js';

const ANY = 8; // the number of the label that says nothing
const COLOURS = {
  red: '#e61a1f',
  orange: '#ff8500',
  yellow: '#ffe00d',
  green: '#1aad33',
  cyan: '#0dd9e6',
  blue: '#1f4dff',
  purple: '#9933e0',
  pink: '#ff73bf',
};
const SHAPES = {
  circle: '<circle cx="12" cy="12" r="9"/>',
  square: '<path d="M3.5 3.5h17v17h-17z"/>',
  triangle: '<path d="M12 2.5 22 20H2z"/>',
  star: '<path d="m12 1.5 2.9 6.6 7.1.7-5.4 4.8 1.6 7-6.2-3.7-6.2 3.7 1.6-7L2 8.8l7.1-.7z"/>',
  ring: '<path fill-rule="evenodd" d="M12 2a10 10 0 1 0 0 20 10 10 0 0 0 0-20zm0 5a5 5 0 1 1 0 10 5 5 0 0 1 0-10z"/>',
  cross: '<path d="M8.5 1.5h7v7h7v7h-7v7h-7v-7h-7v-7h7z"/>',
  heart: '<path d="M12 21 2.8 11.5a5.6 5.6 0 0 1 0-8 5.6 5.6 0 0 1 8 0L12 4.7l1.2-1.2a5.6 5.6 0 0 1 8 8z"/>',
  crescent: '<path d="M15.5 2.5a10 10 0 1 0 0 19 11.5 11.5 0 0 1 0-19z"/>',
};
const icon = (paths) => `<svg viewBox="0 0 24 24" width="19" height="19" fill="currentColor" aria-hidden="true">${paths}</svg>`;

class ClassPlayground extends Board {
  constructor() {
    super('class');
  }

  connectedCallback() {
    if (this.querySelector('canvas')) return;
    const colours = Object.entries(COLOURS).map(([name, colour], n) =>
      choice('colour', n, `<i class="swatch" style="background:${colour}"></i>${name}`, name === 'red'),
    );
    const shapes = Object.entries(SHAPES).map(([name, paths], n) =>
      choice('shape', n, `${icon(paths)}${name}`, name === 'star'),
    );
    this.innerHTML = `
      <div class="columns">
        <div class="stack">
          <div class="pair">
            <figure><canvas class="pixels noisy" width="32" height="32" role="img" aria-label="The noisy image"></canvas>
              ${caption('x<sub>t</sub>, what the network is given', 'x<sub>T</sub>, the noise it began with')}</figure>
            <figure class="guess"><canvas class="pixels clean" width="32" height="32" role="img" aria-label="The clean image that the network predicts"></canvas>
              ${caption('x̂<sub>0</sub>, what it takes it for', 'x<sub>0</sub>, what it has drawn')}</figure>
          </div>
          <label class="slider">step <input type="range" name="step" class="backwards" min="0" max="25" step="1" value="25" disabled>
            <output name="step">nothing drawn yet</output></label>
          ${ACTIONS}
          ${sayings('The network has 2 million weights (6 MB). It is loaded when you first draw, and runs on your own device.')}
        </div>
        <div class="stack" data-redraws>
          <fieldset><legend>Colour</legend><div class="choices">${colours.join('')}${choice('colour', ANY, 'any')}</div></fieldset>
          <fieldset><legend>Shape</legend><div class="choices">${shapes.join('')}${choice('shape', ANY, 'any')}</div></fieldset>
          ${weightSlider(0.5, 1)}
          ${slider('steps', 'steps of DDIM', { min: 5, max: 100, step: 5, value: 25 })}
          ${slider('seed', 'seed: the noise it begins with', { min: 0, max: 99, step: 1, value: 6 })}
        </div>
      </div>
      ${RESULTS}`;
    this.listen();
  }

  labels() {
    return ['shape', 'colour'].map((name) => Number(this.querySelector(`input[name=${name}]:checked`).value));
  }

  wish() {
    return { labels: this.labels(), steps: this.value('steps') };
  }

  asked() {
    const [shape, colour] = this.labels();
    const wanted = {};
    if (shape !== ANY) wanted.shape = shape;
    if (colour !== ANY) wanted.colour = colour;
    const shapeName = Object.keys(SHAPES)[shape] ?? 'shape';
    const text = `${Object.keys(COLOURS)[colour] ?? 'any'} ${shapeName}`;
    return { text, wanted: Object.keys(wanted).length ? wanted : null };
  }

  noisePicture(noise) {
    return noise(3 * 32 ** 2);
  }

  showStep({ noisy, images }) {
    paintImage(this.querySelector('.noisy'), noisy[0]);
    paintImage(this.querySelector('.clean'), images[0]);
  }

  showResult() {
    super.showResult();
    paintImage(this.querySelector('.noisy'), this.result.noise);
    paintImage(this.querySelector('.clean'), this.result.image);
  }
}

customElements.define('class-playground', ClassPlayground);
