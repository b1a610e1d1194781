"""Fetch what slides, site and tests need from npm: pinned versions, held to their SHA-512, kept in build/npm.

Nothing of it is committed. `npm` fetches where it is installed, since it knows the proxies and mirrors of
whoever calls it; otherwise the address in NPM_CONFIG_REGISTRY, or the public registry, is asked.
"""

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from course import CourseError
from lecture26.kit.files import replace_when_complete

PUBLIC_REGISTRY = "https://registry.npmjs.org"
PATIENCE = 120  # seconds until a server that says nothing is given up


class NotFetched(CourseError):
    """A package is not in the cache, and no registry could be reached."""


@dataclass(frozen=True)
class Package:
    """One version of an npm package; `sha512` of its archive as `npm view NAME dist.integrity` tells it."""

    name: str
    version: str
    sha512: str

    @property
    def archive(self) -> str:
        return f"{self.name}-{self.version}.tgz"


REVEAL = Package(
    "reveal.js",
    "6.0.2",
    "JYIg5D9aoxoaLeb84O+OvAwsKWdIavVgEDScxtYEXFCT6t6TQrhNtSgogcjdCpdLsWglhJn3zyE3fUOwiH5KEg==",
)
MATHJAX = Package(
    "mathjax",
    "3.2.2",
    "Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw==",
)
AXE = Package(
    "axe-core",
    "4.14.1",
    "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==",
)


def fetched(package: Package, cache: Path) -> Path:
    """The archive of a package in a folder, fetched if it is not there; any but the pinned one is refused."""
    archive = cache / package.archive
    if archive.exists() and is_pinned(archive, package):
        return archive
    with TemporaryDirectory() as folder:
        fresh = fetch(package, Path(folder))
        if not is_pinned(fresh, package):
            raise CourseError(
                f"{package.archive} as fetched is not the pinned one: its SHA-512 differs from tools/npm.py's"
            )
        with replace_when_complete(archive) as temporary:
            shutil.copyfile(fresh, temporary)
    return archive


def is_pinned(archive: Path, package: Package) -> bool:
    """Whether a file is the package's archive, bit for bit."""
    return base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() == package.sha512


def fetch(package: Package, folder: Path) -> Path:
    """Download a package's archive into a folder."""
    archive = folder / package.archive
    try:
        if npm := shutil.which("npm"):
            command = [npm, "pack", f"{package.name}@{package.version}", "--pack-destination", str(folder)]
            subprocess.run(command, check=True, capture_output=True, text=True)
        else:
            registry = os.environ.get("NPM_CONFIG_REGISTRY", PUBLIC_REGISTRY).rstrip("/")
            address = f"{registry}/{package.name}/-/{package.archive}"
            with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
                archive.write_bytes(answer.read())
    except (subprocess.CalledProcessError, urllib.error.URLError, TimeoutError, ValueError) as error:
        said = "\n  ".join((getattr(error, "stderr", None) or str(error)).splitlines()[:4])
        raise NotFetched(
            f"{package.name} {package.version} could not be fetched from npm, and is not in the cache yet."
            f" The first time this needs a network, later it does not.\n  {said}"
        ) from None
    return archive


def unpack(archive: Path, members: dict[str, str], folder: Path) -> None:
    """Write some files of an archive into a folder; `members`: path in the package, name in the folder."""
    with tarfile.open(archive) as files:
        for path, name in members.items():
            (folder / name).write_bytes(files.extractfile(f"package/{path}").read())
