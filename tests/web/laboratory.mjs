// Computes the laboratory's mathematics in node: a job as JSON on stdin, the numbers as JSON on stdout.
// tests/test_web_laboratory.py makes the job and compares with the course's own functions.

import { readFileSync } from 'node:fs';
import { Schedule, cosineBetas } from '../../web/engine/diffusion.js';
import { WAYS, canBeNormalised, logTilted } from '../../web/laboratory/guidance.js';
import { GridDensity, histogram, shareOf, spreadOf } from '../../web/laboratory/measure.js';
import { Densities, Mixture } from '../../web/laboratory/mixture.js';
import { SAMPLERS, guidedEps, samplePaths } from '../../web/laboratory/samplers.js';

const job = JSON.parse(readFileSync(0, 'utf8'));
const densities = new Densities(job.components, job.label, job.blur);
const whole = Schedule.fromBetas(cosineBetas(1000));

function mixtureAt(mixture, alphaBar) {
  const logs = job.points.map(([x, y]) => mixture.at(x, y, alphaBar));
  const scores = job.points.map(([x, y]) => (mixture.at(x, y, alphaBar), [...mixture.gradient]));
  return { logs, scores };
}

function guidedScores(way, alphaBar) {
  const out = { base: [0, 0], push: [0, 0] };
  return job.points.map(([x, y]) => {
    way.score(densities, x, y, alphaBar, out);
    return [0, 1].map((i) => out.base[i] + job.w * out.push[i]);
  });
}

function ends(sampler, way, steps) {
  const schedule = whole.respace(steps);
  const start = Float32Array.from(job.start.flat());
  const fresh = Float32Array.from(job.fresh.slice(0, steps).flat(2));
  const paths = samplePaths(SAMPLERS[sampler], guidedEps(WAYS[way], densities, job.w), schedule, start, fresh);
  return paths.slice(0, start.length);
}

const grid = new GridDensity((x, y) => logTilted(WAYS.free, densities, job.w, x, y), job.reach, job.size);
const flat = Float32Array.from(job.points.flat());
const [level] = grid.levels([0.5]);
const isInClass = (x, y) => densities.isInClass(x, y);
const results = {
  own: job.levels.map((alphaBar) => mixtureAt(densities.own, alphaBar)),
  all: job.levels.map((alphaBar) => mixtureAt(densities.all, alphaBar)),
  blurred: mixtureAt(new Mixture(job.components, 0.3), 0.5),
  logClass: job.levels.map((alphaBar) => job.points.map(([x, y]) => densities.logClass(x, y, alphaBar))),
  ways: Object.fromEntries(
    Object.entries(WAYS).map(([name, way]) => [name, job.levels.map((alphaBar) => guidedScores(way, alphaBar))]),
  ),
  tilted: Object.fromEntries(
    Object.entries(WAYS).map(([name, way]) => [name, job.points.map(([x, y]) => logTilted(way, densities, job.w, x, y))]),
  ),
  normalised: job.normal.map(({ components, way, w }) => canBeNormalised(WAYS[way], new Densities(components, 0, 0.3), w)),
  ends: Object.fromEntries(
    Object.keys(SAMPLERS).map((sampler) => [sampler, job.steps.map((steps) => ends(sampler, 'free', steps))]),
  ),
  grid: { values: grid.values, marginal: grid.marginal(), spread: grid.spread(), share: grid.shareOf(isInClass), distance: grid.distanceFrom(flat) },
  contour: { level, segments: grid.contour(level) },
  spread: spreadOf(flat),
  share: shareOf(flat, isInClass),
  histogram: histogram(flat, job.reach, 7),
};
process.stdout.write(JSON.stringify(results, (_, value) => (ArrayBuffer.isView(value) ? Array.from(value) : value)));
