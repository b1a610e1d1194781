/** <guidance-laboratory>: what guidance does, on data of which everything is known exactly. */

import { Schedule, cosineBetas } from '../engine/diffusion.js';
import { normalNoise } from '../engine/noise.js';
import { WAYS, canBeNormalised, logTilted } from './guidance.js';
import { GridDensity, histogram, shareInClass, spreadOf } from './measure.js';
import { Densities } from './mixture.js';
import { Plane, Shade, drawMarginal } from './painting.js';
import { SAMPLERS, guidedEps, samplePaths } from './samplers.js';
import { markup } from './markup.js';

const REACH = 2; // the squares show the plane from -REACH to REACH
const COUNT = 360; // points in each square
const TRAILS = 48; // of which so many show their paths
const BLUR = 0.28; // of the weaker model's data
const GRID = 72; // cells across of a density
const BINS = 36;
const SECONDS = 4; // from noise to data
const REST = 2.5; // seconds before it begins again
const ARROWS = 9; // across
const LABEL_NAMES = ['blue', 'orange'];
const START = [
  { weight: 0.3, x: -0.65, y: -0.4, std: 0.15, label: 0 },
  { weight: 0.2, x: 0.0, y: 0.75, std: 0.18, label: 0 },
  { weight: 0.3, x: 0.5, y: -0.55, std: 0.24, label: 1 },
  { weight: 0.2, x: 0.95, y: 0.6, std: 0.22, label: 1 },
];
const PANELS = ['conditional', 'classifier', 'free', 'negative', 'auto'];
const whole = Schedule.fromBetas(cosineBetas(1000));

/** One square: a way to guide, the paths of its points, and what its ends are compared with. */
class Panel {
  constructor(figure, way) {
    Object.assign(this, { figure, way, paths: null, isStale: true });
    this.plane = new Plane(figure.querySelector('.plane canvas'), REACH);
    this.marginal = figure.querySelector('.marginal');
  }

  /** Compute paths and densities anew. */
  compute({ way, densities, w, sampler, schedule, start, fresh }) {
    this.way = way;
    this.paths = samplePaths(sampler, guidedEps(way, densities, w), schedule, start, fresh);
    this.hasTilted = canBeNormalised(way, densities, w);
    const grid = new GridDensity((x, y) => logTilted(way, densities, w, x, y), REACH, GRID);
    this.contours = this.hasTilted ? grid.levels([0.5, 0.9]).flatMap((level) => grid.contour(level)) : [];
    this.tilted = grid;
    const ends = this.points(0);
    this.measures = {
      share: shareInClass(ends, densities),
      spread: spreadOf(ends),
      tilted: grid.spread(),
    };
    this.isStale = false;
  }

  /** The points at a time between the steps, 0 being the end. */
  points(time) {
    const steps = this.paths.length / (2 * COUNT) - 1;
    const below = Math.min(Math.floor(time), steps - 1);
    const share = time - below;
    const at = below * 2 * COUNT;
    if (share === 0) return this.paths.subarray(at, at + 2 * COUNT);
    return Float32Array.from({ length: 2 * COUNT }, (_, i) => (1 - share) * this.paths[at + i] + share * this.paths[at + 2 * COUNT + i]);
  }

  /** The paths of the first points up to a time, as segments. */
  trails(time) {
    const segments = [];
    const steps = this.paths.length / (2 * COUNT) - 1;
    const now = this.points(time);
    for (let n = 0; n < TRAILS; n++) {
      const place = (step) => this.paths.subarray((step * COUNT + n) * 2, (step * COUNT + n) * 2 + 2);
      let from = place(steps);
      for (let step = steps - 1; step >= time; step--) {
        const to = place(step);
        segments.push([...from, ...to]);
        from = to;
      }
      segments.push([...from, now[2 * n], now[2 * n + 1]]);
    }
    return segments;
  }
}

class GuidanceLaboratory extends HTMLElement {
  connectedCallback() {
    if (this.panels) return this.watch(); // moved to another place of the page
    this.innerHTML = markup(WAYS, PANELS, SAMPLERS, LABEL_NAMES);
    this.components = START.map((component) => ({ ...component }));
    this.seed = 1;
    this.time = 0;
    this.rest = 0;
    this.probe = null;
    const figures = [...this.querySelectorAll('.panel')];
    this.dataPlane = new Plane(figures[0].querySelector('canvas'), REACH);
    this.panels = figures.slice(1).map((figure) => new Panel(figure, WAYS[figure.dataset.way]));
    this.shade = new Shade(REACH);
    this.dataShade = new Shade(REACH);
    this.makeHandles();
    this.listen();
    this.watch();
    this.prepare();
    const still = matchMedia('(prefers-reduced-motion: reduce)').matches;
    this.time = still ? 0 : this.schedule.numSteps;
    this.setPlaying(!still);
  }

