/** The laboratory's elements. */

import { weightSlider } from '../playground/parts.js';

const radio = (name, value, text, isChosen) =>
  `<label class="choice"><input type="radio" name="${name}" value="${value}" ${isChosen ? 'checked' : ''}><span>${text}</span></label>`;

const check = (name, text, isChosen) =>
  `<label class="check"><input type="checkbox" name="${name}" ${isChosen ? 'checked' : ''}>${text}</label>`;

const button = (action, text, more = '') => `<button type="button" data-do="${action}" ${more}>${text}</button>`;

const fact = (name, text) =>
  `<tr><th scope="row">${text}</th><td data-fact="${name}"></td><td data-fact="${name}-tilted"></td></tr>`;

function panel(name, way) {
  return `
    <figure class="panel" data-way="${name}">
      <h3>${way.name}</h3>
      <div class="plane"><canvas role="img" aria-label="${way.name}: points on their way from noise to data, the scores as arrows, and at the end the tilted density as contours"></canvas></div>
      <canvas class="marginal" role="img" aria-label="Where the points end, from left to right: as bars; the tilted density as a line, the class as a dashed line"></canvas>
      <figcaption>
        <table class="facts">
          <thead><tr><td></td><th scope="col">samples</th><th scope="col">tilted</th></tr></thead>
          <tbody>${fact('share', 'in the class')}${fact('spread', 'spread')}
            <tr><th scope="row">distance</th><td data-fact="distance" colspan="2" title="how far the samples would have to go, on average, to be spread as the tilted density"></td></tr></tbody>
        </table>
        <p class="missing"></p>
        <p class="formula">${way.formula}</p>
        <p class="note">${way.note}</p>
      </figcaption>
    </figure>`;
}

const sign = (drawing, text) => `<span><svg viewBox="0 0 34 18" aria-hidden="true">${drawing}</svg><span>${text}</span></span>`;
const arrow = (colour, text) =>
  sign(`<path d="M3 9h26m-6-5 6 5-6 5" fill="none" stroke="var(--${colour})" stroke-width="2.5"/>`, text);

const KEY = [
  sign('<g fill="currentColor"><rect x="4" y="5" width="4" height="4"/><rect x="15" y="9" width="4" height="4"/><rect x="26" y="4" width="4" height="4"/></g>', 'samples'),
  sign('<g fill="none" stroke="currentColor" stroke-width="1.5"><ellipse cx="17" cy="9" rx="14" ry="8"/><ellipse cx="17" cy="9" rx="7" ry="4"/></g>',
    'tilted density, half and nine tenths of it inside the lines: what guidance is often said to draw; for classifier-free guidance q(x | y) (q(x | y) / q(x))<sup>w</sup>'),
  sign('<path d="M3 14q14-18 28 0" fill="none" stroke="currentColor" stroke-width="2" stroke-dasharray="4 3"/>', 'in the small plots, the class itself'),
  '<span>distance: how far the samples would have to go, on average, to lie as the tilted density does</span>',
  arrow('score', 'score that is followed'),
  arrow('class', 'its part of the class'),
  arrow('push', 'and what guidance adds to it: point into a square'),
];

/** All of it, as HTML. */
export function markup(ways, panels, samplers, labels) {
  const dot = (label) => `<i class="dot" data-label="${label}"></i>`;
  return `
    <div class="head">
      <div class="strength">${weightSlider(0.1, 2)}</div>
      <fieldset><legend>What is asked for</legend><div class="choices">
        ${labels.map((name, label) => radio('label', label, `${dot(label)}${name}`, label === 0)).join('')}
      </div></fieldset>
    </div>
    <div class="run">
      <div class="row">${button('play', 'Pause', 'class="go"')}${button('noise', 'New noise')}${button('screen', 'Whole screen')}</div>
      <label class="slider">time, from noise to data <input type="range" name="time" class="backwards" min="0" max="40" step="any" value="0"><output name="time"></output></label>
    </div>
    <p class="seen" aria-live="polite"></p>
    <div class="panels">
      <figure class="panel data">
        <h3>The data: drag them</h3>
        <div class="plane"><canvas role="img" aria-label="The density of the data: four round clusters, two of each class"></canvas></div>
        <figcaption><div class="row">${button('narrower', 'narrower')}${button('wider', 'wider')}${button('reset', 'Put them back')}</div>
          <p>Arrow keys move a cluster, too; + and − change its spread.</p>
          <p class="note">All networks are replaced by the exact answer: what goes wrong at a large w is guidance itself.</p></figcaption>
      </figure>
      ${panels.map((name) => panel(name, ways[name])).join('')}
    </div>
    <p class="key">${KEY.join('')}</p>
    <div class="foot">
      <label class="slider">steps <input type="range" name="steps" min="5" max="80" step="1" value="40"><output name="steps"></output></label>
      <fieldset><legend>Sampler</legend><div class="choices">
        ${Object.entries(samplers).map(([name, sampler]) => radio('sampler', name, sampler.name, name === 'ddim')).join('')}
      </div></fieldset>
      <fieldset><legend>Arrows</legend><div class="choices">
        ${radio('arrows', 'score', 'score', true)}${radio('arrows', 'parts', 'its two parts')}${radio('arrows', 'none', 'none')}
      </div></fieldset>
      <fieldset><legend>Show</legend><div class="row">
        ${check('trails', 'paths', true)}${check('tilted', 'tilted density', true)}
      </div></fieldset>
      <fieldset><legend>Classifier guidance</legend><div class="row">${check('clean', 'by a classifier of clean points', false)}</div></fieldset>
    </div>`;
}
