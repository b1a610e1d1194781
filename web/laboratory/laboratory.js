/** <guidance-laboratory>: what guidance does, on data of which everything is known exactly. */

import { Schedule, cosineBetas } from '../engine/diffusion.js';
import { normalNoise } from '../engine/noise.js';
import { WAYS, canBeNormalised, logTilted } from './guidance.js';
import { GridDensity, histogram, shareOf, spreadOf } from './measure.js';
import { Densities } from './mixture.js';
import { Plane, Shade, drawMarginal, pathOf } from './painting.js';
import { SAMPLERS, guidedEps, samplePaths } from './samplers.js';
import { markup } from './markup.js';
import { numberText } from '../playground/parts.js';

const REACH = 2; // the squares show the plane from -REACH to REACH
const COUNT = 360; // points in each square
const TRAILS = 48; // of which so many show their paths
const BLUR = 0.28; // of the weaker model's data
const GRID = 72; // cells across of a density
const BINS = 36;
const SECONDS = 4; // from noise to data
const REST = 2.5; // seconds before it begins again
const ARROWS = 9; // across
const LEVELS = [0.5, 0.9]; // shares of the tilted density inside its two lines
const BUDGET = 8; // milliseconds of a frame for what has to be computed anew
const LABEL_NAMES = ['blue', 'orange'];
const START = [
  { weight: 0.3, x: -0.65, y: -0.4, std: 0.15, label: 0 },
  { weight: 0.2, x: 0.0, y: 0.75, std: 0.18, label: 0 },
  { weight: 0.3, x: 0.5, y: -0.55, std: 0.24, label: 1 },
  { weight: 0.2, x: 0.95, y: 0.6, std: 0.22, label: 1 },
];
const PANELS = ['conditional', 'classifier', 'free', 'negative', 'auto'];
const whole = Schedule.fromBetas(cosineBetas(1000));

/** One square: a way to guide, the paths of its points, and what their ends are compared with. */
class Panel {
  constructor(figure, way) {
    Object.assign(this, { figure, way, paths: null, arrows: [] });
    this.plane = new Plane(figure.querySelector('.plane canvas'), REACH);
    this.marginal = figure.querySelector('.marginal');
    this.between = new Float32Array(2 * COUNT); // points between two steps
  }

  /** Compute paths and densities anew. */
  compute({ way, densities, w, sampler, schedule, start, fresh }) {
    this.way = way;
    this.numSteps = schedule.numSteps;
    this.paths = samplePaths(sampler, guidedEps(way, densities, w), schedule, start, fresh);
    this.hasTilted = canBeNormalised(way, densities, w);
    this.tilted = new GridDensity((x, y) => logTilted(way, densities, w, x, y), REACH, GRID);
    const levels = this.tilted.levels(LEVELS);
    this.contours = pathOf(this.hasTilted ? levels.flatMap((level) => this.tilted.contour(level)) : []);
    const ends = this.points(0);
    const isInClass = (x, y) => densities.isInClass(x, y);
    this.measures = {
      samples: { share: shareOf(ends, isInClass), spread: spreadOf(ends) },
      tilted: { share: this.tilted.shareOf(isInClass), spread: this.tilted.spread() },
      distance: this.tilted.distanceFrom(ends),
    };
  }

  /** Whether the tilted density exists and is seen as a whole. */
  get isComparable() {
    return this.hasTilted && !this.tilted.isCut;
  }

  /** The points at a time between the steps, 0 being the end. */
  points(time) {
    const below = Math.min(Math.floor(time), this.numSteps - 1);
    const share = time - below;
    const at = below * 2 * COUNT;
    if (share === 0) return this.paths.subarray(at, at + 2 * COUNT);
    for (let i = 0; i < 2 * COUNT; i++) {
      this.between[i] = (1 - share) * this.paths[at + i] + share * this.paths[at + 2 * COUNT + i];
    }
    return this.between;
  }

