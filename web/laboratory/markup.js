/** The laboratory's elements. */

const radio = (name, value, text, isChosen) =>
  `<label class="choice"><input type="radio" name="${name}" value="${value}" ${isChosen ? 'checked' : ''}><span>${text}</span></label>`;

const check = (name, text, isChosen) =>
  `<label class="check"><input type="checkbox" name="${name}" ${isChosen ? 'checked' : ''}>${text}</label>`;

function panel(name, way) {
  return `
    <figure class="panel" data-way="${name}">
      <h3>${way.name}</h3>
      <div class="plane"><canvas role="img" aria-label="${way.name}: points on their way from noise to data, the scores as arrows, and at the end the tilted density as contours"></canvas></div>
      <canvas class="marginal" role="img" aria-label="Where the points end, from left to right: as bars; the tilted density as a line, the class as a dashed line"></canvas>
      <figcaption>
        <p class="formula">${way.formula}</p>
        <dl>
          <dt>in the class</dt><dd data-fact="share"></dd>
          <dt>spread of the ends</dt><dd data-fact="spread"></dd>
          <dt>of the tilted</dt><dd data-fact="tilted"></dd>
        </dl>
        <p class="note">${way.note}</p>
      </figcaption>
    </figure>`;
}

/** All of it, as HTML. */
export function markup(ways, panels, samplers, labels) {
  const dot = (label) => `<i class="dot" data-label="${label}"></i>`;
  return `
    <div class="head">
      <label class="slider strength">strength of guidance w
        <input type="range" name="w" min="-1" max="8" step="0.1" value="2"><output name="w"></output>
        <span class="marks" aria-hidden="true"><span>−1: nothing asked</span><span>0: not guided</span><span></span><span></span><span></span><span>8</span></span>
      </label>
      <fieldset><legend>What is asked for</legend><div class="choices">
        ${labels.map((name, label) => radio('label', label, `${dot(label)}${name}`, label === 0)).join('')}
      </div></fieldset>
      <div class="row"><button type="button" class="go" data-do="play">Pause</button><button type="button" data-do="noise">New noise</button></div>
    </div>
    <div class="panels">
      <figure class="panel data">
        <h3>The data</h3>
        <div class="plane"><canvas role="img" aria-label="The density of the data: four round clusters, two of each class"></canvas></div>
        <figcaption><p>Drag the clusters, or move them with the arrow keys; + and − change their spread.
          Every network here is replaced by the exact answer, so what goes wrong at large w is guidance itself.</p>
          <p class="row"><button type="button" data-do="reset">Put them back</button></p></figcaption>
      </figure>
      ${panels.map((name) => panel(name, ways[name])).join('')}
    </div>
    <p class="key">
      <span><svg viewBox="0 0 34 18" aria-hidden="true"><g fill="currentColor"><rect x="4" y="5" width="4" height="4"/><rect x="15" y="9" width="4" height="4"/><rect x="26" y="4" width="4" height="4"/></g></svg>samples</span>
      <span><svg viewBox="0 0 34 18" aria-hidden="true"><path d="M3 12q14-16 28 0" fill="none" stroke="currentColor" stroke-width="2"/></svg><span>tilted density, proportional to q(x | y) (q(x | y) / q(x))<sup>w</sup> for classifier-free guidance: half of it and nine tenths are inside</span></span>
      <span><svg viewBox="0 0 34 18" aria-hidden="true"><path d="M3 9h26m-6-5 6 5-6 5" fill="none" stroke="var(--warm)" stroke-width="2"/></svg>score that is followed</span>
      <span><svg viewBox="0 0 34 18" aria-hidden="true"><path d="M3 14q14-18 28 0" fill="none" stroke="currentColor" stroke-width="2" stroke-dasharray="4 3"/></svg>in the small plots, the class itself</span>
    </p>
    <div class="foot">
      <label class="slider">time <input type="range" name="time" min="0" max="40" step="any" value="0"><output name="time"></output></label>
      <label class="slider">steps <input type="range" name="steps" min="5" max="80" step="1" value="40"><output name="steps"></output></label>
      <fieldset><legend>Sampler</legend><div class="choices">
        ${Object.entries(samplers).map(([name, sampler]) => radio('sampler', name, sampler.name, name === 'ddim')).join('')}
      </div></fieldset>
      <div class="row" style="gap:.3rem 1.1rem">
        ${check('arrows', 'arrows', true)}${check('trails', 'paths', true)}${check('tilted', 'tilted density', true)}${check('clean', 'a classifier of clean points', false)}
      </div>
    </div>`;
}
