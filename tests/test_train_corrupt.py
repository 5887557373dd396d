"""Corrupt samples: each is named, logged once and replaced, up to a limit; no other sample changes."""

import json
import shutil
from functools import partial

import pytest
import torch
import trainer

from tessel.train.data.loader import Loader, SeededDataset
from tessel.train.data.sampler import RepeatedAugSampler
from tessel.train.data.sources.folder import ImageFolder
from tessel.train.errors import UserError
from tessel.train.recipe.schema import Guard

CORRUPT_FILES = "class_0/3.png", "class_2/7.png"
LIMIT = "guard.max_corrupt=2"


class Numbers:
    """A data set whose images hold their index and whose targets are dicts; the samples `bad` cannot be read."""

    def __init__(self, *bad):
        self.bad = bad

    def __len__(self):
        return 20

    def __getitem__(self, index):
        torch.rand(1)
        if index in self.bad:
            raise UserError(f"scene {index} is torn")
        return torch.full((2,), float(index)), {"boxes": torch.tensor([index])}


def jittered(image, target):
    return image + torch.rand(2) / 2, target


def order(repeats=1):
    sizes = {"micro_batch": 5, "accumulate": 1, "rank": 0, "world_size": 1}
    return RepeatedAugSampler(repeats=repeats, length=20, seed=3, start=0, stop=60, **sizes)


def load_samples(dataset, repeats=1, max_retries=3, workers=0):
    """(image, index) of 60 samples, and the reasons of the failures by index."""
    stream = order(repeats)
    seeded = SeededDataset(dataset, jittered, 1, order=stream, max_retries=max_retries)
    loader = Loader(seeded, stream, workers=workers, prefetch=2, pin=False)
    batches = list(loader)
    loader.close()
    assert all(len(batch[0]) == 5 for batch in batches)
    pairs = [pair for batch in batches for pair in zip(batch[0].tolist(), batch[2].tolist(), strict=True)]
    return pairs, loader.failures


