"""Build what runs in the browser, from web/ and the checkpoints.

    python tools/web.py playground    pages that run from their files: build/playground/index.html
    python tools/web.py kernel        web/engine/kernel.js from kernel.wat, by wabt in web/node_modules

The sources are JavaScript modules. A browser loads no modules from files, so what a page needs is bundled
into one classic script; and a worker starts from a text, so the worker's bundle is a text in the page's.
Weights become scripts as well: a page loads them in the same way from a server and from files, when asked to.
"""

import argparse
import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

from course import ROOT, CourseError
from guided_strips import guided_strips

WEB = ROOT / "web"
BUILD = ROOT / "build" / "playground"
WEIGHTS = (  # what the playground draws and reads with
    "conditional_ddpm_shapes32",
    "reader_shapes32",
    "text_to_image_shapes64",
    "vae_shapes64",
    "reader_shapes64",
    "reader_scenes64",
)
KERNEL = """\
// kernel.wat, assembled by `make kernel`: do not edit.
export const KERNEL =
  '{base64}';
"""

IMPORT = re.compile(r"^import (?:\{([^}]*)\} from )?'(\.[^']*)';$", re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async )?(?:class|const|function\*?) (\w+))", re.MULTILINE)
LEFT_OVER = re.compile(r"^(?:import|export)\b.*", re.MULTILINE)


def bundle(entry: Path) -> str:
    """A module and all that it imports, as one classic script.

    Each module becomes a function that returns its exports, so that names of different modules do not meet.
    Only `import './x.js';`, `import { a, b } from './x.js';`, and `export` in front of a class, a function or
    a const are known.

    Raises:
        CourseError: another form of import or export, a missing file, or modules that import each other.
    """
    done: dict[Path, str] = {}

    def add(module: Path, importers: tuple[Path, ...]) -> None:
        if module in importers:
            raise CourseError(f"{_name(module)} imports itself by way of {_name(importers[-1])}")
        if module in done:
            return
        if not module.is_file():
            raise CourseError(f"{_name(importers[-1])} imports {_name(module)}, which does not exist")
        source = module.read_text(encoding="utf-8")
        for _, path in IMPORT.findall(source):
            add((module.parent / path).resolve(), (*importers, module))

        def constants(match: re.Match) -> str:
            if match[1] is None:  # imported for what it does
                return ""
            names = re.sub(r"\s+", " ", match[1].replace(" as ", ": ")).strip()
            return f"const {{ {names} }} = modules['{_name((module.parent / match[2]).resolve())}'];"

        exports = ", ".join(EXPORT.findall(source))
        body = EXPORT.sub("", IMPORT.sub(constants, source))
        if unknown := LEFT_OVER.search(body):
            raise CourseError(f"{_name(module)}: cannot bundle `{unknown[0]}`")
        done[module] = f"modules['{_name(module)}'] = (() => {{\n{body}\nreturn {{ {exports} }};\n}})();\n"

    add(entry.resolve(), ())
    return "(() => {\n'use strict';\nconst modules = {};\n" + "".join(done.values()) + "})();\n"


def _name(module: Path) -> str:
    return (
        module.relative_to(WEB.resolve()).as_posix() if module.is_relative_to(WEB.resolve()) else str(module)
    )


def script_constant(table: str, name: str, value: object) -> str:
    """A script that enters a value, as JSON, into a global table of the page."""
    return f"(globalThis.{table} ??= {{}}).{name} = {json.dumps(value, separators=(',', ':'))};\n"


def weights_script(name: str) -> str:
    """A script that gives the page a checkpoint: the settings of its card, and its file in base64."""
    folder = ROOT / "data" / "checkpoints"
    card = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    file = base64.b64encode((folder / f"{name}.safetensors").read_bytes()).decode()
    return script_constant("LECTURE26_WEIGHTS", name, {"settings": card["settings"], "base64": file})


def assemble_kernel() -> None:
    """Write kernel.js from kernel.wat."""
    assembler = WEB / "node_modules" / ".bin" / "wat2wasm"
    if not assembler.exists():
        raise CourseError("the assembler is missing: run `npm ci` in web/")
    binary = BUILD / "kernel.wasm"
    binary.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([assembler, WEB / "engine" / "kernel.wat", "-o", binary], check=True)
    text = KERNEL.format(base64=base64.b64encode(binary.read_bytes()).decode())
    (WEB / "engine" / "kernel.js").write_text(text, encoding="utf-8")


def build_playground(folder: Path = BUILD) -> Path:
    """Write the pages, what they run, and the weights into a folder; return the first page."""
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    worker = script_constant("LECTURE26", "worker", bundle(WEB / "worker" / "worker.js"))
    for name in ("laboratory", "playground"):
        code = bundle(WEB / name / f"{name}.js")
        (folder / f"{name}.js").write_text(worker * (name == "playground") + code, encoding="utf-8")
    for file in [*(WEB / "style").glob("*.css"), *(WEB / "pages").glob("*.html")]:
        shutil.copy(file, folder / file.name)
    strips = guided_strips(folder / "guided_strips.json")
    (folder / "strips.js").write_text(script_constant("LECTURE26", "strips", strips), encoding="utf-8")
    for name in WEIGHTS:
        (folder / "weights" / f"{name}.js").write_text(weights_script(name), encoding="utf-8")
    return folder / "index.html"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("playground", "kernel"))
    arguments = parser.parse_args()
    try:
        if arguments.what == "kernel":
            assemble_kernel()
        else:
            page = build_playground()
            print(f"playground: open {page.relative_to(ROOT)} in a browser")
    except CourseError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