  disconnectedCallback() {
    this.observers.forEach((observer) => observer.disconnect());
    cancelAnimationFrame(this.frame);
    this.frame = null;
  }

  /** Draw when the size or the colours change, and only while the element can be seen. */
  watch() {
    const resized = new ResizeObserver(() => this.draw());
    resized.observe(this);
    const seen = new IntersectionObserver(([entry]) => {
      this.isSeen = entry.isIntersecting;
      this.draw();
    });
    seen.observe(this);
    const recoloured = new MutationObserver(() => this.readColours());
    for (const node of [document.documentElement, document.body]) {
      recoloured.observe(node, { attributes: true, attributeFilter: ['data-theme'] });
    }
    this.observers = [resized, seen, recoloured];
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this.readColours());
    this.readColours();
  }

  readColours() {
    const style = getComputedStyle(this);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    this.colours = { ink: colour('ink'), soft: colour('soft'), warm: colour('warm'), classes: [colour('blue'), colour('orange')] };
    this.colours.rgb = this.colours.classes.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
    if (this.panels) this.draw();
  }

  listen() {
    this.addEventListener('input', ({ target }) => {
      if (target.name === 'time') {
        this.setPlaying(false);
        this.time = Number(target.value);
        return this.draw();
      }
      this.prepare();
    });
    this.addEventListener('click', ({ target }) => {
      const action = target.closest('button[data-do]')?.dataset.do;
      if (action === 'play') {
        if (!this.isPlaying && this.time === 0) this.time = this.schedule.numSteps;
        this.setPlaying(!this.isPlaying);
      }
      if (action === 'noise') {
        this.seed++;
        this.prepare();
      }
      if (action === 'reset') {
        START.forEach((component, k) => Object.assign(this.components[k], component));
        this.placeHandles();
        this.prepare();
      }
    });
    for (const { figure, plane } of this.panels) {
      const canvas = figure.querySelector('.plane');
      canvas.addEventListener('pointermove', (event) => {
        const box = canvas.getBoundingClientRect();
        const x = ((event.clientX - box.left) / box.width) * 2 * REACH - REACH;
        const y = REACH - ((event.clientY - box.top) / box.height) * 2 * REACH;
        this.probe = { x, y, plane };
        this.draw();
      });
      canvas.addEventListener('pointerleave', () => {
        this.probe = null;
        this.draw();
      });
    }
  }

  // --- Components by hand ---

  makeHandles() {
    const plane = this.querySelector('.data .plane');
    this.handles = this.components.map((component, k) => {
      const handle = document.createElement('button');
      handle.className = 'handle';
      handle.type = 'button';
      handle.dataset.label = component.label;
      handle.addEventListener('pointerdown', (event) => handle.setPointerCapture(event.pointerId));
      handle.addEventListener('pointermove', (event) => {
        if (!handle.hasPointerCapture(event.pointerId)) return;
        const box = plane.getBoundingClientRect();
        const x = ((event.clientX - box.left) / box.width) * 2 * REACH - REACH;
        const y = REACH - ((event.clientY - box.top) / box.height) * 2 * REACH;
        this.move(k, x, y);
      });
      handle.addEventListener('keydown', (event) => this.moveByKey(k, event));
      plane.append(handle);
      return handle;
    });
    this.placeHandles();
  }

  moveByKey(k, event) {
    const steps = { ArrowLeft: [-0.05, 0], ArrowRight: [0.05, 0], ArrowUp: [0, 0.05], ArrowDown: [0, -0.05] };
    const component = this.components[k];
    if (event.key in steps) {
      const [right, up] = steps[event.key];
      this.move(k, component.x + right, component.y + up);
    } else if (event.key === '+' || event.key === '-') {
      component.std = Math.min(0.5, Math.max(0.06, component.std * (event.key === '+' ? 1.1 : 1 / 1.1)));
      this.move(k, component.x, component.y);
    } else return;
    event.preventDefault();
  }

  move(k, x, y) {
    const limit = (value) => Math.min(0.85 * REACH, Math.max(-0.85 * REACH, value));
    Object.assign(this.components[k], { x: limit(x), y: limit(y) });
    this.placeHandles();
    this.prepare();
  }

  placeHandles() {
    this.components.forEach(({ x, y, std, label }, k) => {
      this.handles[k].style.left = `${(50 * (x + REACH)) / REACH}%`;
      this.handles[k].style.top = `${(50 * (REACH - y)) / REACH}%`;
      const where = `right ${x.toFixed(2)}, up ${y.toFixed(2)}, spread ${std.toFixed(2)}`;
      this.handles[k].setAttribute('aria-label', `Component ${k + 1}, ${LABEL_NAMES[label]}: ${where}. Arrow keys move it, + and − change its spread.`);
    });
  }

  // --- From the controls to the paths ---

  /** Take in what the controls say; the paths are computed square by square, in the frames that follow. */
  prepare() {
    const value = (name) => this.querySelector(`input[name=${name}]`).value;
    const chosen = (name) => this.querySelector(`[name=${name}]:checked`).value;
    const share = this.schedule ? this.time / this.schedule.numSteps : 1;
    this.w = Number(value('w'));
    this.label = Number(chosen('label'));
    this.densities = new Densities(this.components, this.label, BLUR);
    this.sampler = SAMPLERS[chosen('sampler')];
    this.schedule = whole.respace(Number(value('steps')));
    this.shows = Object.fromEntries(['arrows', 'trails', 'tilted'].map((name) => [name, this.querySelector(`input[name=${name}]`).checked]));
    this.isClean = this.querySelector('[name=clean]').checked;
    this.time = Math.min(this.schedule.numSteps, share * this.schedule.numSteps);
    this.noise = normalNoise(2 * COUNT, this.seed);
    if (this.freshSeed !== `${this.seed} ${this.schedule.numSteps}`) {
      this.fresh = normalNoise(2 * COUNT * this.schedule.numSteps, this.seed + 1000);
      this.freshSeed = `${this.seed} ${this.schedule.numSteps}`;
    }
    this.ownMarginal = new GridDensity((x, y) => this.densities.own.at(x, y, 1), REACH, GRID).marginal();
    for (const panel of this.panels) panel.isStale = true;
    const output = (name, text) => (this.querySelector(`output[name=${name}]`).textContent = text);
    output('w', `${this.w.toFixed(1)}, s = ${(1 + this.w).toFixed(1)}`);
    output('steps', this.schedule.numSteps);
    this.querySelector('input[name=time]').max = this.schedule.numSteps;
    this.draw();
  }

  /** The way of a square; that of the classifier has two. */
  wayOf(panel) {
    const name = panel.figure.dataset.way;
    return WAYS[name === 'classifier' && this.isClean ? 'cleanClassifier' : name];
  }

  computeOne(panel) {
    const { densities, sampler, schedule, fresh } = this;
    const w = panel.figure.dataset.way === 'conditional' ? 0 : this.w;
    panel.compute({ way: this.wayOf(panel), densities, w, sampler, schedule, start: this.noise, fresh });
    const { share, spread, tilted } = panel.measures;
    const text = {
      share: `${Math.round(100 * share)} %`,
      spread: spread.toFixed(2),
      tilted: panel.hasTilted ? (panel.tilted.isCut ? 'outside' : tilted.toFixed(2)) : 'none: grows without end',
    };
    for (const [name, said] of Object.entries(text)) panel.figure.querySelector(`[data-fact=${name}]`).textContent = said;
    const { formula, note } = panel.way;
    if (panel.shownFormula !== formula) {
      panel.figure.querySelector('.formula').innerHTML = formula;
      panel.figure.querySelector('.note').textContent = note;
      panel.shownFormula = formula;
    }
    const lines = [{ values: this.ownMarginal, colour: this.colours.classes[this.label], dashes: [4, 3] }];
    if (panel.hasTilted) lines.unshift({ values: panel.tilted.marginal(), colour: this.colours.ink, dashes: [] });
    drawMarginal(panel.marginal, { counts: histogram(panel.points(0), REACH, BINS), lines, colour: this.colours.ink });
  }

  // --- Time ---

  setPlaying(isPlaying) {
    this.isPlaying = isPlaying;
    this.rest = 0;
    this.last = null;
    this.querySelector('[data-do=play]').textContent = isPlaying ? 'Pause' : 'Play';
    this.draw();
  }

  /** Ask for a frame, unless one is on its way. */
  draw() {
    if (this.frame || !this.panels || !this.schedule || this.isSeen === false) return;
    this.frame = requestAnimationFrame((now) => {
      this.frame = null;
      this.advance(now);
      const stale = this.panels.filter((panel) => panel.isStale);
      const never = stale.filter((panel) => !panel.paths);
      (never.length ? never : stale.slice(0, 1)).forEach((panel) => this.computeOne(panel));
      this.paint();
      if (this.isPlaying || stale.length > 1) this.draw();
    });
  }

  advance(now) {
    const seconds = this.last === null ? 0 : Math.min((now - this.last) / 1000, 0.1);
    this.last = now;
    if (!this.isPlaying) return;
    this.time = Math.max(0, this.time - (seconds / SECONDS) * this.schedule.numSteps);
    if (this.time > 0) return;
    this.rest += seconds;
    if (this.rest < REST) return;
    this.rest = 0;
    this.time = this.schedule.numSteps;
  }

  // --- Pictures ---

  paint() {
    const begun = performance.now();
    const step = Math.round(this.time) - 1; // the step whose noise level is shown; -1 for the data
    const alphaBar = step >= 0 ? this.schedule.alphaBar[step] : 1;
    const scrubber = this.querySelector('input[name=time]');
    scrubber.value = this.time;
    const said = step >= 0 ? `x_t at step ${step + 1} of ${this.schedule.numSteps}` : 'x_0, the end';
    if (scrubber.getAttribute('aria-valuetext') !== said) {
      scrubber.setAttribute('aria-valuetext', said);
      this.querySelector('output[name=time]').textContent = said.replace('x_t', 'xₜ').replace('x_0', 'x₀');
    }
    this.dataPlane.fit();
    this.dataPlane.clear();
    this.dataPlane.picture(this.dataShade.draw(this.components, 1, this.colours.rgb, 0.85));
    this.shade.draw(this.components, alphaBar, this.colours.rgb, 0.42);
    for (const panel of this.panels) if (panel.paths) this.paintPanel(panel, alphaBar);
    this.milliseconds = performance.now() - begun;
  }

  paintPanel(panel, alphaBar) {
    const { plane } = panel;
    const { ink, warm } = this.colours;
    plane.fit();
    plane.clear();
    plane.picture(this.shade.canvas);
    if (this.shows.trails) plane.segments(panel.trails(this.time), ink, 0.7, 0.13);
    const arrival = 1 - Math.min(1, this.time / (0.25 * this.schedule.numSteps));
    if (this.shows.tilted && arrival > 0) plane.segments(panel.contours, ink, 1.4, arrival);
    plane.dots(panel.points(this.time), ink, 2.1, 0.75);
    const w = panel.figure.dataset.way === 'conditional' ? 0 : this.w;
    if (this.shows.arrows && this.time > 0.5) this.paintField(panel, w, alphaBar);
    if (this.probe) this.paintProbe(panel, w, alphaBar, warm);
  }

  /** The guided score on a grid: eps, so that all noise levels look alike. */
  paintField(panel, w, alphaBar) {
    const out = { base: [0, 0], push: [0, 0] };
    const arrows = [];
    const gap = (2 * REACH) / ARROWS;
    for (let x = gap / 2 - REACH; x < REACH; x += gap) {
      for (let y = gap / 2 - REACH; y < REACH; y += gap) {
        panel.way.score(this.densities, x, y, alphaBar, out);
        arrows.push([x, y, ...shortened(out.base.map((base, i) => base + w * out.push[i]), alphaBar, 0.85 * gap)]);
      }
    }
    panel.plane.arrows(arrows, this.colours.warm, 1.2, 0.85);
  }

  /** At the pointer, in every square: the class's score, the push behind it, and their sum. */
  paintProbe(panel, w, alphaBar, colour) {
    const { x, y } = this.probe;
    const out = { base: [0, 0], push: [0, 0] };
    panel.way.score(this.densities, x, y, alphaBar, out);
    const size = 0.45 * Math.sqrt(1 - Math.min(alphaBar, 0.995));
    const limit = (vector) => {
      const length = Math.hypot(...vector) * size;
      return vector.map((value) => value * size * Math.min(1, 1.4 / Math.max(length, 1e-9)));
    };
    const base = limit(out.base);
    const push = limit(out.push.map((value) => value * w));
    panel.plane.arrows([[x, y, ...base]], this.colours.classes[this.label], 2.6);
    panel.plane.arrows([[x + base[0], y + base[1], ...push]], this.colours.ink, 2.2, 0.8);
    panel.plane.arrows([[x, y, base[0] + push[0], base[1] + push[1]]], colour, 2.6);
  }
}

/** A score as an arrow: its direction, and a length that grows with it up to a limit. */
function shortened(score, alphaBar, limit) {
  const length = Math.hypot(...score) * Math.sqrt(1 - alphaBar);
  const wanted = limit * Math.tanh(0.6 * length);
  return score.map((value) => (value * wanted) / Math.max(Math.hypot(...score), 1e-9));
}

customElements.define('guidance-laboratory', GuidanceLaboratory);
