/** Small parts that the elements of the playground are made of. */

/** Show an image, (3, side, side) in [-1, 1], on a canvas. */
export function paintImage(canvas, image) {
  const places = image.length / 3;
  const side = Math.sqrt(places);
  if (canvas.width !== side) canvas.width = canvas.height = side;
  const pen = canvas.getContext('2d');
  const picture = pen.createImageData(side, side);
  for (let i = 0; i < places; i++) {
    for (let c = 0; c < 3; c++) {
      picture.data[4 * i + c] = Math.round((Math.max(-1, Math.min(1, image[c * places + i])) + 1) * 127.5);
    }
    picture.data[4 * i + 3] = 255;
  }
  pen.putImageData(picture, 0, 0);
}

/** Three of a latent's channels as red, green and blue, three standard deviations wide. */
export const latentColours = (latent) => latent.slice(0, (3 * latent.length) / 4).map((value) => value / 3);

/** A slider with its name and its value, and perhaps something below it. */
export function slider(name, text, { min, max, step, value, below = '' }) {
  // the output comes behind the input, since a label names the first of them
  return `<label class="slider">${text}
    <input type="range" name="${name}" min="${min}" max="${max}" step="${step}" value="${value}">
    <output name="${name}">${value}</output>${below}</label>`;
}

/** The slider for the weight w, from -1 to 8. */
export function weightSlider(step, value) {
  const marks = '<span style="left:0">−1</span><span style="left:11.1%">0: not guided</span><span style="left:100%">8</span>';
  const below = `<span class="marks" aria-hidden="true">${marks}</span>`;
  return slider('w', 'strength of guidance w', { min: -1, max: 8, step, value, below });
}

/** What is below a picture, while it is drawn and when it is done. */
export const caption = (during, after) =>
  `<figcaption><span class="during">${during}</span><span class="after">${after}</span></figcaption>`;

/** One of several choices. */
export function choice(name, value, text, isChosen = false) {
  return `<label class="choice"><input type="radio" name="${name}" value="${value}" ${isChosen ? 'checked' : ''}>
    <span>${text}</span></label>`;
}

/** A number as the course writes it: a real minus, and a decimal only where there is one. */
export const numberText = (value) => String(value).replace('-', '−');