  /** The paths of the first points up to a time. */
  trails(time) {
    const { paths } = this;
    const now = this.points(time);
    const path = new Path2D();
    for (let n = 0; n < TRAILS; n++) {
      let at = 2 * (this.numSteps * COUNT + n);
      path.moveTo(paths[at], paths[at + 1]);
      for (let step = this.numSteps - 1; step >= time; step--) {
        at -= 2 * COUNT;
        path.lineTo(paths[at], paths[at + 1]);
      }
      path.lineTo(now[2 * n], now[2 * n + 1]);
    }
    return path;
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
    this.chosen = 0; // the component that was touched last
    this.stale = new Set(); // squares to be computed anew, those that have waited longest first
    const figures = [...this.querySelectorAll('.panel')];
    this.plane = new Plane(figures[0].querySelector('canvas'), REACH);
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
    const resized = new ResizeObserver(() => this.fit());
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
    this.fit();
    this.querySelector('[data-do=screen]').hidden = !document.fullscreenEnabled;
  }

  readColours() {
    const style = getComputedStyle(this);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    this.colours = { ink: colour('ink'), push: colour('push'), score: colour('score'), classes: [colour('blue'), colour('orange')] };
    this.colours.rgb = this.colours.classes.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
    this.paintAnew();
  }

  /** Give all canvases the size that they have on the screen. */
  fit() {
    for (const { plane } of [this, ...this.panels]) plane.fit();
    this.paintAnew();
  }

