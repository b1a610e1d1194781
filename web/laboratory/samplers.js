/** Samplers of points in the plane, from noise to data (chapter 01). */

/** The predicted clean data, x_0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar). */
function cleanOf(x, eps, alphaBar) {
  const noise = [0, 0];
  eps(x, alphaBar, noise);
  return x.map((value, i) => (value - Math.sqrt(1 - alphaBar) * noise[i]) / Math.sqrt(alphaBar));
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
    step(x, eps, { alphaBar, alphaBarPrev }) {
      const clean = cleanOf(x, eps, alphaBar);
      for (const i of [0, 1]) {
        // x_{t-1} = sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev) eps
        const noise = (x[i] - Math.sqrt(alphaBar) * clean[i]) / Math.sqrt(1 - alphaBar);
        x[i] = Math.sqrt(alphaBarPrev) * clean[i] + Math.sqrt(1 - alphaBarPrev) * noise;
      }
    },
  },
  ddpm: {
    name: 'DDPM',
    evaluations: 1,
    step(x, eps, { alphaBar, alphaBarPrev }, z) {
      const clean = cleanOf(x, eps, alphaBar);
      const beta = 1 - alphaBar / alphaBarPrev;
      const variance = ((1 - alphaBarPrev) / (1 - alphaBar)) * beta; // 0 at the last step
      for (const i of [0, 1]) {
        const ofClean = (Math.sqrt(alphaBarPrev) * beta) / (1 - alphaBar);
        const ofNoisy = (Math.sqrt(1 - beta) * (1 - alphaBarPrev)) / (1 - alphaBar);
        x[i] = ofClean * clean[i] + ofNoisy * x[i] + Math.sqrt(variance) * z[i];
      }
    },
  },
  second: {
    name: 'DPM-Solver++, second order',
    evaluations: 2,
    step(x, eps, { alphaBar, alphaBarPrev }) {
      // x / sigma moves by e^lambda x_0 d(lambda), sigma = sqrt(1 - alpha_bar), lambda = log(sqrt(alpha_bar) / sigma).
      // DDIM holds x_0 for a step; here it goes along a line from its value at one end to that at the other
      // (Lu et al. 2022, "DPM-Solver++", algorithm 1 with r = 1). The last step, to no noise, stays DDIM's.
      const clean = cleanOf(x, eps, alphaBar);
      const start = [...x];
      SAMPLERS.ddim.step(x, eps, { alphaBar, alphaBarPrev });
      if (alphaBarPrev === 1) return;
      const ahead = cleanOf(x, eps, alphaBarPrev);
      const [ratio, ratioPrev] = [alphaBar, alphaBarPrev].map((kept) => Math.sqrt(kept / (1 - kept))); // e^lambda
      const change = ratioPrev - ratio;
      const slope = ratioPrev - change / Math.log(ratioPrev / ratio);
      for (const i of [0, 1]) {
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
    for (const i of [0, 1]) noise[i] = -Math.sqrt(1 - alphaBar) * (out.base[i] + w * out.push[i]);
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
  for (let step = steps - 1; step >= 0; step--) {
    const levels = { alphaBar: schedule.alphaBar[step], alphaBarPrev: schedule.alphaBarPrev(step) };
    for (let n = 0; n < count; n++) {
      const from = ((step + 1) * count + n) * 2;
      const x = [paths[from], paths[from + 1]];
      const noise = (step * count + n) * 2;
      sampler.step(x, eps, levels, [fresh[noise], fresh[noise + 1]]);
      paths[from - 2 * count] = x[0];
      paths[from - 2 * count + 1] = x[1];
    }
  }
  return paths;
}