@pytest.mark.parametrize("repeats", [1, 3])
def test_only_unreadable_samples_are_replaced_by_the_next_of_the_epoch(repeats):
    epochs = [[index for _, index in load_samples(Numbers())[0][at : at + 20]] for at in (0, 20, 40)]
    bad = epochs[0][0], epochs[0][4], epochs[0][5]
    whole, (replaced, failures) = load_samples(Numbers(), repeats)[0], load_samples(Numbers(*bad), repeats)
    assert failures == {index: f"scene {index} is torn" for index in bad}
    keys = [key for batch in order(repeats) for key in batch]
    assert len(keys) == len(whole) == 60
    for (epoch, index), before, after in zip(keys, whole, replaced, strict=True):
        assert before[1] == index
        if index not in bad:
            assert after == before
            continue
        good = [i for i in 2 * epochs[epoch // repeats] if i not in bad or i == index]
        assert after[1] == good[good.index(index) + 1]
        # the substitute gets the random numbers of the unreadable sample
        noise = [value - index for value in before[0]]
        assert after[0] == pytest.approx([after[1] + value for value in noise], abs=1e-5)


def test_workers_do_not_change_the_samples():
    assert load_samples(Numbers(2, 11)) == load_samples(Numbers(2, 11), workers=2)


def test_batch_without_readable_substitutes_is_an_error():
    for max_retries in (0, 3):
        stream = order()
        loader = Loader(
            SeededDataset(Numbers(*range(20)), jittered, 1, order=stream, max_retries=max_retries),
            stream,
            workers=0,
            prefetch=2,
            pin=False,
        )
        with pytest.raises(UserError, match=r"scene \d+ is torn"):
            next(loader)
        assert len(loader.failures) >= max_retries + 1


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = trainer.draw_folder(tmp_path_factory.mktemp("corrupt") / "images")
    for corrupt in CORRUPT_FILES:
        path = root / "train" / corrupt
        path.write_bytes(path.read_bytes()[:60])
    return root


def write_recipe(folder, images):
    # a model without batch statistics, so that the number of processes does not change the result
    return trainer.write_recipe(
        folder / "tiny.yaml", data={"root": str(images), "micro_batch": 2}, model={"name": "test_convnext"}
    )


@pytest.fixture
def recipe(tmp_path, images):
    return write_recipe(tmp_path, images)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, images):
    recipe = write_recipe(tmp_path_factory.mktemp("straight"), images)
    assert trainer.train(recipe, LIMIT) == 0
    return recipe.parent / "runs/tiny"


def corrupt_log(run):
    return [json.loads(line) for line in (run / "corrupt.jsonl").read_text().splitlines()]


def test_corrupt_samples_are_logged_once(straight, images):
    """Two epochs give one entry per file in the run directory and in the checkpoints."""
    found = corrupt_log(straight)
    paths = [path.decode() for path in ImageFolder(images / "train").paths]
    assert {paths[entry["index"]] for entry in found} == {str(images / "train" / corrupt) for corrupt in CORRUPT_FILES}
    for entry in found:
        assert f"image {paths[entry['index']]} cannot be decoded" in entry["reason"]
    manifest = json.loads((straight / "checkpoints/step-00000009/manifest.json").read_text())
    assert manifest["progress"]["corrupt"] == {str(entry["index"]): entry["reason"] for entry in found}


def test_resume_is_exact_and_keeps_the_corrupt_log(recipe, straight, capsys):
    """The resumed start has another number of workers."""
    run = recipe.parent / "runs/tiny"
    with trainer.before_step(5):
        assert trainer.train(recipe, LIMIT) == 0
    assert capsys.readouterr().out.count("is unreadable and replaced by another") == 2
    assert trainer.train(recipe, LIMIT, "data.workers=2") == 0
    out = capsys.readouterr().out
    assert "at step 5 (exact)" in out and "is unreadable and replaced by another" not in out
    assert corrupt_log(run) == corrupt_log(straight) and trainer.stable_metrics(run) == trainer.stable_metrics(straight)
    trainer.assert_same_checkpoint(*(path / "checkpoints/step-00000009" for path in (run, straight)))


def test_two_processes_share_the_limit_of_corrupt_samples(recipe, straight):
    done = trainer.run_processes(2, [recipe, LIMIT, "run.name=two"], [recipe, "guard.max_corrupt=1", "run.name=one"])
    assert trainer.exit_codes(done) == [[0, 0], [1, 1]], done.stderr
    two = recipe.parent / "runs/two"
    assert corrupt_log(two) == corrupt_log(straight)
    for left, right in zip(trainer.stable_metrics(straight), trainer.stable_metrics(two), strict=True):
        for key in left.keys() & {"loss", "grad_norm", "top1"}:
            assert right[key] == pytest.approx(left[key], abs=1e-5, rel=1e-5), key
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1 and all(corrupt in messages[0] for corrupt in CORRUPT_FILES), done.stderr


def test_too_many_corrupt_samples_stop_the_run_and_a_larger_limit_resumes_it(recipe, straight, capsys):
    run = recipe.parent / "runs/tiny"
    assert trainer.train(recipe, "guard.max_corrupt=1", "ckpt.every=1") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: 2 samples are unreadable, more than guard.max_corrupt=1") and error.count("\n") == 1
    assert all(fragment in error for fragment in (*CORRUPT_FILES, str(run / "corrupt.jsonl"), "repair or remove"))
    assert corrupt_log(run) == corrupt_log(straight)
    stopped = len(list((run / "checkpoints").iterdir()))
    assert trainer.train(recipe, LIMIT) == 0
    assert ("(exact)" in capsys.readouterr().out) == bool(stopped)
    assert corrupt_log(run) == corrupt_log(straight)
    trainer.assert_same_checkpoint(*(path / "checkpoints/step-00000009" for path in (run, straight)))


def test_new_start_forgets_repaired_files(recipe, images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "images")
    train = partial(trainer.train, recipe, f"data.root={tmp_path}/images", "sched.steps=5", "eval.every=5")
    assert train("guard.max_corrupt=0") == 1
    error, run = capsys.readouterr().err, recipe.parent / "runs/tiny"
    assert "cannot be decoded" in error and f"tessel check {run}/recipe.yaml" in error
    assert "guard.max_corrupt=N" in error and len(corrupt_log(run)) == 1
    for corrupt in CORRUPT_FILES:
        shutil.copy(tmp_path / "images/train/class_1/1.png", tmp_path / "images/train" / corrupt)
    assert train() == 1 and "have other sizes or labels" in capsys.readouterr().err
    assert train("ckpt.other_data=true") == 0 and corrupt_log(recipe.parent / "runs/tiny") == []


def test_corrupt_validation_image_is_an_error(recipe, images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "images")
    corrupt = tmp_path / "images/val/class_1/2.png"
    corrupt.write_bytes(b"")
    assert trainer.train(recipe, f"data.root={tmp_path}/images", "guard.max_corrupt=9") == 1
    error = capsys.readouterr().err
    assert str(corrupt) in error and "cannot be decoded" in error
    assert "an evaluation replaces no sample. tessel check" in error and error.count("\n") == 1


def test_by_default_a_few_corrupt_samples_are_replaced_and_listed_at_the_end(recipe, straight, capsys):
    """One in a thousand, at least three; no limit in the recipe gives the weights of a limit that is not reached."""
    for samples, limit in ((36, 3), (3999, 3), (4000, 4), (1_281_167, 1281)):
        assert Guard().corrupt_limit(samples) == limit
    assert Guard(max_corrupt=0).corrupt_limit(10**6) == 0
    assert trainer.train(recipe) == 0
    head, end = capsys.readouterr().out.split("unreadable training samples, replaced by others: 2 (")
    assert "is unreadable and replaced by another" in head
    assert all(f"images/train/{corrupt} cannot be decoded" in end for corrupt in CORRUPT_FILES)
    assert corrupt_log(recipe.parent / "runs/tiny") == corrupt_log(straight)
    trainer.assert_same_checkpoint(
        *(path / "checkpoints/step-00000009" for path in (recipe.parent / "runs/tiny", straight))
    )


def broken_augmentation(image, target):
    raise ZeroDivisionError("no\nluck")


class Torn:
    """A transform with settings that cannot transform images of one kind."""

    def __init__(self, bad):
        self.bad = bad

    def __repr__(self):
        return f"Torn(bad={self.bad})"

    def __call__(self, image, target):
        if image[0] == self.bad:
            image.numpy().reshape(3, 5)
        return image, target


@pytest.mark.parametrize("workers", [0, 1])
def test_exception_in_a_transform_names_sample_operation_and_remedy(workers):
    def first_error(dataset, transform):
        loader = Loader(SeededDataset(dataset, transform, 0), [[(0, 7)]], workers=workers, prefetch=2, pin=False)
        with pytest.raises(UserError) as caught:
            next(loader)
        loader.close()
        return str(caught.value)

    message = first_error(Numbers(), Torn(7))
    assert "\n" not in message and "Traceback" not in message
    assert message.startswith("sample 7 cannot be transformed: Torn(bad=7) failed (cannot reshape array of size 2")
    assert message.endswith("the key of data.aug (or of data) that asks for this operation, or remove the image")
    assert "broken_augmentation failed (no luck)" in first_error(Numbers(), broken_augmentation)


def test_samples_that_cannot_be_transformed_are_replaced_like_unreadable_ones():
    stream = order()
    seeded = SeededDataset(Numbers(), Torn(4), 1, order=stream, max_retries=1)
    loader = Loader(seeded, stream, workers=0, prefetch=2, pin=False)
    indices = [index for batch in loader for index in batch[2].tolist()]
    assert len(indices) == 60 and 4 not in indices and list(loader.failures) == [4]


def test_run_stops_with_one_line_if_an_augmentation_fails(tmp_path, monkeypatch, capsys):
    images = trainer.draw_folder(tmp_path / "images")
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", data={"root": str(images)})

    reasons = [ValueError("bits must be between 1 and 8")]

    def fail_once(operation, image):
        if reasons:
            raise reasons.pop()
        return image

    monkeypatch.setattr("timm.data.auto_augment.AugmentOp.__call__", fail_once)
    assert trainer.train(recipe, "guard.max_corrupt=0") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: image ") and ".png cannot be transformed: " in error and error.count("\n") == 1
    assert "failed (bits must be between 1 and 8)" in error and "guard.max_corrupt=N" in error