  /** Paint also what does not change from frame to frame. */
  paintAnew() {
    this.paintedStep = null;
    for (const panel of this.panels) if (panel.paths) this.paintMarginal(panel);
    this.draw();
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
      if (action === 'wider') this.widen(this.chosen, 1.15);
      if (action === 'narrower') this.widen(this.chosen, 1 / 1.15);
      if (action === 'screen') document.fullscreenElement ? document.exitFullscreen() : this.requestFullscreen();
      if (action === 'reset') {
        START.forEach((component, k) => Object.assign(this.components[k], component));
        this.placeHandles();
        this.prepare();
      }
    });
    for (const { figure } of this.panels) {
      const canvas = figure.querySelector('.plane');
      canvas.addEventListener('pointermove', (event) => {
        this.probe = placeIn(canvas, event);
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
      handle.addEventListener('pointerdown', (event) => {
        handle.setPointerCapture(event.pointerId);
        this.choose(k);
      });
      handle.addEventListener('pointermove', (event) => {
        if (!handle.hasPointerCapture(event.pointerId)) return;
        const { x, y } = placeIn(plane, event);
        this.move(k, x, y);
      });
      handle.addEventListener('focus', () => this.choose(k));
      handle.addEventListener('keydown', (event) => this.moveByKey(k, event));
      plane.append(handle);
      return handle;
    });
    this.placeHandles();
    this.choose(0);
  }

  /** Let the buttons for the spread be about a component. */
  choose(k) {
    this.chosen = k;
    this.handles.forEach((handle, n) => handle.classList.toggle('chosen', n === k));
  }

  moveByKey(k, event) {
    const steps = { ArrowLeft: [-0.05, 0], ArrowRight: [0.05, 0], ArrowUp: [0, 0.05], ArrowDown: [0, -0.05] };
    const component = this.components[k];
    if (event.key in steps) this.move(k, component.x + steps[event.key][0], component.y + steps[event.key][1]);
    else if (event.key === '+') this.widen(k, 1.15);
    else if (event.key === '-') this.widen(k, 1 / 1.15);
    else return;
    event.preventDefault();
  }

  widen(k, factor) {
    const component = this.components[k];
    component.std = Math.min(0.5, Math.max(0.06, component.std * factor));
    this.move(k, component.x, component.y);
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
    this.style.setProperty('--class', `var(--${LABEL_NAMES[this.label]})`);
    this.densities = new Densities(this.components, this.label, BLUR);
    this.sampler = SAMPLERS[chosen('sampler')];
    this.schedule = whole.respace(Number(value('steps')));
    this.shows = Object.fromEntries(['trails', 'tilted'].map((name) => [name, this.querySelector(`input[name=${name}]`).checked]));
    this.shows.arrows = chosen('arrows');
    this.isClean = this.querySelector('[name=clean]').checked;
    this.time = Math.min(this.schedule.numSteps, share * this.schedule.numSteps);
    this.noise = normalNoise(2 * COUNT, this.seed);
    if (this.freshSeed !== `${this.seed} ${this.schedule.numSteps}`) {
      this.fresh = normalNoise(2 * COUNT * this.schedule.numSteps, this.seed + 1000);
      this.freshSeed = `${this.seed} ${this.schedule.numSteps}`;
    }
    this.ownMarginal = new GridDensity((x, y) => this.densities.own.at(x, y, 1), REACH, GRID).marginal();
    for (const panel of this.panels) this.stale.add(panel);
    const output = (name, text) => (this.querySelector(`output[name=${name}]`).textContent = text);
    output('w', numberText(this.w.toFixed(1)));
    const { numSteps } = this.schedule;
    output('steps', this.sampler.evaluations === 1 ? numSteps : `${numSteps} (${this.sampler.evaluations * numSteps} evaluations)`);
    this.querySelector('input[name=time]').max = numSteps;
    this.paintedStep = null;
    this.draw();
  }

  /** The way of a square; that of the classifier has two. */
  wayOf(panel) {
    const name = panel.figure.dataset.way;
    return WAYS[name === 'classifier' && this.isClean ? 'cleanClassifier' : name];
  }

  /** The weight in a square; one of them is never guided. */
  weightOf(panel) {
    return panel.figure.dataset.way === 'conditional' ? 0 : this.w;
  }

  /** Compute stale squares for some milliseconds; the others wait for the next frame. */
  computeSome() {
    const end = performance.now() + BUDGET;
    for (const panel of this.stale) {
      this.stale.delete(panel);
      this.computeOne(panel);
      if (performance.now() > end) return;
    }
  }

  computeOne(panel) {
    const { densities, sampler, schedule, fresh } = this;
    panel.compute({ way: this.wayOf(panel), densities, w: this.weightOf(panel), sampler, schedule, start: this.noise, fresh });
    const { samples, tilted, distance } = panel.measures;
    const say = (name, text) => (panel.figure.querySelector(`[data-fact=${name}]`).textContent = text);
    const sayTilted = (name, text) => say(name, panel.isComparable ? text : '–');
    const percent = (share) => `${Math.round(100 * share)} %`;
    say('share', percent(samples.share));
    say('spread', samples.spread.toFixed(2));
    sayTilted('share-tilted', percent(tilted.share));
    sayTilted('spread-tilted', tilted.spread.toFixed(2));
    sayTilted('distance', distance.toFixed(2));
    panel.figure.querySelector('.missing').textContent = panel.hasTilted
      ? panel.tilted.isCut ? 'The tilted density lies outside.' : ''
      : 'There is no tilted density: it would grow without end.';
    const { formula, note } = panel.way;
    if (panel.shownFormula !== formula) {
      panel.figure.querySelector('.formula').innerHTML = formula;
      panel.figure.querySelector('.note').textContent = note;
      panel.shownFormula = formula;
    }
    if (!this.stale.size) this.querySelector('.seen').textContent = this.sentence();
    this.paintMarginal(panel);
  }

  /** What is seen, in words. */
  sentence() {
    const { w } = this;
    if (w === -1) return 'Nothing is asked for: classifier-free guidance draws all of the data.';
    if (w < 0) return 'The class is asked for in part: some samples stay with the other one.';
    if (w === 0) return 'The class is asked for, and not guided: the samples spread over it as the data do.';
    const [unguided, , free] = this.panels;
    const seen = 'Guided: the samples crowd together, away from the other class';
    if (!free.isComparable) return `${seen}.`;
    const far = (panel) => panel.measures.distance.toFixed(2);
    return `${seen}. Those of classifier-free guidance end ${far(free)} from the tilted density; by chance it would be ${far(unguided)}.`;
  }

  paintMarginal(panel) {
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
      this.computeSome();
      this.paint();
      if (this.isPlaying || this.stale.size) this.draw();
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
    const step = Math.round(this.time) - 1; // the step whose noise level is shown; -1 for the data
    if (step !== this.paintedStep) this.paintStep(step);
    this.querySelector('input[name=time]').value = this.time;
    for (const panel of this.panels) if (panel.paths) this.paintPanel(panel);
  }

  /** What changes with the step, and not with every frame. */
  paintStep(step) {
    const scrubber = this.querySelector('input[name=time]');
    const said = step >= 0 ? `x_t at step ${step + 1} of ${this.schedule.numSteps}` : 'x_0, the end';
    scrubber.setAttribute('aria-valuetext', said);
    this.querySelector('output[name=time]').textContent = said.replace('x_t', 'xₜ').replace('x_0', 'x₀');
    if (this.paintedStep === null) {
      this.plane.clear();
      this.plane.picture(this.dataShade.draw(this.components, 1, this.colours.rgb, 0.85));
    }
    this.alphaBar = step >= 0 ? this.schedule.alphaBar[step] : 1;
    this.shade.draw(this.components, this.alphaBar, this.colours.rgb, 0.42);
    for (const panel of this.panels) panel.arrows = step >= 0 ? this.field(panel) : [];
    this.paintedStep = step;
  }

  paintPanel(panel) {
    const { plane } = panel;
    const { ink } = this.colours;
    plane.clear();
    plane.picture(this.shade.canvas);
    if (this.shows.trails) plane.stroke(panel.trails(this.time), ink, 0.7, 0.13);
    const arrival = 1 - Math.min(1, this.time / (0.25 * this.schedule.numSteps));
    if (this.shows.tilted && arrival > 0) plane.stroke(panel.contours, ink, 1.4, arrival);
    plane.dots(panel.points(this.time), ink, 2.1, 0.75);
    for (const { path, colour } of panel.arrows) plane.stroke(path, colour, 1.2, 0.85);
    if (this.probe) this.paintProbe(panel);
  }

  /** The scores in all of a square as paths, each with its colour. */
  field(panel) {
    const kinds = { none: [], score: ['score'], parts: ['base', 'push'] }[this.shows.arrows];
    const arrows = Object.fromEntries(kinds.map((kind) => [kind, []]));
    const gap = (2 * REACH) / ARROWS;
    for (let x = gap / 2 - REACH; x < REACH; x += gap) {
      for (let y = gap / 2 - REACH; y < REACH; y += gap) {
        const scores = this.scoresAt(panel, x, y, 0.85 * gap);
        for (const kind of kinds) arrows[kind].push([x, y, ...scores[kind]]);
      }
    }
    return kinds.map((kind) => ({ path: panel.plane.arrows(arrows[kind]), colour: this.colourOf(kind) }));
  }

  colourOf(kind) {
    return { base: this.colours.classes[this.label], push: this.colours.push, score: this.colours.score }[kind];
  }

  /**
   * At a point: what guidance begins from, what it adds, and their sum, which is followed. All are made shorter
   * alike, to the limit or less, and grow with the predicted noise, so that every noise level can be seen.
   */
  scoresAt(panel, x, y, limit) {
    const out = { base: [0, 0], push: [0, 0] };
    this.wayOf(panel).score(this.densities, x, y, this.alphaBar, out);
    const push = out.push.map((value) => value * this.weightOf(panel));
    const scores = { base: out.base, push, score: out.base.map((value, i) => value + push[i]) };
    const longest = Math.max(...Object.values(scores).map((score) => Math.hypot(...score)), 1e-9);
    const noise = Math.sqrt(1 - Math.min(this.alphaBar, 0.995));
    const factor = (limit * Math.tanh(0.6 * longest * noise)) / longest;
    return Object.fromEntries(Object.entries(scores).map(([kind, score]) => [kind, score.map((value) => value * factor)]));
  }

  /** At the pointer, in every square: the two parts one behind the other, and their sum. */
  paintProbe(panel) {
    const { x, y } = this.probe;
    const { base, push, score } = this.scoresAt(panel, x, y, 1.2);
    const arrows = { base: [x, y, ...base], push: [x + base[0], y + base[1], ...push], score: [x, y, ...score] };
    for (const [kind, arrow] of Object.entries(arrows)) panel.plane.stroke(panel.plane.arrows([arrow]), this.colourOf(kind), 2.6);
  }
}

/** The point of the plane that an event of the pointer is at. */
function placeIn(square, event) {
  const box = square.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * 2 * REACH - REACH;
  const y = REACH - ((event.clientY - box.top) / box.height) * 2 * REACH;
  return { x, y };
}

customElements.define('guidance-laboratory', GuidanceLaboratory);
