"""What a training logs, and when."""

import json

import pytest

from tests.helpers.toy_training import run, write_dataset, write_lazy_config

pytestmark = pytest.mark.usefixtures("leave_no_traces")


def test_each_evaluation_is_logged_whatever_the_log_period(tmp_path):
    config = write_lazy_config(tmp_path / "lazy.yaml")
    output = tmp_path / "output"
    periods = ["train.eval_period=2", "train.log_period=100"]
    dataset = write_dataset(tmp_path)
    run("--config-file", config, *dataset, *periods, f"train.output_dir={output}")
    lines = map(json.loads, (output / "metrics.json").read_text().splitlines())
    evaluated = [x["iteration"] for x in lines if "segm/AP" in x]
    assert sorted(set(evaluated)) == [1, 3, 6]  # Detectron2 counts the last one as after the end
    assert len(evaluated) == 3
