"""Every notebook runs from top to bottom in this Python, whatever kernels are installed on the machine.

What a notebook shows and asserts is seen in fewer steps too: those of PARAMETERS follow its cell tagged `parameters`.
"""

from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

PARAMETERS = {"01_tour": "STEPS = 20"}
NOTEBOOKS = sorted(Path(__file__).parents[2].joinpath("notebooks").glob("*.ipynb"))


class ThisPython(AsyncKernelManager):
    """Starts ipykernel's own "python3", which is the running interpreter, and no kernel that is registered."""

    def _kernel_spec_manager_default(self):
        return KernelSpecManager(kernel_dirs=[])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    if path.stem in PARAMETERS:
        tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
        after = tags.index(["parameters"]) + 1
        notebook.cells.insert(after, nbformat.v4.new_code_cell(PARAMETERS[path.stem]))
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        kernel_manager_class=ThisPython,
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        client.execute()
    except CellExecutionError as error:
        pytest.fail(str(error), pytrace=False)


def test_there_is_a_notebook():
    assert NOTEBOOKS
