"""Training from an object store gives the same weights as training from a disk."""

from pathlib import Path

import pytest

from common.storage.files import parse_location
from tests.support.models import tiny_llava
from tests.support.object_store import BUCKET, Store
from tests.support.training import LiveTeacher, largest_difference, run_stages, stage, weights, write_mixed_dataset


def upload(directory: Path, address: str) -> str:
    for path in sorted(directory.iterdir()):
        parse_location(f"{address}/{path.name}").write_bytes(path.read_bytes())
    return address


@pytest.mark.slow
def test_shards_and_images_of_a_store_train_two_ranks_with_workers(tmp_path: Path, store: Store) -> None:
    dataset = write_mixed_dataset(tmp_path / "data", 24)
    student = tiny_llava(tmp_path / "student", num_layers=1)
    scores = LiveTeacher(student, dataset.parent).write_output(tmp_path / "scores", dataset, "kd", top_k=4)
    data_settings = {
        "disk": {"shards": str(scores), "image_root": str(dataset.parent)},
        "store": {
            "shards": upload(scores, f"s3://{BUCKET}/training/scores"),
            "image_root": upload(dataset.parent, f"s3://{BUCKET}/training/images"),
        },
    }
    store.clear()
    configs = [
        stage(
            tmp_path / name,
            student,
            trainable=["adapter", "language_model"],
            data={**data, "num_workers": 1},
            loss={"distillation": 1.0},
            optim={"max_steps": 4},
        )
        for name, data in data_settings.items()
    ]
    run_stages(configs, tmp_path / "scratch", num_ranks=2)
    assert largest_difference(weights(tmp_path / "disk"), weights(tmp_path / "store")) == 0.0
    assert store.count("GET", ".parquet") > 0
    assert store.count("GET", ".png") > 0
    assert store.count("PUT") == 0
