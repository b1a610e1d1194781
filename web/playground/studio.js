/** The page's side of the worker: it loads the weights when they are first needed, and asks for drawings. */

const BASE = new URL('.', document.currentScript.src); // where this script lies, with weights/ beside it

const CHECKPOINTS = {
  class: { denoiser: 'conditional_ddpm_shapes32', reader: 'reader_shapes32' },
  text: {
    denoiser: 'text_to_image_shapes64',
    vae: 'vae_shapes64',
    shapesReader: 'reader_shapes64',
    scenesReader: 'reader_scenes64',
  },
};

let worker = null;
let jobs = 0;
const listeners = new Map(); // of the jobs whose answers are still wanted

/** The one worker of the page. It starts from a text: from files, a browser starts none by its address. */
function theWorker() {
  if (worker) return worker;
  const source = new Blob([globalThis.LECTURE26.worker], { type: 'text/javascript' });
  worker = new Worker(URL.createObjectURL(source));
  worker.onmessage = ({ data }) => listeners.get(data.job)?.(data);
  return worker;
}

const notLoaded = (path) =>
  new Error(`${path} could not be loaded. Is the connection there, and the site complete? The next try loads it again.`);

/** Run a script of the site. */
function loadScript(path) {
  return new Promise((resolve, reject) => {
    const script = document.createElement('script');
    script.src = new URL(path, BASE).href;
    script.onload = resolve;
    script.onerror = () => reject(notLoaded(path));
    document.head.append(script);
  });
}

/** A value that a script of the site has entered into a table; the script is loaded if it has not been. */
export async function siteValue(table, name, path) {
  if (!globalThis[table]?.[name]) await loadScript(path);
  if (!globalThis[table]?.[name]) throw notLoaded(path); // what was sent is something else
  return globalThis[table][name];
}

/** The networks of one kind, in the worker. */
export class Studio {
  /** @param {'class' | 'text'} model */
  constructor(model) {
    this.model = model;
    this.job = null;
  }

  /** Loads everything, the first time; `isFast` says then whether the kernel runs. */
  load() {
    this.loading ??= this.loadAll().catch((error) => {
      this.loading = null; // so that it can be tried again
      throw error;
    });
    return this.loading;
  }

  async loadAll() {
    const checkpoints = {};
    for (const [part, name] of Object.entries(CHECKPOINTS[this.model])) {
      checkpoints[part] = await siteValue('LECTURE26_WEIGHTS', name, `weights/${name}.js`);
      delete globalThis.LECTURE26_WEIGHTS[name]; // the worker has its own copy
    }
    await new Promise((resolve, reject) => {
      this.send('load', { checkpoints }, (message) => {
        if (message.kind === 'error') reject(new Error(message.text));
        else resolve((this.isFast = message.isFast));
      });
    });
  }

  /**
   * Draw; an older drawing stops.
   * @param {object} wish `seeds` and `ws` of the images, `steps`, and what the model's `draw` takes.
   * @param {(message: object) => void} listen is told of each step, and of the end.
   */
  draw(wish, listen) {
    this.send('draw', { wish }, listen);
  }

  send(kind, content, listen) {
    listeners.delete(this.job);
    this.job = ++jobs;
    listeners.set(this.job, listen);
    theWorker().postMessage({ job: this.job, model: this.model, kind, ...content });
  }
}

const studios = {};

/** The studio of a model, one for the whole page. */
export const studioOf = (model) => (studios[model] ??= new Studio(model));
