"""Shards that hold their images, so that no image folder is needed to read them."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.data.chat_encoding import ChatEncoder
from common.data.images import load_image
from common.errors import DataError
from common.shards.manifest import read_manifest, shard_path
from common.shards.score_shard import ShardFile
from precompute.logits.run import run_capture
from precompute.verify.dataset_diff import diff_dataset
from precompute.verify.logits import verify_logits
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config
from tests.support.outputs import first_problems, read_rows
from train.data.collator import Collator, StudentInputs
from train.data.image_cache import ImageCache
from train.data.sources import ShardSource


def test_shards_hold_the_image_files_byte_for_byte(tmp_path: Path, llava_dir: Path) -> None:
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 6), store_images=True)
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    assert verify_logits(config.output, config.dataset, progress=False).ok
    references = [
        image for number in range(2) for row in read_rows(config.output, number) for image in row.sample.images
    ]
    assert references
    for image in references:
        assert image.path is not None
        assert image.data == (tmp_path / image.path).read_bytes()


def test_the_scores_are_those_of_an_output_with_paths(tmp_path: Path, llava_dir: Path) -> None:
    outputs = []
    for store_images in (False, True):
        root = tmp_path / str(store_images)
        root.mkdir()
        config = make_config(root, llava_dir, conversation_records(root, 4), store_images=store_images)
        run_capture(config, progress=False, start_teacher=FakeTeacher)
        outputs.append(read_rows(config.output, 0))
    for one, two in zip(*outputs, strict=True):
        a, b = one.conversations[0].scores, two.conversations[0].scores
        assert a.ids.tolist() == b.ids.tolist()
        assert a.logprobs.tolist() == b.logprobs.tolist()


def test_training_needs_no_image_folder(tmp_path: Path, llava_dir: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    config = make_config(data, llava_dir, conversation_records(data, 4), store_images=True)
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    output = tmp_path / "out"
    shutil.move(data / "out", output)
    shutil.rmtree(data)
    for row in ShardFile(shard_path(output, 0), read_manifest(output), 0):
        for image in row.sample.images:
            assert load_image(image, None, "pad", (0, 0, 0), row.sample.id).size[0] > 0


def test_an_image_that_vanishes_between_check_and_use_is_named(tmp_path: Path, llava_dir: Path) -> None:
    records = conversation_records(tmp_path, 4)
    config = make_config(tmp_path, llava_dir, records, store_images=True, preflight=False)
    name = next(record["image"] for record in records if "image" in record)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name} does not exist"):
        run_capture(config, progress=False, start_teacher=FakeTeacher)


def _embedded(tmp_path: Path, n: int = 4) -> Path:
    """Writes a Parquet file whose images are inside, as `datasets` saves them."""
    records = conversation_records(tmp_path / "files", n)
    rows = []
    for record in records:
        names = record.pop("image", [])
        paths = [names] if isinstance(names, str) else names
        images = [{"bytes": (tmp_path / "files" / name).read_bytes(), "path": name} for name in paths]
        rows.append({**record, "images": images})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    shutil.rmtree(tmp_path / "files")
    return tmp_path / "data.parquet"


def test_images_inside_a_dataset_are_stored_and_trained_on(tmp_path: Path, llava_dir: Path) -> None:
    dataset = _embedded(tmp_path)
    config = make_config(tmp_path, llava_dir, [], dataset=dataset, image_root=None)
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    rows = read_rows(config.output, 0)
    assert [len(row.sample.images) for row in rows] == [0, 1, 2, 0]
    assert all(ref.data for row in rows for ref in row.sample.images)
    assert verify_logits(config.output, dataset, progress=False).ok
    assert diff_dataset(config.output, dataset, progress=False).num_unchanged == 4
    source = ShardSource(config.output, ChatEncoder.load(llava_dir), "pad")
    images = ImageCache.load(llava_dir, "pad")
    assert images is not None
    student = StudentInputs(images, ChatEncoder.load(llava_dir).image_token_id, 0)
    batch = Collator(student, kind="kd", image_root=None, max_tokens=512)([source[i] for i in range(4)])
    assert len(batch.images["pixel_values"]) == 3
    # Another picture inside the dataset is a change, although it has the same name.
    table = pq.read_table(dataset).to_pylist()
    data = table[1]["images"][0]["bytes"]
    table[1]["images"][0]["bytes"] = data[:-8] + bytes(8)
    pq.write_table(pa.Table.from_pylist(table), dataset)
    (changed,) = diff_dataset(config.output, dataset, progress=False).changed
    assert (changed.id, changed.what) == ("s1", ("images",))
    problems = first_problems(verify_logits(config.output, dataset, progress=False))
    assert "dataset" in problems
