"""Keep nbgrader's menus out of JupyterLab, in which learners work; `make formgrader` opens its pages.

    python tools/quiet_jupyter.py

It concerns the environment of the Python that runs it. `tools/install.sh` calls it.
"""

from jupyter_server.extension.serverextension import toggle_server_extension_python
from jupyterlab.commands import disable_extension

# what nbgrader brings, and the notebook application that it requires
IN_THE_BROWSER = ("@jupyter/nbgrader", "@jupyter-notebook/lab-extension")
IN_THE_SERVER = ("formgrader", "validate_assignment", "assignment_list", "course_list")


def main() -> None:
    for name in IN_THE_BROWSER:
        disable_extension(name, level="sys_prefix")
    for name in IN_THE_SERVER:
        toggle_server_extension_python(
            f"nbgrader.server_extensions.{name}", enabled=False, parent=None, sys_prefix=True
        )


if __name__ == "__main__":
    main()
