/** Samplers of points in the plane, from noise to data (chapter 01). */

/** The denoiser's predicted noise at x into `noise`, and the clean data x_0 that go with it into `clean`. */
function predict(x, eps, alphaBar, noise, clean) {
  eps(x, alphaBar, noise);
  for (let i = 0; i < 2; i++) {
    // x_0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)
    clean[i] = (x[i] - Math.sqrt(1 - alphaBar) * noise[i]) / Math.sqrt(alphaBar);
  }
}

// what a step works with: written anew for every point
const noise = [0, 0];
const clean = [0, 0];
const ahead = [0, 0];
const start = [0, 0];

/** x_{t-1} = sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev) eps, from what was predicted. */
function moveByDdim(x, alphaBarPrev) {
  for (let i = 0; i < 2; i++) x[i] = Math.sqrt(alphaBarPrev) * clean[i] + Math.sqrt(1 - alphaBarPrev) * noise[i];
}

/**
 * One step of each sampler, from alpha_bar to alphaBarPrev: x (2 numbers) is replaced.
 * eps(x, alphaBar, out) is the denoiser's predicted noise; z are two standard normal numbers.
 * @type {Object<string, {name: string, evaluations: number, step: Function}>}
 */
export const SAMPLERS = {
  ddim: {
    name: 'DDIM',
    evaluations: 1,
    step(x, eps, alphaBar, alphaBarPrev) {
      predict(x, eps, alphaBar, noise, clean);
      moveByDdim(x, alphaBarPrev);
    },
  },
  ddpm: {
    name: 'DDPM',
    evaluations: 1,
    step(x, eps, alphaBar, alphaBarPrev, z) {
      predict(x, eps, alphaBar, noise, clean);
      const beta = 1 - alphaBar / alphaBarPrev;
      const std = Math.sqrt(((1 - alphaBarPrev) / (1 - alphaBar)) * beta); // 0 at the last step
      const ofClean = (Math.sqrt(alphaBarPrev) * beta) / (1 - alphaBar);
      const ofNoisy = (Math.sqrt(1 - beta) * (1 - alphaBarPrev)) / (1 - alphaBar);
      for (let i = 0; i < 2; i++) x[i] = ofClean * clean[i] + ofNoisy * x[i] + std * z[i];
    },
  },
  second: {
    name: 'DPM-Solver++, second order',
    evaluations: 2,
    step(x, eps, alphaBar, alphaBarPrev) {
      // x / sigma moves by e^lambda x_0 d(lambda), sigma = sqrt(1 - alpha_bar), lambda = log(sqrt(alpha_bar) / sigma).
      // DDIM holds x_0 for a step; here it goes along a line from its value at one end to that at the other
      // (Lu et al. 2022, "DPM-Solver++", algorithm 1 with r = 1). The last step, to no noise, stays DDIM's.
      for (let i = 0; i < 2; i++) start[i] = x[i];
      predict(x, eps, alphaBar, noise, clean);
      moveByDdim(x, alphaBarPrev);
      if (alphaBarPrev === 1) return;
      predict(x, eps, alphaBarPrev, noise, ahead);
      const ratio = Math.sqrt(alphaBar / (1 - alphaBar)); // e^lambda
      const ratioPrev = Math.sqrt(alphaBarPrev / (1 - alphaBarPrev));
      const change = ratioPrev - ratio;
      const slope = ratioPrev - change / Math.log(ratioPrev / ratio);
      for (let i = 0; i < 2; i++) {
        const scaled = start[i] / Math.sqrt(1 - alphaBar) + change * clean[i] + slope * (ahead[i] - clean[i]);
        x[i] = Math.sqrt(1 - alphaBarPrev) * scaled;
      }
    },
  },
};

/** The denoiser of a way of guiding: eps = -sqrt(1 - alpha_bar) (base + w push). */
export function guidedEps(way, densities, w) {
  const out = { base: [0, 0], push: [0, 0] };
  return (x, alphaBar, noise) => {
    way.score(densities, x[0], x[1], alphaBar, out);
    for (let i = 0; i < 2; i++) noise[i] = -Math.sqrt(1 - alphaBar) * (out.base[i] + w * out.push[i]);
  };
}

/**
 * The paths of points.
 * @param {{step: Function}} sampler
 * @param {Function} eps as guidedEps gives it.
 * @param {import('../engine/diffusion.js').Schedule} schedule S steps.
 * @param {Float32Array} start (count, 2), standard normal.
 * @param {Float32Array} fresh (S, count, 2), the noise of each step, for samplers that add some.
 * @returns {Float32Array} (S + 1, count, 2): row S is the start, row 0 the end.
 */
export function samplePaths(sampler, eps, schedule, start, fresh) {
  const steps = schedule.numSteps;
  const count = start.length / 2;
  const paths = new Float32Array((steps + 1) * 2 * count);
  paths.set(start, steps * 2 * count);
  const x = [0, 0];
  const z = [0, 0];
  for (let step = steps - 1; step >= 0; step--) {
    const alphaBar = schedule.alphaBar[step];
    const alphaBarPrev = schedule.alphaBarPrev(step);
    for (let n = 0, to = 2 * step * count; n < count; n++, to += 2) {
      for (let i = 0; i < 2; i++) {
        x[i] = paths[to + 2 * count + i];
        z[i] = fresh[to + i];
      }
      sampler.step(x, eps, alphaBar, alphaBarPrev, z);
      for (let i = 0; i < 2; i++) paths[to + i] = x[i];
    }
  }
  return paths;
}
