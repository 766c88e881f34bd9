"""
projects/tutorial: the notebook runs from start to end, and its stored outputs are of such a run.

`python tests/test_notebook.py` runs it and stores the new outputs.
"""

import copy
import os
import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "projects" / "tutorial" / "mask_scores.ipynb"
MAX_BYTES = 700_000  # of the file: larger ones are slow to open on the web
SECONDS = 300  # for the slowest cell on a slow machine; all of them take about 20
# AP in points. Other CPUs round otherwise, which moves single detections over a threshold.
AP_TOLERANCE = 0.3


def execute(notebook, folder: Path):
    """
    Args:
        folder: the working directory, as Jupyter's is that of the notebook.

    Returns:
        a copy with the outputs of a fresh kernel of this very Python.
    """
    notebook = copy.deepcopy(notebook)
    for cell in code_cells(notebook):
        cell.update(outputs=[], execution_count=None)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=SECONDS,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    # Of no folder: a "python3" that is registered for the user may be another Python
    client.create_kernel_manager().kernel_spec_manager = KernelSpecManager(kernel_dirs=[])
    client.execute()
    notebook.metadata.language_info = {"name": "python"}  # without the version
    return notebook


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook) -> list:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def complaints(notebook) -> list:
    """Errors and warnings."""
    return [x for x in outputs(notebook) if x.output_type == "error" or x.get("name") == "stderr"]


def printed(notebook, cell_id: str) -> str:
    [cell] = [cell for cell in notebook.cells if cell.id == cell_id]
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def mask_aps(notebook) -> dict[str, list[float]]:
    """Ranking -> AP, AP50 and AP75, from the table that the notebook prints."""
    rows = re.findall(r"^(\w.*?)((?:  +\d+\.\d+){3})$", printed(notebook, "ap"), re.MULTILINE)
    return {name: [float(x) for x in numbers.split()] for name, numbers in rows}


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


@pytest.fixture(scope="module")
def executed(stored, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jupyter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        # Neither settings nor traces of the user's own Jupyter
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("JUPYTER_CONFIG_DIR", str(folder / "config"))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
        patch.setenv("TMPDIR", str(folder))  # where the notebook draws its data
        patch.delenv("MPLBACKEND", raising=False)
        return execute(stored, NOTEBOOK.parent)


def test_runs_without_warnings(executed):
    assert not complaints(executed)


def test_same_kinds_of_outputs_as_stored(stored, executed):
    def kinds(notebook):
        return [
            [sorted(output.get("data", {"text": ""})) for output in cell.outputs]
            for cell in code_cells(notebook)
        ]

    assert kinds(executed) == kinds(stored)


def test_same_ap_as_stored(stored, executed):
    aps = mask_aps(executed)
    assert list(aps) == ["class score", "mask score", "true IoU (ceiling)"]
    assert aps.keys() == mask_aps(stored).keys()
    for name, expected in mask_aps(stored).items():
        assert aps[name] == pytest.approx(expected, abs=AP_TOLERANCE), name


def test_text_is_true_of_the_ap(executed):
    by_class, by_mask, ceiling = mask_aps(executed).values()
    gain = [after - before for before, after in zip(by_class, by_mask)]
    assert gain[0] == pytest.approx(1, abs=0.5)  # "about one point of AP"
    assert gain[2] > gain[0]  # "it comes from the strict thresholds, as AP75 shows"
    assert gain[1] < 0.5  # "AP50 gains nothing"
    assert ceiling[0] > by_mask[0]


def test_stored_outputs_are_of_one_complete_run(stored):
    cells = code_cells(stored)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not complaints(stored)
    assert sum("image/png" in x.get("data", {}) for x in outputs(stored)) == 3


def test_stored_notebook_is_small_and_tells_nothing_of_the_machine(stored):
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    assert stored.metadata.keys() == {"kernelspec", "language_info"}
    assert stored.metadata.kernelspec.name == "python3"
    assert not [cell.id for cell in stored.cells if cell.metadata]
    texts = [x.get("text", "") + x.get("data", {}).get("text/plain", "") for x in outputs(stored)]
    assert not [text for text in texts if re.search(r"(^|\s|['\"])(/|[A-Z]:\\)\w", text)]


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    old = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.write(execute(old, NOTEBOOK.parent), NOTEBOOK)
