"""How tests run the browser's JavaScript: in node, which gets a job as JSON and answers in JSON."""

import json
import shutil
import subprocess

import pytest

from course import ROOT


def run_in_node(script, job):
    """What tests/web/`script` answers to a job; skips the test where there is no node.

    Raises:
        AssertionError: if the script fails, with what it said.
    """
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node (nodejs.org, or the package nodejs) to run the browser's code")
    path = ROOT / "tests" / "web" / script
    done = subprocess.run([node, path], input=json.dumps(job), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
